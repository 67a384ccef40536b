"""Responses to scores to preference pairs. `python -m client label` and the trainer's loop share this code.

service.py     a judge that gives scores            candidates.py, pairs.py   scores -> pairs
labelling.py   texts -> scores, resumable           records.py                what is written
"""

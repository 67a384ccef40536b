"""Data sets of prompts with better and worse answers, from files or the Hugging Face hub.

tables.py   a file -> rows: JSON lines, JSON, CSV, Parquet      layouts.py   a row -> a Sample
sources.py  a file or a hub data set -> samples                 samples.py   selecting, splitting, digests of samples
"""

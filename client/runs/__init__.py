"""Runs that put many items to a judge and can be interrupted at any time. Benchmarks and the trainer share them.

config.py      what identifies a run: its judge, its templates, the difference between two configurations
resumable.py   each answer written as it comes, and only what is missing asked for by a rerun
progress.py    how far a run is, and the bar that shows it
"""

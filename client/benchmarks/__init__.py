"""Benchmarks of a judge through its API: RewardBench, RM-Bench, any pairwise file, best-of-N files.

rewardbench.py, rmbench.py, pairs.py   commands, all by command.py over flags.py and catalog.py
compare.py, search.py                  finished runs side by side; choosing among candidate questions
export.py                              a finished run as a leaderboard's files
report/                                a summary as an HTML page and on the terminal
results/                               rows -> summary.json; two runs on the same samples; a leaderboard's form
scoring/                               each benchmark's own arithmetic
run.py, outcomes.py                    samples -> judge -> rows, resumable
questions.py, paper.py                 which question is asked of which subset
rows.py                                the line written for each sample

Imports go down this list only.
"""

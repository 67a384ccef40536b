"""Reads exported files with RewardBench's own code, and computes the accuracies anew from the texts' scores.

Arguments: the folder with eval-set/ and eval-set-scores/, and 1 or 2 for RewardBench's version.
"""

import json
import sys

from analysis.utils import load_results, load_scores
from datasets import Dataset
from pandas import isna
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset

FOLDER, VERSION = sys.argv[1:]


def leaderboard():
    """The accuracies as the leaderboard's own reader sees them."""
    (row,) = load_results(FOLDER, "eval-set").to_dict("records")
    return {name: value for name, value in row.items() if name not in ("model", "model_type", "average")}


def accuracies():
    """What run_rm.py makes of the scores."""
    samples = load_scores(FOLDER, "eval-set-scores")
    samples["again"] = (samples["scores_chosen"] > samples["scores_rejected"]).astype(int)
    assert list(samples["again"]) == list(samples["results"])
    return samples.groupby("subset")["again"].mean().to_dict()


def accuracies_2():
    """What run_v2.py makes of the scores: one row for each text, and then one for each sample again."""
    samples = load_scores(FOLDER, "eval-set-scores").to_dict("records")
    names = ("id", "subset", "num_correct")
    texts = [
        {**{name: sample[name] for name in names}, "text": text, "scores": score}
        for sample in samples
        for text, score in zip(sample["text"], sample["scores"], strict=True)
    ]
    rerolled = reroll_and_score_dataset(Dataset.from_list(texts), [len(sample["scores"]) for sample in samples])
    ties, ties_score = process_single_model(rerolled.filter(lambda sample: sample["subset"] == "Ties"))
    assert set(ties["results"]) == {None}
    assert all(isna(sample["results"]) for sample in samples if sample["subset"] == "Ties")
    others = rerolled.to_pandas().query("subset != 'Ties'")
    assert list(others["results"]) == [sample["results"] for sample in samples if sample["subset"] != "Ties"]
    return {**others.groupby("subset")["results"].mean().to_dict(), "Ties": ties_score}


read = leaderboard()
sections = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, read) if VERSION == "1" else read
again = accuracies() if VERSION == "1" else accuracies_2()
print(json.dumps({"leaderboard": read, "again": again, "sections": sections}))

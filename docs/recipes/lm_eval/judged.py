"""What judged.yaml names: the documents, and how one answer is judged."""

import os
from functools import cache

from datasets import Dataset

from client import Judge

QUESTIONS = ["What is the capital of France?", "Name a prime number between 20 and 30."]


def documents(**_: object) -> dict[str, Dataset]:
    """The task's split; a task on a data set of the hub has `dataset_path` instead."""
    return {"test": Dataset.from_dict({"question": QUESTIONS})}


@cache
def judge() -> Judge:
    """One client for all documents."""
    return Judge(os.environ.get("JUDGE_URL", "http://127.0.0.1:8000"))


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """The metrics of one document's answer."""
    result = judge().score(doc["question"], results[0], category="chat")
    return {"judge_score": result.score, "judge_log_odds": result.log_odds}

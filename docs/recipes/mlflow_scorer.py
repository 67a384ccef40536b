"""MLflow: the judge as a scorer for mlflow.genai.evaluate.

    JUDGE_URL=http://127.0.0.1:8000 python mlflow_scorer.py

JUDGE_API_KEY holds the service's key, if it wants one. MLflow shows what could not be judged as the assessment's error.
"""

import os

import mlflow
from mlflow.entities import Feedback
from mlflow.genai.scorers import scorer

from client import Judge

DATA = [
    {"inputs": {"question": "What is the capital of France?"}, "outputs": "Paris."},
    {"inputs": {"question": "What is the capital of France?"}, "outputs": "A baguette."},
]

judge = Judge(os.environ.get("JUDGE_URL", "http://127.0.0.1:8000"))


@scorer
def judged(inputs: dict, outputs: str) -> Feedback:
    """How good an answer the output is, from 0 to 1. MLflow calls this from several threads, which share the client."""
    result = judge.score(inputs["question"], outputs, category="chat")
    return Feedback(value=result.score, metadata={"log_odds": result.log_odds, "label_mass": result.label_mass})


if __name__ == "__main__":
    print(mlflow.genai.evaluate(data=DATA, scorers=[judged]).metrics)

"""Inspect AI: the judge as a scorer of a model's answers.

    JUDGE_URL=http://127.0.0.1:8000 inspect eval inspect_scorer.py --model openai/gpt-6-luna

JUDGE_API_KEY holds the service's key, if it wants one. What could not be judged is an error of Inspect's, never a 0; it
stops the evaluation, unless --fail-on-error allows some errors.
"""

import os

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from client import AsyncJudge

SAMPLES = [Sample(input="What is the capital of France?"), Sample(input="Name a prime number between 20 and 30.")]


@scorer(metrics=[mean(), stderr()])
def judged(category: str = "chat") -> Scorer:
    """How good an answer the model's completion is, from 0 to 1."""
    judge = AsyncJudge(os.environ.get("JUDGE_URL", "http://127.0.0.1:8000"))

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion
        result = await judge.score(state.input_text, answer, category=category)
        return Score(
            value=result.score,
            answer=answer,
            metadata={"log_odds": result.log_odds, "label_mass": result.label_mass, "fingerprint": result.fingerprint},
        )

    return score


@task
def answers() -> Task:
    """Two questions, whose answers the judge scores."""
    return Task(dataset=SAMPLES, solver=generate(), scorer=judged())

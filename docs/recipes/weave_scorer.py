"""Weave: the judge as a scorer of an evaluation.

    JUDGE_URL=http://127.0.0.1:8000 python weave_scorer.py

JUDGE_API_KEY holds the service's key, if it wants one. Call weave.init("a-project") first to record the evaluation.
What could not be judged is logged as an error and left out of the means.
"""

import asyncio
import os

import weave
from pydantic import PrivateAttr

from client import AsyncJudge

ROWS = [{"question": "What is the capital of France?"}, {"question": "What is the capital of Italy?"}]


class JudgeScorer(weave.Scorer):
    """How good an answer the output is to the row's question, from 0 to 1."""

    url: str = os.environ.get("JUDGE_URL", "http://127.0.0.1:8000")
    category: str = "chat"
    _judge: AsyncJudge = PrivateAttr()

    def model_post_init(self, context: object) -> None:
        super().model_post_init(context)
        self._judge = AsyncJudge(self.url)

    @weave.op
    async def score(self, *, output: str, question: str) -> dict[str, float]:
        """Weave summarizes both numbers by their means."""
        result = await self._judge.score(question, output, category=self.category)
        return {"score": result.score, "log_odds": result.log_odds}


@weave.op
def paris(question: str) -> str:
    """The model under test: it knows one city."""
    return "Paris."


if __name__ == "__main__":
    evaluation = weave.Evaluation(dataset=ROWS, scorers=[JudgeScorer()])
    print(asyncio.run(evaluation.evaluate(paris)))

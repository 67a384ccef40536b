"""DeepEval: the judge as a metric of your own.

    JUDGE_URL=http://127.0.0.1:8000 python deepeval_metric.py

JUDGE_API_KEY holds the service's key, if it wants one. What could not be judged is raised: DeepEval then fails the test
case, or records the error if it was told to ignore errors. For DeepEval's own metrics see deepeval_system_one.py.
"""

import os

from deepeval import evaluate
from deepeval.metrics import BaseMetric
from deepeval.test_case import LLMTestCase, SingleTurnParams

from client import AsyncJudge, Judge

CASES = [
    LLMTestCase(input="What is the capital of France?", actual_output="Paris."),
    LLMTestCase(input="What is the capital of France?", actual_output="A baguette."),
]


class JudgeMetric(BaseMetric):
    """How good an answer the actual output is to the input, from 0 to 1."""

    _required_params = [SingleTurnParams.INPUT, SingleTurnParams.ACTUAL_OUTPUT]
    __name__ = "Judge"

    def __init__(self, threshold: float = 0.5, category: str = "chat") -> None:
        url = os.environ.get("JUDGE_URL", "http://127.0.0.1:8000")
        self.threshold = threshold
        self.category = category
        self._judge, self._async_judge = Judge(url), AsyncJudge(url)

    def measure(self, test_case: LLMTestCase, *args: object, **kwargs: object) -> float:
        return self._take(self._judge.score(test_case.input, test_case.actual_output, category=self.category))

    async def a_measure(self, test_case: LLMTestCase, *args: object, **kwargs: object) -> float:
        result = await self._async_judge.score(test_case.input, test_case.actual_output, category=self.category)
        return self._take(result)

    def is_successful(self) -> bool:
        return bool(self.success)

    def _take(self, result) -> float:
        self.score = result.score
        self.success = result.score >= self.threshold
        self.reason = f"log-odds {result.log_odds:.2f}, label mass {result.label_mass:.2f}"
        return self.score


if __name__ == "__main__":
    evaluate(CASES, metrics=[JudgeMetric()])

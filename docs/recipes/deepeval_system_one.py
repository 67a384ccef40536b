"""DeepEval's own metrics, decided by the judge through POST /v1/systemone instead of by an LLM's prose.

    JUDGE_URL=http://127.0.0.1:8000 python deepeval_system_one.py

JUDGE_API_KEY holds the service's key; DeepEval wants some key even where the service wants none.
"""

import os

from deepeval.metrics import AnswerRelevancyMetric
from deepeval.models import TypeSafeModel
from deepeval.test_case import LLMTestCase

CASE = LLMTestCase(input="What is the capital of France?", actual_output="Paris is the capital of France.")


def relevancy() -> AnswerRelevancyMetric:
    """DeepEval's answer relevancy; the judge answers its questions."""
    judge = TypeSafeModel(
        base_url=os.environ.get("JUDGE_URL", "http://127.0.0.1:8000"),
        api_key=os.environ.get("JUDGE_API_KEY", "none"),
    )
    return AnswerRelevancyMetric(eval_mode="system_one", system_one_model=judge)


if __name__ == "__main__":
    metric = relevancy()
    print(metric.measure(CASE), metric.reason)

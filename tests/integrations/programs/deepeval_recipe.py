"""RECIPE: DeepEval evaluates the recipe's test cases with its metric."""

import json
import runpy
import sys

from deepeval import evaluate
from deepeval.evaluate import AsyncConfig, CacheConfig, DisplayConfig

recipe = runpy.run_path(sys.argv[1])


def scores(run_async: bool) -> dict[str, list]:
    evaluated = evaluate(
        recipe["CASES"],
        metrics=[recipe["JudgeMetric"]()],
        async_config=AsyncConfig(run_async=run_async),
        cache_config=CacheConfig(write_cache=False),
        display_config=DisplayConfig(print_results=False, show_indicator=False),
    )
    return {
        result.input + result.actual_output: [result.metrics_data[0].score, result.metrics_data[0].success]
        for result in evaluated.test_results
    }


asked = [[case.input, case.actual_output] for case in recipe["CASES"]]
print(json.dumps({"asked": asked, "sync": scores(False), "async": scores(True)}))

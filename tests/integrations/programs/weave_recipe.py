"""RECIPE: Weave evaluates the recipe's rows with its scorer, without an account that would record them."""

import asyncio
import json
import runpy
import sys

import weave

recipe = runpy.run_path(sys.argv[1])
evaluation = weave.Evaluation(dataset=recipe["ROWS"], scorers=[recipe["JudgeScorer"]()])
summary = asyncio.run(evaluation.evaluate(recipe["paris"]))
print(json.dumps({"asked": [[row["question"], "Paris."] for row in recipe["ROWS"]], "summary": summary}))

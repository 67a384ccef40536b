"""RECIPE: DeepEval's answer relevancy with the judge as its decider, and one plain decision."""

import json
import runpy
import sys

from deepeval.models.system_one.schema import NoulQuestion

recipe = runpy.run_path(sys.argv[1])
metric = recipe["relevancy"]()
metric.measure(recipe["CASE"])
answers, cost = metric.system_one_model.decide("Paris.", {"city": NoulQuestion(instructions="Is this a city?")})
told = {
    "score": metric.score,
    "reason": metric.reason,
    "confidence": metric.confidence,
    "fallback": metric.system_one_fallback_reason,
    "city": answers.nouls["city"].probability,
}
print(json.dumps(told))

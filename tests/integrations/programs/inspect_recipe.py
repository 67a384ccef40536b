"""RECIPE: Inspect evaluates the recipe's task with its mock model, whose answers are known."""

import json
import runpy
import sys

from inspect_ai import eval as evaluate
from inspect_ai.model import ModelOutput, ModelUsage, get_model

recipe = runpy.run_path(sys.argv[1])


def output(answer: str) -> ModelOutput:
    """Its usage is given, or the mock model would download a tokenizer to count it."""
    given = ModelOutput.from_content("mockllm/model", answer)
    return given.model_copy(update={"usage": ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)})


model = get_model("mockllm/model", custom_outputs=[output("Paris."), output("A baguette.")])
[log] = evaluate(recipe["answers"](), model=model, display="none", max_connections=1, max_samples=1)
told = {
    "status": log.status,
    "asked": [[sample.input, sample.output.completion] for sample in log.samples],
    "scores": [score.value for sample in log.samples for score in sample.scores.values()],
    "metrics": log.results and {name: metric.value for name, metric in log.results.scores[0].metrics.items()},
}
print(json.dumps(told))

"""RECIPE: MLflow evaluates the recipe's rows with its scorer."""

import json
import runpy
import sys

import mlflow

recipe = runpy.run_path(sys.argv[1])
evaluated = mlflow.genai.evaluate(data=recipe["DATA"], scorers=[recipe["judged"]])
rows = evaluated.result_df
# Not a number where a row could not be judged.
rows = rows[rows["judged/value"].notna()]
told = {
    "asked": [[row["inputs"]["question"], row["outputs"]] for row in recipe["DATA"]],
    "scores": {row["request"]["question"] + row["response"]: row["judged/value"] for _, row in rows.iterrows()},
    "metrics": {name: float(value) for name, value in evaluated.metrics.items()},
}
print(json.dumps(told))

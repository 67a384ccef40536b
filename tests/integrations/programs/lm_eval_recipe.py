"""FOLDER: the real lm-eval runs the recipe's task with its dummy model; one line says what it found."""

import json
import subprocess
import sys
from pathlib import Path

command = ["lm_eval", "run", "--model", "dummy", "--tasks", "judged", "--include_path", sys.argv[1]]
subprocess.run([*command, "--output_path", "found", "--log_samples"], check=True)
[results] = Path("found").rglob("results_*.json")
[samples] = Path("found").rglob("samples_judged_*.jsonl")
rows = [json.loads(line) for line in samples.read_text().splitlines()]
told = {
    "asked": [[row["doc"]["question"], row["filtered_resps"][0]] for row in rows],
    "scores": [row["judge_score"] for row in rows],
    "metrics": json.loads(results.read_text())["results"]["judged"],
}
print(json.dumps(told))

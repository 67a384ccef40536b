"""Input files for the benchmarks' tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUBSETS = ("alpacaeval-easy", "llmbar-natural", "donotanswer", "hep-go", "math-prm")


def pairs_file(folder: Path, count: int = 20, **changes: Any) -> Path:
    """A file of `count` pairs over five subsets of RewardBench; `changes` go into the last line."""
    rows = [
        {
            "id": f"{n}",
            "subset": SUBSETS[n % 5],
            "prompt": f"Question {n}?",
            "chosen": f"Good {n}",
            "rejected": f"Bad {n}",
        }
        for n in range(count)
    ]
    rows[-1].update(changes)
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


PAPER = {
    "labels": {"yes": " Yes", "no": " No"},
    "rewardbench": {
        "layout": "{instruction}\n    User : {prompt}\n    Response : {response}\n    ",
        "instructions": {"one": "Is one fine?", "two": "Is two fine?", "three": "Is three fine?"},
    },
    "rmbench": {"layout": "{prompt} {response} {instruction}", "instructions": {"RM-Bench-chat": "Is it right?"}},
    "candidates": {"default": "Is it fine?", "one": ["a", "b"], "two": ["b", "c"]},
}


def paper_file(folder: Path, **changes: Any) -> Path:
    """The authors' file in miniature."""
    file = folder / "paper.json"
    file.write_text(json.dumps({**PAPER, **changes}))
    return file

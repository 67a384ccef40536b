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


# How many good answers a sample of RewardBench 2 has, by its subset and id; there are three bad ones.
BEST_OF_FOUR = [
    (subset, str(n), 1) for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus") for n in range(3)
]
TIES = [("Ties", f"{kind}:{n}", goods) for n in range(3) for kind, goods in (("ref", 1), ("tied", 3))]


def best_of_four_file(folder: Path) -> Path:
    """RewardBench 2 in miniature."""
    rows = [
        {
            "id": name,
            "subset": subset,
            "prompt": f"Question {name} of {subset}?",
            "chosen": [f"Good {good} of {name}" for good in range(goods)],
            "rejected": [f"Bad {bad} of {name}" for bad in range(3)],
        }
        for subset, name, goods in (*BEST_OF_FOUR, *TIES)
    ]
    file = folder / "best_of_four.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

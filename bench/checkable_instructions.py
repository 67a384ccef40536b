"""Instructions whose following a program can check, and labels by that program: an oracle beside the judge.

    python -m bench.checkable_instructions make --data ../shared/data/instructions.jsonl --out asked.jsonl
    python -m bench.checkable_instructions label --asked asked.jsonl --samples RUN/round-1/samples.jsonl --out labels

`make` adds one or two of IFEval's kinds of constraints, with arguments of their own, to general and chat prompts.
`label` writes what `python -m trainer.self_improve --labels-from` takes: a response's score is the share of its
prompt's constraints that it strictly follows. The kinds are those of IFEval; its prompts are not among these.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from bench.support.jsonl import read_rows, write_rows
from trainer.evaluation.tasks.ifeval import check_response, checkers

# A language or a fixed reply would replace the answer; repeating the prompt and answering twice have their own forms.
_LEFT_OUT: Final = (
    "language:response_language",
    "detectable_format:constrained_response",
    "combination:repeat_prompt",
    "combination:two_responses",
)
_LONGEST: Final = 400


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="instructions with constraints")
    make.add_argument("--data", type=Path, required=True, help="JSON lines with id, prompt, category")
    make.add_argument("--count", type=int, default=560)
    make.add_argument("--seed", type=int, default=42)
    label = commands.add_parser("label", help="what the program says of their responses")
    label.add_argument("--asked", type=Path, required=True, help="what `make` wrote")
    label.add_argument("--samples", type=Path, required=True, help="samples.jsonl of a run with these instructions")
    for command in (make, label):
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "make":
        write_rows(args.out, _asked(args.data, args.count, args.seed))
    else:
        write_rows(args.out, _labelled(args.asked, args.samples))
    return 0


def _asked(data: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    rows = [row for row in read_rows(data) if row["category"] in ("general", "chat") and len(row["prompt"]) <= _LONGEST]
    for row in rng.sample(rows, min(count, len(rows))):
        # The checkers draw their arguments from the module's generator.
        random.seed(f"{seed} {row['id']}")
        names, described, kwargs = _kinds(rng), [], []
        for name in names:
            checker = checkers()[name](name)
            described.append(checker.build_description())
            kwargs.append(checker.get_instruction_args() or {})
        prompt = "\n\n".join([row["prompt"].strip(), "\n".join(described)])
        asked = {"instruction_id_list": names, "kwargs": kwargs}
        yield {"id": row["id"], "prompt": prompt, "category": row["category"], **asked}


def _kinds(rng: random.Random) -> list[str]:
    conflicts = import_module("if_verifiable.ifeval.instructions_registry").INSTRUCTION_CONFLICTS
    kinds = [name for name in checkers() if name not in _LEFT_OUT]
    first = rng.choice(kinds)
    others = [name for name in kinds if name not in conflicts[first] and first not in conflicts[name]]
    return [first, rng.choice(others)] if others and rng.random() < 0.5 else [first]


def _labelled(asked: Path, samples: Path) -> Iterator[dict[str, Any]]:
    responses: defaultdict[str, list[str]] = defaultdict(list)
    for sample in read_rows(samples):
        responses[sample["id"]].append(sample["response"])
    for row in read_rows(asked):
        if own := responses.get(row["id"]):
            scores = [_score(row, response) for response in own]
            yield {"prompt": row["prompt"], "responses": own, "scores": scores}


def _score(row: dict[str, Any], response: str) -> float | None:
    check = check_response(row["instruction_id_list"], row["kwargs"], row["prompt"], response)
    if check.error is not None:
        return None
    return sum(one.strict for one in check.instructions) / len(check.instructions)


if __name__ == "__main__":
    sys.exit(main())

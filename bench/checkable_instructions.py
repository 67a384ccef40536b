"""Instructions whose following a program can check, and labels by that program: an oracle beside the judge.

    python -m bench.checkable_instructions make --data ../shared/data/instructions.jsonl --out asked.jsonl
    python -m bench.checkable_instructions label --asked asked.jsonl --samples RUN/round-1/samples.jsonl --out labels
    python -m bench.checkable_instructions agree --asked asked.jsonl --scored RUN/round-1
    python -m bench.checkable_instructions pairs --asked asked.jsonl --scored RUN/round-1

`make` adds one or two of IFEval's kinds of constraints, with arguments of their own, to general and chat prompts.
`label` writes what `python -m trainer.self_improve --labels-from` and `trainer.tune_judge --pairs` take: a response's
score is the share of its prompt's constraints that it strictly follows. The kinds are those of IFEval; its prompts are
not among these. `agree` says what a judge's labels of the same responses are worth by that program, and `pairs` what
the pairs are worth that the loop's options make of them. With `--first N` only the first N of the prompts that have
responses count, with `--after N` only the others, so that a judge can be tuned on some, and its labels (`--scores`) be
used and measured on the rest.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, NamedTuple

from bench.support.jsonl import read_rows, write_rows
from client.labels.candidates import CandidatePair
from client.labels.pairs import BEST_AGAINST_WORST, PairOptions, RankLimits, choose_pairs
from client.labels.records import Score
from client.stats import stratified_bootstrap, wilson
from trainer.evaluation.tasks.ifeval import check_response, checkers
from trainer.run.files import read_records
from trainer.run.records import SAMPLES_FILE, SCORES_FILE, Instruction, Sample

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
    label.add_argument("--samples", type=Path, required=True, help="samples.jsonl of a run with these instructions")
    label.add_argument("--scores", type=Path, help="a judge's scores.jsonl, in place of what the program says")
    for command in (make, label):
        command.add_argument("--out", type=Path, required=True)
    agree = commands.add_parser("agree", help="how often a judge's labels say the same")
    pairs = commands.add_parser("pairs", help="how right the pairs are that the loop's options make of its labels")
    for command in (agree, pairs):
        command.add_argument(
            "--scored", type=Path, required=True, metavar="DIR", help="with samples.jsonl and scores.jsonl"
        )
    for command in (label, agree, pairs):
        command.add_argument("--asked", type=Path, required=True, help="what `make` wrote")
        command.add_argument("--first", type=int, metavar="N", help="only the first N prompts")
        command.add_argument("--after", type=int, default=0, metavar="N", help="only the prompts after the first N")
    args = parser.parse_args()
    if args.command == "make":
        write_rows(args.out, _asked(args.data, args.count, args.seed))
        return 0
    part = slice(args.after, args.first)
    if args.command == "label":
        answered = _answered(args.asked, args.samples)
        write_rows(args.out, _labelled(answered, part, args.scores and _judged(args.scores)))
        return 0
    answered = _answered(args.asked, args.scored / SAMPLES_FILE)[part]
    if args.command == "agree":
        print("\n".join(_agreement(answered, _judged(args.scored / SCORES_FILE))))
    else:
        print("\n".join(_worth_of_pairs(answered, args.scored)))
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


class _Answered(NamedTuple):
    """A row of `make` with its responses, their numbers in the run, and the shares of its constraints that they follow
    (None: the program cannot say).
    """

    row: dict[str, Any]
    responses: list[str]
    numbers: list[int]
    followed: list[float | None]


def _answered(asked: Path, samples: Path) -> list[_Answered]:
    """The rows that have responses, in their order."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in read_rows(samples):
        found[sample["id"]].append(sample)
    return [
        _Answered(
            row,
            [one["response"] for one in own],
            [one["sample"] for one in own],
            [_score(row, one["response"]) for one in own],
        )
        for row in read_rows(asked)
        if (own := found.get(row["id"]))
    ]


def _judged(scores: Path) -> dict[tuple[str, int], float | None]:
    """A judge's log-odds by response."""
    return {(line["id"], line["sample"]): line.get("log_odds") for line in read_rows(scores)}


def _labelled(
    answered: Sequence[_Answered], part: slice, judged: Mapping[tuple[str, int], float | None] | None
) -> Iterator[dict[str, Any]]:
    """Labels of the prompts in `part`; those of the others are all equal, so that they make no pair."""
    kept = {one.row["id"] for one in answered[part]}
    for one in answered:
        name = one.row["id"]
        scores = one.followed if judged is None else [judged.get((name, number)) for number in one.numbers]
        yield {
            "prompt": one.row["prompt"],
            "category": one.row["category"],
            "responses": one.responses,
            "scores": scores if name in kept else [0.0] * len(one.responses),
        }


def _agreement(answered: Sequence[_Answered], judged: Mapping[tuple[str, int], float | None]) -> Iterator[str]:
    """Lines that compare both; intervals are 95%, over prompts."""
    # Of each prompt's responses: what the judge says, and the program.
    prompts: list[list[tuple[float, float]]] = []
    for one in answered:
        said = (judged.get((one.row["id"], number)) for number in one.numbers)
        both = [
            (first, second)
            for first, second in zip(said, one.followed, strict=True)
            if first is not None and second is not None
        ]
        if both:
            prompts.append(both)
    counts = []
    for both in prompts:
        decided = [(one, two) for one, two in combinations(sorted(both), 2) if one[0] < two[0] and one[1] != two[1]]
        if decided:
            counts.append((sum(one[1] < two[1] for one, two in decided), len(decided)))

    def share(drawn: Mapping[str, Sequence[tuple[int, int]]]) -> float:
        return sum(agreed for agreed, _ in drawn[""]) / sum(count for _, count in drawn[""])

    found = stratified_bootstrap({"": counts}, share)
    yield (
        f"of {sum(count for _, count in counts)} comparisons that the program decides, the judge agrees in "
        f"{100 * found.value:.1f}% ({100 * found.low:.1f} to {100 * found.high:.1f})"
    )
    for who, of in (
        ("the judge's best", lambda both: max(both)[1]),
        ("the judge's worst", lambda both: min(both)[1]),
        ("all", lambda both: fmean(followed for _, followed in both)),
        ("the program's best", lambda both: max(followed for _, followed in both)),
    ):
        yield f"constraints followed by {who}: {100 * fmean(map(of, prompts)):.1f}%"


def _worth_of_pairs(answered: Sequence[_Answered], scored: Path) -> Iterator[str]:
    """A line for each way of making pairs of these labels; intervals are 95%, over pairs."""
    followed = {
        (one.row["id"], number): share
        for one in answered
        for number, share in zip(one.numbers, one.followed, strict=True)
    }
    prompts = [Instruction.model_validate(one.row) for one in answered]
    samples = [sample for sample in read_records(scored / SAMPLES_FILE, Sample) if sample.key in followed]
    scores = {score.key: score for score in read_records(scored / SCORES_FILE, Score)}

    def pairs_by(
        options: PairOptions, first: int | None = None, limits: RankLimits = BEST_AGAINST_WORST
    ) -> list[CandidatePair]:
        kept = [sample for sample in samples if first is None or sample.sample < first]
        found, _ = choose_pairs(prompts, kept, scores, options, limits)
        return [pair for of_prompt in found.values() for pair in of_prompt]

    plain = pairs_by(PairOptions())
    middle = median(pair.margin for pair in plain) if plain else 0.0
    for name, pairs in {
        "by default": plain,
        f"--min-margin {middle:.2f}, the median": pairs_by(PairOptions(min_margin=middle)),
        "--rejected middle": pairs_by(PairOptions(rejected="middle")),
        "--length-balance": pairs_by(PairOptions(length_balance=True)),
        "--cut-off drop": pairs_by(PairOptions(cut_off="drop")),
        "--cut-off keep": pairs_by(PairOptions(cut_off="keep")),
        "--samples 2": pairs_by(PairOptions(), 2),
        "--samples 3": pairs_by(PairOptions(), 3),
        "client label --bottom 3": pairs_by(PairOptions(), limits=RankLimits(1, 3)),
    }.items():
        yield f"{name}: {_described(pairs, followed)}"


def _described(pairs: Sequence[CandidatePair], followed: Mapping[tuple[str, int], float | None]) -> str:
    sides = [(followed[pair.chosen.sample.key], followed[pair.rejected.sample.key]) for pair in pairs]
    checked = [(one, two) for one, two in sides if one is not None and two is not None]
    right, decided = sum(one > two for one, two in checked), sum(one != two for one, two in checked)
    if not decided:
        return f"{len(pairs)} pairs, none of which the program decides"
    low, high = wilson(right, decided)
    gain = fmean(one - two for one, two in checked)
    longer = fmean(pair.length_difference for pair in pairs)
    return (
        f"{len(pairs)} pairs; of {decided} that the program decides {100 * right / decided:.1f}% are right "
        f"({100 * low:.1f} to {100 * high:.1f}); chosen against rejected: {100 * gain:+.1f} points of constraints, "
        f"{longer:+.0f} characters"
    )


def _score(row: dict[str, Any], response: str) -> float | None:
    check = check_response(row["instruction_id_list"], row["kwargs"], row["prompt"], response)
    if check.error is not None:
        return None
    return sum(one.strict for one in check.instructions) / len(check.instructions)


if __name__ == "__main__":
    sys.exit(main())

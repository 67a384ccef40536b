"""A run's verdicts in the form of RewardBench's results, as allenai/reward-bench's own scripts write them.

    eval-set/ORG/NAME.json         the accuracy of each subset: scripts/run_rm.py, scripts/run_v2.py
    eval-set-scores/ORG/NAME.json  a column for each property of the samples, texts and scores included

Texts are conversations, lists of messages, which is what those scripts write for models that format them themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from client.benchmarks.rows import Row, TiePolicy
from client.benchmarks.scoring.benchmark import Benchmark, by_subset
from client.benchmarks.scoring.best_of import Pairs, is_of_ties, ties_score
from client.benchmarks.scoring.rewardbench import WEIGHTS, RewardBench
from client.data.samples import Sample
from client.schema import Message
from client.stats import mean

_TIES: Final = "Ties"
_MODEL_TYPES: Final = ("Seq. Classifier", "Generative")

Judged: TypeAlias = Sequence[tuple[Sample, Row]]


@dataclass(frozen=True, slots=True)
class Identity:
    """How the leaderboard names a judge. `model` is ORG/NAME, `chat_template` says how texts were put to it."""

    model: str
    model_type: str
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The form of one leaderboard: whose runs and which subsets it takes, and what is written of them.

    `accuracies` gives the score of each subset; `columns` gives lists of equal length, an entry for each sample.
    `compares` says whether it takes runs that judged answers two by two.
    """

    benchmark: str
    subsets: frozenset[str]
    compares: bool
    accuracies: Callable[[Sequence[Row], TiePolicy], dict[str, float]]
    columns: Callable[[Judged, TiePolicy], dict[str, list[Any]]]

    def has(self, row: Row) -> bool:
        """Whether the sample can be one of this benchmark's."""
        return row.subset in self.subsets and (row.subset != _TIES or is_of_ties(row))


def model_type_of(rows: Sequence[Row]) -> str:
    """The leaderboard's word for the kind of judge that gave these rows."""
    templates = {row.template for row in rows}
    heads = all(template is not None and template.startswith("reward-model@") for template in templates)
    return _MODEL_TYPES[not heads]


def results_text(identity: Identity, accuracies: Mapping[str, float]) -> str:
    """The text of the file under eval-set/."""
    return _as_json({**_described(identity), **accuracies})


def scores_text(identity: Identity, columns: Mapping[str, list[Any]]) -> str:
    """The text of the file under eval-set-scores/."""
    return _as_json({**_described(identity), **columns})


def _described(identity: Identity) -> dict[str, Any]:
    return {
        "model": identity.model,
        "model_type": identity.model_type,
        "chat_template": identity.chat_template,
    }


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=4, sort_keys=True, allow_nan=False) + "\n"


def _accuracies(rows: Sequence[Row], ties: TiePolicy) -> dict[str, float]:
    return _mean_credits(RewardBench(), rows, ties)


def _accuracies_2(rows: Sequence[Row], _: TiePolicy) -> dict[str, float]:
    """By the benchmark's own rule of ties, whatever the run's. `Ties` is absent if none of its prompts is complete."""
    of_ties = [row for row in rows if row.subset == _TIES]
    accuracies = _mean_credits(Pairs(), [row for row in rows if row.subset != _TIES], "half")
    score = ties_score(of_ties) if of_ties else None
    return accuracies if score is None else {**accuracies, _TIES: score}


def _mean_credits(benchmark: Benchmark, rows: Sequence[Row], ties: TiePolicy) -> dict[str, float]:
    return {
        subset: mean([benchmark.credit(row, ties) for row in members]) for subset, members in by_subset(rows).items()
    }


def _columns(judged: Judged, ties: TiePolicy) -> dict[str, list[Any]]:
    benchmark = RewardBench()
    return {
        "id": _numbers([_official_id(sample) for sample, _ in judged]),
        "subset": [sample.subset for sample, _ in judged],
        "prompt": [_prompt(sample) for sample, _ in judged],
        "text_chosen": [_conversation(sample, sample.chosen[0]) for sample, _ in judged],
        "text_rejected": [_conversation(sample, sample.rejected[0]) for sample, _ in judged],
        "results": [_whole(benchmark.credit(row, ties)) for _, row in judged],
        "scores_chosen": [row.chosen_answers[0].log_odds for _, row in judged],
        "scores_rejected": [row.rejected_answers[0].log_odds for _, row in judged],
    }


def _columns_2(judged: Judged, _: TiePolicy) -> dict[str, list[Any]]:
    """`scores` and `text` have the good answers first. Samples of `Ties` have no results: they are scored together."""
    benchmark = Pairs()
    return {
        "id": [_official_id(sample) for sample, _ in judged],
        "subset": [sample.subset for sample, _ in judged],
        "text": [
            [_conversation(sample, answer) for answer in (*sample.chosen, *sample.rejected)] for sample, _ in judged
        ],
        "num_correct": [len(sample.chosen) for sample, _ in judged],
        "results": [None if row.subset == _TIES else _whole(benchmark.credit(row, "half")) for _, row in judged],
        "scores": [[answer.log_odds for answer in row.answers] for _, row in judged],
    }


def _official_id(sample: Sample) -> str:
    """The id before the subset was put in front of it: see client.data.layouts."""
    return sample.id.removeprefix(f"{sample.subset}/")


def _numbers(ids: list[str]) -> list[Any]:
    """RewardBench's ids are whole numbers. Other data's stay as they are: a column has one type."""
    return [int(name) for name in ids] if all(name.isdecimal() for name in ids) else ids


def _prompt(sample: Sample) -> str | list[dict[str, str]]:
    return sample.prompt if isinstance(sample.prompt, str) else _turns(sample.prompt)


def _conversation(sample: Sample, answer: str) -> list[dict[str, str]]:
    before = sample.prompt if not isinstance(sample.prompt, str) else (Message(role="user", content=sample.prompt),)
    return [*_turns(before), {"role": "assistant", "content": answer}]


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _whole(credit: float) -> float:
    """0 and 1 as whole numbers, as the scripts write them."""
    return int(credit) if credit in (0.0, 1.0) else credit


LEADERBOARDS: Final[dict[str, Leaderboard]] = {
    "rewardbench": Leaderboard("rewardbench", frozenset(WEIGHTS), True, _accuracies, _columns),
    "rewardbench-2": Leaderboard(
        "pairs",
        frozenset({"Factuality", "Precise IF", "Math", "Safety", "Focus", _TIES}),
        False,
        _accuracies_2,
        _columns_2,
    ),
}

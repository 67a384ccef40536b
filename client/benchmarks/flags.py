"""The flags that benchmark commands share, and the dataclasses they become. Beyond this file nobody sees argparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from client.benchmarks.catalog import CatalogEntry
from client.benchmarks.paper import PaperPrompts, PaperStudy
from client.benchmarks.questions import (
    PANEL_SEPARATOR,
    Plan,
    PlanError,
    Question,
    by_category,
    from_map,
    one_for_all,
)
from client.benchmarks.rows import Mode
from client.benchmarks.run import Asking
from client.bulk import BulkOptions
from client.data.samples import Sample, choose
from client.data.sources import load_hub
from client.data.tables import DataError
from client.judge import AsyncJudge
from client.runtime.cli import CALL_TIMEOUT, add_judge_flags
from client.schema import Format, Truncation

HUB: Final = "hub"
# The split of each official data set that its leaderboard is computed on.
OFFICIAL_SPLITS: Final[dict[str, str]] = {
    "allenai/reward-bench": "filtered",
    "allenai/reward-bench-2": "test",
    "THU-KEG/RM-Bench": "train",
}

# Progress on a slow judge begins with the first answers.
FIRST_ITEMS: Final = 4


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which samples to judge: a file, `hub` for the official data set, or `hub:NAME[@SPLIT]`, and a part of it."""

    source: str
    subsets: Sequence[str] | None
    limit: int | None
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> DataOptions:
        """From the flags of `add_data_flags`."""
        return cls(args.data, args.subsets, args.limit, args.seed)

    def samples(self, entry: CatalogEntry) -> list[Sample]:
        """Read and select the samples. Raises DataError."""
        return choose(self._load(entry), self.subsets, self.limit, self.seed)

    def _load(self, entry: CatalogEntry) -> list[Sample]:
        if self.source != HUB and not self.source.startswith(f"{HUB}:"):
            return entry.load(Path(self.source))
        name, _, split = self.source.removeprefix(HUB).removeprefix(":").partition("@")
        name = name or entry.hub_name or ""
        if not name:
            raise DataError("this benchmark has no official data set: give --data hub:OWNER/NAME")
        return load_hub(name, split or OFFICIAL_SPLITS.get(name))


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """Where the judge is, how samples are put to it, and how hard it may be pressed.

    Without a `mode` the judge's own is taken.
    """

    url: str
    api_key: str | None
    mode: Mode | None
    truncation: Truncation
    max_failures: float
    bulk: BulkOptions

    @classmethod
    def of(cls, args: argparse.Namespace) -> JudgeOptions:
        """From the flags of `add_asking_flags`. Raises ValueError for numbers that cannot work."""
        if min(args.batch_items, args.concurrency) < 1 or args.patience < 0 or not 0 <= args.max_failures <= 1:
            raise ValueError(
                "--batch-items and --concurrency must be 1 or more, --patience 0 or more, --max-failures from 0 to 1"
            )
        bulk = BulkOptions(
            batch_items=args.batch_items,
            first_items=FIRST_ITEMS,
            max_in_flight=args.concurrency,
            patience=args.patience,
        )
        return cls(args.judge_url, args.api_key, args.mode, args.truncation, args.max_failures, bulk)

    def client(self) -> AsyncJudge:
        """A client for this judge."""
        return AsyncJudge(self.url, api_key=self.api_key, timeout=CALL_TIMEOUT)

    def asking(self, plan: Plan, mode: Mode) -> Asking:
        """These questions, asked in this mode."""
        return Asking(plan, mode, self.truncation, self.max_failures, self.bulk)


@dataclass(frozen=True, slots=True)
class QuestionOptions:
    """What the judge is asked. At most one of the first four is set; if none is, each subset's category decides."""

    category: str | None
    template: str | None
    map: Path | None
    paper: Path | None
    paper_format: Format
    paper_study: PaperStudy

    @classmethod
    def of(cls, args: argparse.Namespace) -> QuestionOptions:
        """From the flags of `add_question_flags`."""
        template = None if args.template is None else PANEL_SEPARATOR.join(args.template)
        return cls(args.category, template, args.map, args.paper, args.paper_format, args.paper_study)

    @property
    def flag(self) -> str | None:
        """The name of the flag that sets the question."""
        return next(
            (name for name in ("category", "template", "map", "paper") if getattr(self, name) is not None), None
        )

    def plan(self, entry: CatalogEntry, samples: Sequence[Sample], seed: int) -> Plan:
        """The question of each subset. Raises PlanError."""
        subsets = list(dict.fromkeys(sample.subset for sample in samples))
        if self.category is not None:
            return one_for_all(subsets, Question(category=self.category))
        if self.template is not None:
            return one_for_all(subsets, Question(template=self.template))
        if self.map is not None:
            return from_map(subsets, self.map)
        if self.paper is not None:
            if entry.paper_group is None:
                raise PlanError("the paper has prompts for RewardBench and RM-Bench only")
            prompts = PaperPrompts.load(self.paper)
            return prompts.plan(subsets, entry.paper_group, self.paper_format, self.paper_study, seed)
        return by_category(subsets, entry.benchmark.category_of)


def add_data_flags(parser: argparse.ArgumentParser, *, data_help: str, seed_help: str) -> None:
    """Which samples: see DataOptions."""
    parser.add_argument("--data", required=True, metavar="FILE|hub", help=data_help)
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="only these subsets; patterns with * are fine")
    parser.add_argument("--limit", type=int, help="judge at most this many samples, in proportion from every subset")
    parser.add_argument("--seed", type=int, default=0, help=seed_help)


def add_asking_flags(parser: argparse.ArgumentParser, *, default_mode: Mode | None) -> None:
    """Where the judge is and how it is asked: see JudgeOptions."""
    judging = parser.add_argument_group("judging")
    _add_mode_flag(judging, default_mode)
    add_judging_flags(parser, judging)


def _add_mode_flag(judging: argparse._ArgumentGroup, default_mode: Mode | None) -> None:
    judging.add_argument(
        "--mode",
        choices=get_args(Mode),
        default=default_mode,
        help="judge each answer by itself, or both in both orders; by default as the service's judge does it: pairwise "
        "for the judge pairwise, else pointwise (in a search: pointwise)",
    )


def add_judging_flags(parser: argparse.ArgumentParser, judging: argparse._ArgumentGroup) -> None:
    """What holds in every mode: --truncation in the group `judging`, and the group `judge`."""
    judging.add_argument(
        "--truncation",
        choices=get_args(Truncation),
        default="error",
        help="texts over the model's length are a counted failure (error, the default), or cut and flagged",
    )
    judge = parser.add_argument_group("judge")
    add_judge_flags(judge)
    judge.add_argument("--batch-items", type=int, default=32, help="judgements per call (default: 32)")
    judge.add_argument("--concurrency", type=int, default=16, help="maximum number of concurrent calls (default: 16)")
    judge.add_argument(
        "--patience", type=float, default=300.0, help="seconds to wait for an unreachable judge (default: 300)"
    )
    judge.add_argument(
        "--max-failures",
        type=float,
        default=0.02,
        help="share of samples that may fail before the run stops with exit code 1 (default: 0.02)",
    )


def add_question_flags(parser: argparse.ArgumentParser, *, paper: bool) -> None:
    """What the judge is asked: see QuestionOptions. `paper` says whether the paper has prompts for the benchmark."""
    group = parser.add_argument_group(
        "question",
        "What the judge is asked: by default the built-in template of each subset's category. Judges without "
        "categories (self-reward, reward-model) are asked in their own way.",
    )
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument("--category", help="this category for everything")
    exclusive.add_argument(
        "--template",
        nargs="+",
        metavar="NAME",
        help="this template for everything, e.g. general@1; of several each is asked, and their log-odds are averaged",
    )
    exclusive.add_argument(
        "--map", type=Path, metavar="FILE", help='JSON: {"subset or pattern": {"category": …} or {"template": …}}'
    )
    exclusive.add_argument(
        "--paper", type=Path, metavar="FILE", help="the paper's prompts, from its authors' JSON file"
    )
    if not paper:
        parser.set_defaults(paper_format="raw", paper_study="own")
        return
    group.add_argument(
        "--paper-format",
        choices=get_args(Format),
        default="raw",
        help="the paper's prompts as raw text, as published (default), or through the model's chat template",
    )
    group.add_argument(
        "--paper-study",
        choices=get_args(PaperStudy),
        default="own",
        help="each subset's own prompt (default), prompts shuffled over the subsets, or one generic prompt for all",
    )

"""`python -m client label`: prompts with responses -> scores of all, and preference pairs that training reads.

data ── texts ──> scores.jsonl ── pairs.py ──> pairs.jsonl (TRL), plain JSON lines, Parquet; stats.json, report.html
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.labels", "benchmarks")

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from client.benchmarks.command import exit_code_of, ready_model
from client.benchmarks.flags import JudgeOptions, add_judging_flags
from client.benchmarks.questions import PlanError
from client.labels.labelling import LabelJob, label_texts
from client.labels.outputs import SCORES_FILE, STATS_FILE, PairFormat, check_formats, write_outputs
from client.labels.pairs import PairOptions, RankLimits, choose_pairs
from client.labels.reading import LabelData, LabelSource, read_label_data
from client.labels.records import SampleKey, Score
from client.labels.report.page import REPORT_FILE, write_label_report
from client.labels.results import Labelled, label_stats
from client.labels.service import YES_NO, JudgeLabeler, LabelQuestion
from client.labels.wording import no_pairs, remarks_on
from client.runs.folders import claim_folder
from client.runs.progress import progress_bar
from client.runs.resumable import RunError
from client.runtime.cli import stderr_console, stdout_console
from client.runtime.jsonl import read_lines
from client.runtime.parser import Parser
from client.schema import ModelInfo, TemplatesResult

_START_OVER: Final = "give another --out"
_PAIRWISE: Final = "pairwise"


@dataclass(frozen=True, slots=True)
class LabelCommand:
    """The flags of one run."""

    source: LabelSource
    template: str | None
    pairs: PairOptions
    limits: RankLimits
    judge: JudgeOptions
    formats: tuple[PairFormat, ...]
    out: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> LabelCommand:
        """Raises ValueError for flags that cannot work, alone or together."""
        if args.length_balance and (args.top, args.bottom) != (1, 1):
            raise ValueError("--length-balance chooses one pair a prompt by itself: leave --top and --bottom out")
        return cls(
            LabelSource(args.data, args.limit, args.skip_bad, args.category, args.category_column),
            args.template,
            PairOptions(min_margin=args.min_margin, length_balance=args.length_balance),
            RankLimits(args.top, args.bottom),
            JudgeOptions.of(args),
            tuple(args.format or ("trl",)),
            args.out,
        )

    def question(self, info: ModelInfo, offered: TemplatesResult) -> LabelQuestion:
        """How this judge is asked. Raises PlanError for flags that it cannot follow."""
        if info.judge == _PAIRWISE:
            raise PlanError(
                "the service's judge is pairwise, and labels are scores of single responses: start the service with "
                "--judge yes-no, self-reward or reward-model"
            )
        source = self.source
        if info.judge != YES_NO and (self.template or source.category or source.category_column):
            raise PlanError(
                f"the service's judge is {info.judge}, which has one question for everything: leave --template, "
                "--category and --category-column out"
            )
        if source.category is not None and source.category not in offered.categories:
            raise PlanError(f"the service has no category {source.category}: {', '.join(offered.categories)}")
        return LabelQuestion(self.template, self.judge.truncation, self.judge.bulk)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (no pairs, too many failures, no judge), 2 (usage, bad input) or 130."""
    args = _label_parser().parse_args(argv)

    def work() -> None:
        command = LabelCommand.of(args)
        data = read_label_data(command.source)
        check_formats(command.formats, data)
        asyncio.run(_label(command, data))

    return exit_code_of(work)


async def _label(command: LabelCommand, data: LabelData) -> None:
    console, file = stderr_console(), command.out / SCORES_FILE
    async with command.judge.client() as judge:
        info, offered = await ready_model(judge), await judge.templates()
        labeler = JudgeLabeler(judge, info, offered, command.question(info, offered))
        known = _known_scores(file)
        config = claim_folder(
            file,
            {"data_digest": data.digest(), "prompts": len(data.sets), **labeler.described()},
            lambda: {score.template for score in known},
            _START_OVER,
        )
        job = LabelJob(data.texts(), file, command.judge.max_failures, _START_OVER)
        console.print(
            f"label: {len(job.texts)} responses to {len(data.sets)} prompts, judge {info.id}, into {command.out}",
            soft_wrap=True,
        )
        with progress_bar(console, "label") as on_progress:
            scores = await label_texts(labeler, job, known, on_progress)
    _write_results(command, data, scores, config)


def _known_scores(file: Path) -> list[Score]:
    try:
        return read_lines(file, Score) if file.exists() else []
    except ValueError as error:
        raise RunError(f"{error}; remove that line or the folder") from error


def _write_results(
    command: LabelCommand, data: LabelData, scores: Mapping[SampleKey, Score], config: dict[str, Any]
) -> None:
    """Choose the pairs, write all files and say what came of it. Raises RunError if there are no pairs."""
    pairs, pair_stats = choose_pairs(data.sets, data.answers(), scores, command.pairs, command.limits)
    labelled = Labelled(data, scores, pairs, label_stats(data, scores, pairs, pair_stats))
    written = write_outputs(command.out, labelled, command.formats)
    remarks = remarks_on(labelled.stats)
    write_label_report(command.out / REPORT_FILE, labelled, config, remarks)
    console = stdout_console()
    for line in [*remarks, f"written: {', '.join(map(str, [*written, command.out / STATS_FILE]))}, {REPORT_FILE}"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if not labelled.stats.pairs.pairs:
        raise RunError(no_pairs(labelled.stats, command.pairs.min_margin))


def _label_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m client label",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score every response to every prompt, and write preference pairs of them for training:\n"
        "  python -m client label --data samples.jsonl --judge-url http://127.0.0.1:8000 --out labels",
        epilog='A line of the data: {"prompt": "What is 2+2?", "responses": ["4", "5", "Four."]}, or prompt, chosen\n'
        "and rejected, which are labelled anew and compared with the given labels. Other columns are carried into\n"
        "the pairs. Scores are written as they come; after an interruption the same command goes on where it stopped,\n"
        "and with other flags about pairs it asks nothing again.",
    )
    parser.add_argument("--data", required=True, metavar="FILE|hub:NAME[@SPLIT]", help="JSONL, JSON, CSV or Parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--limit", type=int, metavar="N", help="label the first N prompts only")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count rows that cannot be read")
    _add_question_flags(parser)
    _add_pair_flags(parser)
    add_judging_flags(parser, parser.add_argument_group("judging"))
    parser.set_defaults(mode=None)
    return parser


def _add_question_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "question",
        "What a judge yes-no is asked: by default the template of each row's category, which is in the column\n"
        "`category`; rows without one, or with one that the service does not have, are judged as general.",
    ).add_mutually_exclusive_group()
    group.add_argument("--category", metavar="NAME", help="this category for everything")
    group.add_argument("--category-column", metavar="NAME", help="the column with each row's category")
    group.add_argument("--template", metavar="NAME", help="this template for everything, e.g. general@1")


def _add_pair_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "pairs",
        "A prompt's responses are ranked by log-odds, without those that are empty, failed, or repeat another. By\n"
        "default the best is paired with the worst (best-vs-worst); equal scores make no pair.",
    )
    group.add_argument(
        "--top", type=int, default=1, metavar="N", help="pair each of the N best as chosen (default: 1) …"
    )
    group.add_argument(
        "--bottom",
        type=int,
        default=1,
        metavar="N",
        help="… with each of the N worst as rejected, wherever it ranks lower (default: 1); --bottom 15 pairs the best "
        "with all others",
    )
    group.add_argument(
        "--min-margin",
        type=float,
        default=0.0,
        metavar="X",
        help="least difference of the log-odds of chosen and rejected (default: 0, but never a tie)",
    )
    group.add_argument(
        "--length-balance",
        action="store_true",
        help="instead choose one pair a prompt so that chosen and rejected are equally long on average; each keeps "
        "half of its prompt's widest margin",
    )
    group.add_argument(
        "--format",
        action="append",
        choices=get_args(PairFormat),
        help="files of pairs, may be repeated: TRL's conversations in pairs.jsonl (trl, the default), the same with "
        "texts in pairs-plain.jsonl (plain), conversations in pairs.parquet (parquet)",
    )


if __name__ == "__main__":
    program.finish(main)

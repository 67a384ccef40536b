"""The commands rewardbench, rmbench and pairs: flags -> samples, plan, run, summary, report."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, get_args

from client.benchmarks.catalog import BENCHMARKS, CatalogEntry
from client.benchmarks.flags import (
    DataOptions,
    JudgeOptions,
    QuestionOptions,
    add_asking_flags,
    add_data_flags,
    add_question_flags,
)
from client.benchmarks.questions import Plan, PlanError, Question, one_for_all
from client.benchmarks.report.formats import model_name
from client.benchmarks.report.page import write_report
from client.benchmarks.report.terminal import print_summary
from client.benchmarks.results.summarise import summarise
from client.benchmarks.results.summary import SUMMARY_FILE
from client.benchmarks.rows import Mode, Row, TiePolicy
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.data.samples import Sample, digest
from client.errors import JudgeError
from client.judge import AsyncJudge
from client.runs.config import TEMPLATES, judge_identity, template_digests, without_digests
from client.runs.progress import progress_bar
from client.runs.resumable import RunError
from client.runtime.cli import fail, stderr_console, stdout_console
from client.runtime.files import write_whole
from client.runtime.parser import Parser
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE
from client.schema import ModelInfo, TemplatesResult
from client.transport.proxies import exempt_loopback

REPORT_FILE: Final = "report.html"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The flags of one run. Without `out`, the folder is named after the configuration."""

    data: DataOptions
    question: QuestionOptions
    judge: JudgeOptions
    ties: TiePolicy
    out: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> RunOptions:
        """Raises ValueError for flags that cannot work, alone or together."""
        question, judge = QuestionOptions.of(args), JudgeOptions.of(args)
        if question.paper is not None and judge.mode == "pairwise":
            raise PlanError("the paper's prompts judge one answer at a time: use --mode pointwise")
        return cls(DataOptions.of(args), question, judge, args.ties, args.out)

    def described(self) -> dict[str, object]:
        """What the summary says was asked for, beyond the run's own configuration."""
        data, question = self.data, self.question
        given = {
            "data": data.source,
            "subsets": data.subsets,
            "limit": data.limit,
            "seed": data.seed,
            "ties": self.ties,
            "paper": None if question.paper is None else str(question.paper),
            "paper_format": question.paper_format,
            "paper_study": question.paper_study,
        }
        return {name: value for name, value in given.items() if value is not None}


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """A benchmark's `main`: the exit code is 0, 1 (too many failures, no judge), 2 (usage, bad input) or 130."""
    entry = BENCHMARKS[name]
    args = _run_parser(entry).parse_args(argv)

    def work() -> None:
        options = RunOptions.of(args)
        samples = options.data.samples(entry)
        plan = options.question.plan(entry, samples, options.data.seed)
        asyncio.run(_run_benchmark(entry, options, samples, plan))

    return exit_code_of(work)


def exit_code_of(work: Callable[[], None]) -> int:
    """Do the work of a command that asks a judge; its errors become a line on stderr and the exit code."""
    exempt_loopback()
    try:
        work()
    except (ValueError, ImportError) as error:  # includes DataError and PlanError
        return fail(error, USAGE)
    except (RunError, JudgeError) as error:
        return fail(error, FAILED)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on where this one stopped", INTERRUPTED)
    return OK


async def ready_model(judge: AsyncJudge) -> ModelInfo:
    """The model that will judge. Raises JudgeError at once if the service is unreachable or not ready."""
    await judge.ready()
    return (await judge.models()).data[0]


def run_config(
    entry: CatalogEntry,
    samples: Sequence[Sample],
    asking: Asking,
    info: ModelInfo,
    offered: TemplatesResult,
) -> dict[str, object]:
    """Everything that identifies a run: a rerun with the same configuration resumes it."""
    return {
        "benchmark": entry.benchmark.name,
        "data_digest": digest(samples),
        "samples": len(samples),
        **asking.described(),
        "judge": judge_identity(info),
        TEMPLATES: template_digests([*offered.templates, *offered.panels]),
    }


async def _run_benchmark(entry: CatalogEntry, options: RunOptions, samples: Sequence[Sample], plan: Plan) -> None:
    console, name = stderr_console(), entry.benchmark.name
    async with options.judge.client() as judge:
        info = await ready_model(judge)
        asking = options.judge.asking(*_suited_to(info.judge, options, plan))
        offered = await judge.templates()
        config = run_config(entry, samples, asking, info, offered)
        if info.judge == "self-reward":
            # Older services report in no other way whether grades are read off probabilities or written.
            config["asks_for"] = sorted({template.mode for template in offered.templates})
        folder = RunFolder(options.out or _default_folder(config), config)
        console.print(f"{name}: {len(samples)} samples, judge {info.id}, into {folder.path}")
        with progress_bar(console, name) as on_progress:
            rows = await judge_samples(judge, samples, asking, folder, on_progress)
    _write_results(entry, options, rows, samples, folder)


def _suited_to(judge: str, options: RunOptions, plan: Plan) -> tuple[Plan, Mode]:
    """The plan and mode for this kind of judge; raises PlanError for flags that it cannot follow."""
    flag = options.question.flag
    own: Mode = "pairwise" if judge == "pairwise" else "pointwise"
    mode = options.judge.mode or own
    if mode != own and judge != "yes-no":
        raise PlanError(f"the service's judge is {judge}, which judges {own}: leave --mode out")
    if flag == "paper" and (judge not in ("yes-no", "pairwise") or mode == "pairwise"):
        raise PlanError(
            f"the paper's prompts ask Yes or No about one answer, and the service's judge is {judge}, {mode}"
        )
    if judge == "reward-model" and flag:
        raise PlanError(f"the service's judge is {judge}, which takes no question: leave --{flag} out")
    if judge in ("self-reward", "reward-model") and flag is None:
        return one_for_all(plan, Question()), mode
    return plan, mode


def _default_folder(config: Mapping[str, object]) -> Path:
    """The same folder for the same configuration, so that a repeated command finds its run."""
    judge = config["judge"]
    model = judge.get("model", "judge") if isinstance(judge, dict) else "judge"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{config['benchmark']}-{model}").strip("-")
    # Digests are left out of the hash: a run with an edited template must meet the folder it contradicts and be
    # refused, and runs of versions without digests must be found.
    text = json.dumps(without_digests(config), sort_keys=True)
    return Path("runs") / f"{name}-{sha256(text.encode()).hexdigest()[:8]}"


def _write_results(
    entry: CatalogEntry, options: RunOptions, rows: Sequence[Row], samples: Sequence[Sample], folder: RunFolder
) -> None:
    """Write summary.json and report.html, and print the table."""
    config = {**folder.config, **options.described()}
    summary = summarise(entry.benchmark, rows, config=config, ties=options.ties)
    write_whole(folder.path / SUMMARY_FILE, summary.model_dump_json(indent=2) + "\n")
    texts = {sample.id: sample for sample in samples}
    title = f"{entry.benchmark.name}: {model_name(summary.judge.model)}"
    write_report(folder.path / REPORT_FILE, summary, rows, texts, title=title)
    console = stdout_console()
    console.print(f"written: {folder.path / SUMMARY_FILE}, {folder.path / REPORT_FILE}", soft_wrap=True)
    print_summary(summary, console)


def _run_parser(entry: CatalogEntry) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"python -m client.benchmarks.{entry.benchmark.name}",
        description=entry.description,
        epilog="Results are written as they come; after an interruption the same command goes on where it stopped.",
    )
    official = f"; `hub` is {entry.hub_name}" if entry.hub_name else ""
    add_data_flags(
        parser,
        data_help=f"a file, or hub:NAME[@SPLIT] for a data set of the hub{official}",
        seed_help="seed of --limit and of shuffled prompts (default: 0)",
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/<benchmark>-<model>-<hash>)")
    parser.add_argument(
        "--ties", choices=get_args(TiePolicy), default="strict", help="a tie counts nothing (strict, official) or half"
    )
    add_question_flags(parser, paper=entry.paper_group is not None)
    add_asking_flags(parser, default_mode=None)
    return parser

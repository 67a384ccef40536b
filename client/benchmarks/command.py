"""What the commands rewardbench, rmbench and pairs have in common: flags -> samples, plan, run, summary, report."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from client.benchmarks import plan as plans
from client.benchmarks.data.samples import SampleError, choose, digest, load_hub
from client.benchmarks.plan import PaperGroup, PaperPrompts, PaperStudy, Plan, PlanError, Question
from client.benchmarks.results.records import REPORT_FILE, SUMMARY_FILE, Mode, Row, Sample, TiePolicy
from client.benchmarks.results.summary import print_table, summarise
from client.benchmarks.run import (
    TEMPLATES,
    Asking,
    Progress,
    RunError,
    RunFolder,
    judge_identity,
    judge_samples,
    template_digests,
    without_digests,
)
from client.benchmarks.standing import Benchmark
from client.bulk import BulkOptions
from client.errors import JudgeError
from client.judge import AsyncJudge
from client.runtime.cli import CALL_TIMEOUT, add_judge_flags, fail, stderr_console, stdout_console
from client.runtime.files import write_whole
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE
from client.schema import Format, ModelInfo, TemplateInfo, Truncation
from client.transport.proxies import exempt_loopback

if TYPE_CHECKING:
    from rich.console import Console

HUB: Final = "hub"


@dataclass(frozen=True, slots=True)
class Command:
    """One benchmark's command: its arithmetic, how its files are read, what it is called on the hub."""

    benchmark: Benchmark
    description: str
    load: Callable[[Path], list[Sample]]
    category_of: Callable[[str], str]
    hub_name: str | None = None
    paper_group: PaperGroup | None = None


NAMES: Final = ("rewardbench", "rmbench", "pairs")


def command_named(name: str) -> Command:
    """The command of one of NAMES."""
    module = import_module(f"client.benchmarks.{name}")
    command: Command = module.COMMAND
    return command


def run_command(command: Command, argv: Sequence[str] | None = None) -> int:
    """The command's `main`: the exit code is 0, 1 (too many failures, no judge), 2 (usage, bad input) or 130."""
    args = _parser(command).parse_args(argv)

    def work() -> None:
        console = stderr_console()
        samples = choose(load(command, args.data), args.subsets, args.limit, args.seed)
        plan = make_plan(command, args, samples)
        asyncio.run(_run(command, args, samples, plan, console))

    return exit_code_of(work)


def exit_code_of(work: Callable[[], None]) -> int:
    """Do the work of a command that asks a judge; what it raises becomes a line on stderr and the exit code."""
    exempt_loopback()
    try:
        work()
    except (ValueError, ImportError) as error:  # SampleError and PlanError among them
        return fail(error, USAGE)
    except (RunError, JudgeError) as error:
        return fail(error, FAILED)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on where this one stopped", INTERRUPTED)
    return OK


def load(command: Command, data: str) -> list[Sample]:
    """The samples of `--data`: a file, `hub` for the official data set, or `hub:NAME[@SPLIT]` for another."""
    if data != HUB and not data.startswith(f"{HUB}:"):
        return command.load(Path(data))
    name, _, split = data.removeprefix(HUB).removeprefix(":").partition("@")
    if not (name or command.hub_name):
        raise SampleError("this benchmark has no official data set: give --data hub:OWNER/NAME")
    return load_hub(name or command.hub_name or "", split or None)


def judge_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the judge is and how hard it may be pressed."""
    group = parser.add_argument_group("judge")
    add_judge_flags(group)
    group.add_argument("--batch-items", type=int, default=32, help="judgements in one call (default: 32)")
    group.add_argument("--concurrency", type=int, default=16, help="calls under way at most (default: 16)")
    group.add_argument(
        "--patience", type=float, default=300.0, help="seconds to wait for a judge out of reach (default: 300)"
    )
    group.add_argument(
        "--max-failures",
        type=float,
        default=0.02,
        help="share of samples that may fail before the run stops with exit code 1 (default: 0.02)",
    )


def asking_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how samples are put to the judge."""
    group = parser.add_argument_group("judging")
    group.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="pointwise",
        help="each answer by itself, or both in both orders; unset: as the service's judge does it, which is pairwise "
        "for the judge pairwise, else pointwise (in a search: pointwise)",
    )
    group.add_argument(
        "--truncation",
        choices=get_args(Truncation),
        default="error",
        help="what becomes of texts over the model's length: a counted failure (default), or cut, and flagged",
    )


def judge_client(args: argparse.Namespace) -> AsyncJudge:
    """The client that `judge_arguments` describe."""
    return AsyncJudge(args.judge_url, api_key=args.api_key, timeout=CALL_TIMEOUT)


def bulk_options(args: argparse.Namespace) -> BulkOptions:
    """The same for how hard the judge is pressed. Raises ValueError for numbers that cannot work."""
    if min(args.batch_items, args.concurrency) < 1 or args.patience < 0 or not 0 <= args.max_failures <= 1:
        raise ValueError("--batch-items and --concurrency are 1 or more, --patience 0 or more, --max-failures 0 to 1")
    return BulkOptions(batch_items=args.batch_items, max_in_flight=args.concurrency, patience=args.patience)


async def ready_model(judge: AsyncJudge) -> ModelInfo:
    """The model that will judge; raises JudgeError at once where the service is not there or not ready."""
    await judge.ready()
    return (await judge.models()).data[0]


def make_plan(command: Command, args: argparse.Namespace, samples: Sequence[Sample]) -> Plan:
    """The questions that the flags ask for; raises PlanError."""
    subsets = list(dict.fromkeys(sample.subset for sample in samples))
    if args.category is not None:
        return plans.one_for_all(subsets, Question(category=args.category))
    if args.template is not None:
        return plans.one_for_all(subsets, Question(template=args.template))
    if args.map is not None:
        return plans.from_map(subsets, args.map)
    if args.paper is not None:
        if command.paper_group is None:
            raise PlanError("the paper has prompts for RewardBench and RM-Bench only")
        if args.mode == "pairwise":
            raise PlanError("the paper's prompts judge one answer at a time: use --mode pointwise")
        prompts = PaperPrompts.load(args.paper)
        return prompts.plan(subsets, command.paper_group, args.paper_format, args.paper_study, args.seed)
    return plans.by_category(subsets, command.category_of)


def suited(args: argparse.Namespace, plan: Plan, judge: str) -> tuple[Plan, Mode]:
    """The plan and the mode that suit the kind of judge which runs; raises PlanError for flags that it cannot follow.

    Where no question was asked for, judges that know no categories are asked in their own way.
    """
    asked = next((name for name in ("category", "template", "map", "paper") if getattr(args, name) is not None), None)
    own: Mode = "pairwise" if judge == "pairwise" else "pointwise"
    mode: Mode = args.mode or own
    if mode != own and judge != "yes-no":
        raise PlanError(f"the judge that runs there is {judge}, which judges {own}: leave --mode out")
    if asked == "paper" and (judge not in ("yes-no", "pairwise") or mode == "pairwise"):
        raise PlanError(f"the paper's prompts ask for Yes or No, and the judge that runs there is {judge}, {mode}")
    if judge == "reward-model" and asked:
        raise PlanError(f"the judge that runs there is {judge}, which takes no question: leave --{asked} out")
    if judge in ("self-reward", "reward-model") and asked is None:
        return plans.one_for_all(plan, Question()), mode
    return plan, mode


async def _run(
    command: Command, args: argparse.Namespace, samples: Sequence[Sample], plan: Plan, console: Console
) -> None:
    options = bulk_options(args)
    async with judge_client(args) as judge:
        info = await ready_model(judge)
        plan, mode = suited(args, plan, info.judge)
        asking = Asking(plan, mode, args.truncation, args.max_failures, options)
        templates = (await judge.templates()).templates
        config = run_config(command.benchmark, samples, asking, info, templates)
        if info.judge == "self-reward":
            # Older services tell in no other way grades that are read off probabilities from those that are written.
            config["asks_for"] = sorted({template.mode for template in templates})
        folder = RunFolder(args.out or default_folder(config), config)
        console.print(f"{command.benchmark.name}: {len(samples)} samples, judge {info.id}, into {folder.path}")
        with progress_bar(console, command.benchmark.name) as on_progress:
            rows = await judge_samples(judge, samples, asking, folder, on_progress)
    finish(command.benchmark, rows, samples, folder, _told(args))


def run_config(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    asking: Asking,
    info: ModelInfo,
    templates: Sequence[TemplateInfo],
) -> dict[str, object]:
    """What makes a run the same run."""
    return {
        "benchmark": benchmark.name,
        "data_digest": digest(samples),
        "samples": len(samples),
        **asking.described(),
        "judge": judge_identity(info),
        TEMPLATES: template_digests(templates),
    }


def default_folder(config: Mapping[str, object]) -> Path:
    """The same for the same run, so that a rerun of the same command finds what is there."""
    judge = config["judge"]
    model = judge.get("model", "judge") if isinstance(judge, dict) else "judge"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{config['benchmark']}-{model}").strip("-")
    # Without digests: a changed template is to meet the run that it contradicts, and older runs are to be found.
    told = json.dumps(without_digests(config), sort_keys=True)
    return Path("runs") / f"{name}-{sha256(told.encode()).hexdigest()[:8]}"


def finish(
    benchmark: Benchmark, rows: Sequence[Row], samples: Sequence[Sample], folder: RunFolder, told: Mapping[str, object]
) -> None:
    """Write summary.json and report.html, print the table. `told` is what was asked for beyond the configuration."""
    from client.benchmarks.report.html import write_report

    ties: TiePolicy = "half" if told.get("ties") == "half" else "strict"
    summary = summarise(benchmark, rows, config={**folder.config, **told}, ties=ties)
    write_whole(folder.path / SUMMARY_FILE, summary.model_dump_json(indent=2) + "\n")
    texts = {sample.id: sample for sample in samples}
    write_report(folder.path / REPORT_FILE, summary, rows, texts, title=f"{benchmark.name}: {summary.judge.model}")
    console = stdout_console()
    print_table(summary, console)
    console.print(f"written: {folder.path / SUMMARY_FILE}, {folder.path / REPORT_FILE}", soft_wrap=True)


def progress_bar(console: Console, title: str) -> AbstractContextManager[Callable[[Progress], None]]:
    """See client.benchmarks.progress; imported late, as rich is an extra."""
    from client.benchmarks.progress import shown

    return shown(console, title)


def _told(args: argparse.Namespace) -> dict[str, object]:
    names = ("data", "subsets", "limit", "seed", "ties", "paper", "paper_format", "paper_study")
    given = {name: getattr(args, name) for name in names}
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in given.items() if value is not None
    }


def _parser(command: Command) -> argparse.ArgumentParser:
    name = command.benchmark.name
    parser = argparse.ArgumentParser(
        prog=f"python -m client.benchmarks.{name}",
        description=command.description,
        epilog="Results are written as they come; after an interruption the same command goes on where it stopped.",
    )
    official = f"; `hub` is {command.hub_name}" if command.hub_name else ""
    parser.add_argument(
        "--data", required=True, metavar="FILE|hub", help=f"a file, or hub:NAME[@SPLIT] for a data set{official}"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/<benchmark>-<model>-<hash>)")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="only these subsets; patterns with * are fine")
    parser.add_argument("--limit", type=int, help="so many samples, in proportion from every subset")
    parser.add_argument("--seed", type=int, default=0, help="of --limit and of shuffled prompts (default: 0)")
    parser.add_argument(
        "--ties", choices=get_args(TiePolicy), default="strict", help="what a tie counts: nothing (official) or half"
    )
    asking_arguments(parser)
    # Unset: as the judge does it.
    parser.set_defaults(mode=None)
    _question_arguments(parser, command)
    judge_arguments(parser)
    return parser


def _question_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    group = parser.add_argument_group(
        "question",
        "What the judge is asked; by default each subset's category's built-in template, and of judges that have none "
        "(self-reward, reward-model) nothing in particular.",
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument("--category", help="this category for everything")
    one.add_argument("--template", help="this template for everything, e.g. general@1")
    one.add_argument(
        "--map", type=Path, metavar="FILE", help='JSON: {"subset or pattern": {"category": …} or {"template": …}}'
    )
    one.add_argument("--paper", type=Path, metavar="FILE", help="the paper's prompts, from their authors' JSON file")
    if command.paper_group is None:
        parser.set_defaults(paper_format="raw", paper_study="own")
        return
    group.add_argument(
        "--paper-format",
        choices=get_args(Format),
        default="raw",
        help="the paper's prompts as raw text (as published; default), or through the model's chat template",
    )
    group.add_argument(
        "--paper-study",
        choices=get_args(PaperStudy),
        default="own",
        help="each subset its own prompt (default), prompts shuffled over the subsets, or the same one for all",
    )

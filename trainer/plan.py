"""What a run would do and cost (--dry-run), without asking, loading or writing anything.

Counts that depend on what the models say are upper bounds. Times come from the rates that an earlier run on this
machine measured (trainer/run/rates.py); without any, no time is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TextIO

from client.data.sources import HUB
from trainer.config import LoopSettings
from trainer.instructions.categories import DESCRIPTIONS, EXAMPLES
from trainer.instructions.reading import read_instructions
from trainer.instructions.selection import POOL_FACTOR
from trainer.labels.labelers import IPO, shown_url
from trainer.policy.models import local_folder
from trainer.run.model_files import ModelSize, model_size
from trainer.run.rates import rates_of_run

_BF16, _FP32 = 2, 4


@dataclass(frozen=True, slots=True)
class Work:
    """One stage over all rounds: at most `amount` units, at the rate of that name."""

    stage: str
    amount: int
    unit: str
    rate: str


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions to train on and to evaluate on, and questions to the judge about missing categories."""

    chosen: int
    category_questions: int
    held_out: int


def write_plan(settings: LoopSettings, out: TextIO) -> None:
    """Write the plan as plain text. Raises DataError if the instructions cannot be read."""
    counts = _counts(settings)
    work = _work_lines(settings, counts, _known_rates(settings))
    out.write("\n".join([*_settings_lines(settings, counts), "", *work, "", _disk_line(settings), ""]))


def plan_work(settings: LoopSettings, counts: Counts) -> list[Work]:
    """The work of each stage that has any, at most."""
    rounds, sampling = settings.rounds, settings.sampling
    samples = rounds * counts.chosen * sampling.samples
    sampled = samples if settings.samples_from is None else samples - counts.chosen * sampling.samples
    train = math.floor(counts.chosen * (1 - settings.dpo_held_out))
    # The base answers once, each round's model once.
    answers = counts.held_out * (rounds + (settings.samples_from is None))
    work = [
        Work("categories", counts.category_questions, "judgements", "labelling"),
        Work("sampling", sampled * sampling.max_new_tokens, "tokens", "sampling"),
        Work("labelling", samples if settings.labels.asks_judge else 0, "judgements", "labelling"),
        Work("judge's reliability", rounds * _reliability_questions(settings, counts), "judgements", "labelling"),
        Work("DPO", math.ceil(rounds * train * settings.dpo.epochs), "pairs", "training"),
        Work("held-out answers", answers * sampling.max_new_tokens, "tokens", "answering"),
        Work("comparing", 4 * rounds * counts.held_out, "judgements", "comparing"),
    ]
    return [stage for stage in work if stage.amount]


def _reliability_questions(settings: LoopSettings, counts: Counts) -> int:
    """A round's: pairs in both orders, and the samples that a second wording judges."""
    if settings.labels.labeler != IPO:
        return 0
    options = settings.reliability
    measured = min(options.reliability_pairs, counts.chosen)
    reworded = counts.chosen if options.reliable_pairs else measured
    return 2 * measured + reworded * settings.sampling.samples


def steps_of(settings: LoopSettings, counts: Counts) -> int:
    """DPO's optimizer steps per round if every instruction gives a pair."""
    train = counts.chosen - round(settings.dpo_held_out * counts.chosen)
    return max(1, math.ceil(math.ceil(train / settings.dpo.batch) * settings.dpo.epochs))


def _counts(settings: LoopSettings) -> Counts | None:
    """None for a data set of the hub without --count: its size is not known before it is downloaded."""
    options = settings.instructions
    if options.source.startswith(HUB):
        if options.limit is None:
            return None
        return Counts(options.limit, 0, options.held_out)
    source = read_instructions(options.source, skip_bad=options.skip_bad)
    total = len(source.instructions)
    chosen = total - options.held_out if options.limit is None else min(options.limit, total - options.held_out)
    uncategorised = sum(options.recategorise or not record.categorised for record in source.instructions)
    if options.limit is not None:
        uncategorised = min(uncategorised, POOL_FACTOR * (options.limit + options.held_out))
    examples = sum(map(len, EXAMPLES.values())) if uncategorised else 0
    return Counts(max(0, chosen), len(DESCRIPTIONS) * (uncategorised + examples), options.held_out)


def _known_rates(settings: LoopSettings) -> dict[str, float]:
    folders = (settings.output, settings.samples_from, settings.rates_from)
    rates: dict[str, float] = {}
    for folder in folders:
        if folder is not None and folder.is_dir():
            rates.update(rates_of_run(folder))
    return rates


def _settings_lines(settings: LoopSettings, counts: Counts | None) -> list[str]:
    sampling, dpo = settings.sampling, settings.dpo
    judge = settings.command or shown_url(settings.judge)
    referee = shown_url(settings.eval_judge) if settings.eval_judge else judge
    lines = [
        f"policy        {settings.model}",
        f"output        {settings.output}",
        f"rounds        {settings.rounds}",
        f"instructions  {settings.instructions.source}: {_counts_shown(counts)}",
        f"samples       {sampling.samples} each, temperature {sampling.temperature:g}, "
        f"{sampling.max_new_tokens} new tokens at most"
        + (f", the first round's from {settings.samples_from}" if settings.samples_from else ""),
        f"labels        {settings.labels.labeler}{_labels_shown(settings, judge)}",
        f"pairs         best against {settings.pairs.rejected}, margin of {settings.pairs.min_margin:g} or more, "
        f"cut-off responses: {settings.pairs.cut_off}"
        + (", reliable ones only" if settings.reliability.reliable_pairs else ""),
        f"DPO           {dpo.method}, loss {dpo.loss}, lr {dpo.lr:g}, beta {dpo.beta:g}, batch {dpo.batch}, "
        f"epochs {dpo.epochs:g}" + (f": at most {steps_of(settings, counts)} steps a round" if counts else ""),
        f"evaluation    {referee if settings.evaluates else 'none'}",
    ]
    if settings.sft_data is not None:
        lines.append(f"SFT           on {settings.sft_data} before the first round")
    return lines


def _labels_shown(settings: LoopSettings, judge: str) -> str:
    if settings.labels.labels_from is not None:
        return f" {settings.labels.labels_from}"
    return f" by {judge}" if settings.labels.asks_judge else ""


def _counts_shown(counts: Counts | None) -> str:
    if counts is None:
        return "as many as there are (give --count for an estimate)"
    return f"{counts.chosen} to train on, {counts.held_out} held out"


def _work_lines(settings: LoopSettings, counts: Counts | None, rates: dict[str, float]) -> list[str]:
    if counts is None:
        return []
    lines, total, known = [], 0.0, True
    for work in plan_work(settings, counts):
        rate = rates.get(work.rate)
        time = "no time known" if rate is None else f"{_clock(work.amount / rate)} at {rate:.1f}/s"
        total += 0.0 if rate is None else work.amount / rate
        known = known and rate is not None
        lines.append(f"{work.stage:<20}at most {work.amount:>12,} {work.unit:<11} {time}")
    if not rates:
        return [*lines, "no time: no earlier run here has measured rates (--rates-from DIR)"]
    return [*lines, f"{'together':<20}{_clock(total)} at most" + ("" if known else ", not counting unknown times")]


def _disk_line(settings: LoopSettings) -> str:
    folder = local_folder(settings.model)
    size = None if folder is None else model_size(folder)
    if size is None:
        return "disk          unknown: the model is not in a folder here"
    merged, trained, checkpoint = disk_bytes(settings, size)
    return (
        f"disk          {size.parameters:,} parameters; each round keeps {_size(merged)} of merged model and "
        f"{_size(trained)} of training result, and needs {_size(checkpoint)} more while it trains"
    )


def disk_bytes(settings: LoopSettings, size: ModelSize) -> tuple[int, int, int]:
    """Bytes per round: the merged model, what DPO leaves, and its two checkpoints with AdamW's two moments."""
    width = _FP32 if settings.merge_dtype == "float32" else _BF16
    tuned = size.parameters if settings.dpo.method == "full" else size.lora_parameters(settings.dpo.rank)
    return width * size.parameters, _FP32 * tuned, 2 * 3 * _FP32 * tuned


def _clock(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

"""A run as one self-contained HTML page: what was asked, what each round did, whether the model got better.

Texts on it are untrusted: the template escapes them, and long ones are cut. The same run gives the same bytes, and a
page that would not change is not written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.benchmarks.report.page import render_page
from client.benchmarks.rows import ITEMS_FILE, read_rows
from client.data.sources import HUB
from client.labels.records import Pair, PairStats
from trainer.evaluation.metrics import Metrics
from trainer.evaluation.tasks.report import checked_tasks_section
from trainer.evaluation.verdicts import make_duels
from trainer.evaluation.winrate import WinRate
from trainer.labels.reliability import RELIABILITY_FILE, Reliability
from trainer.policy.models import needs_trainer
from trainer.report.evidence import AnswerPair, conclusions, shown_answers
from trainer.run.files import read_record, read_records, write_whole
from trainer.run.records import (
    CONFIG_FILE,
    HELD_OUT_FILE,
    INSTRUCTIONS_STATS_FILE,
    MERGED_FOLDER,
    METRICS_FILE,
    PAIRS_FILE,
    PAIRS_STATS_FILE,
    REPORT_FILE,
    Instruction,
    Sample,
)
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.dpo import DPO
from trainer.tuning.rounding import MERGE_FILE


@dataclass(frozen=True, slots=True)
class RoundView:
    """What the page shows of a round; None or empty for what has not been reached yet."""

    number: int
    stats: PairStats | None
    dpo: Mapping[str, Any] | None
    merge: Mapping[str, Any] | None
    metrics: Metrics | None
    figures: Mapping[str, Any]
    texts: Mapping[str, Sequence[AnswerPair]]
    reliability: Reliability | None = None
    conclusions: Sequence[str] = ()
    steps: Sequence[Mapping[str, Any]] = ()
    problems: Sequence[tuple[str, int]] = field(default_factory=tuple)


def write_run_report(folder: Path) -> Path:
    """Write `folder`/report.html from what the run has written so far. Raises RecordError, ImportError."""
    rounds = [round_view(folder, part) for part in _round_folders(folder)]
    with needs_trainer():
        from trainer.report import figures
    config = _json(folder / CONFIG_FILE) or {}
    rates = {f"round {view.number}": view.metrics.pairwise for view in rounds if view.metrics and view.metrics.pairwise}
    page = render_page(
        "report.html.j2",
        package="trainer.report",
        title=f"Self-improvement of {_model_name(config.get('model'))}",
        rounds=rounds,
        checked_tasks_section=checked_tasks_section,
        instructions=_instructions(folder),
        overview=_safe(figures.win_rates("overview", rates)),
        labeler=(config.get("labels") or {}).get("labeler"),
        config=json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False),
    )
    return _write_if_changed(folder / REPORT_FILE, page.encode("utf-8", "replace"))


def write_card(folder: Path, name: str, base: str) -> None:
    """Write the model card of `folder`/merged with the numbers that the round has by now."""
    files = (PAIRS_STATS_FILE, DPO.file, MERGE_FILE, METRICS_FILE)
    tables = {file.removesuffix(".json"): _json(folder / file) for file in files}
    card = model_card(name, base, {title: numbers for title, numbers in tables.items() if numbers is not None})
    _write_if_changed(folder / MERGED_FOLDER / CARD_FILE, card.encode())


def _write_if_changed(path: Path, data: bytes) -> Path:
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data)
    return path


def round_view(run: Path, folder: Path) -> RoundView:
    """A round as far as it went."""
    with needs_trainer():
        from trainer.report import figures
    stats = read_record(folder / PAIRS_STATS_FILE, PairStats) if (folder / PAIRS_STATS_FILE).exists() else None
    metrics = read_record(folder / METRICS_FILE, Metrics) if (folder / METRICS_FILE).exists() else None
    dpo = _json(folder / DPO.file)
    known = (folder / RELIABILITY_FILE).exists()
    reliability = read_record(folder / RELIABILITY_FILE, Reliability) if known else None
    log = [line for line in _lines(folder / DPO.log) if line.get("loss") is not None and "step" in line]
    return RoundView(
        number=_number(folder),
        stats=stats,
        dpo=dpo,
        merge=_json(folder / MERGE_FILE),
        metrics=metrics,
        figures=_figures(folder, stats, metrics),
        texts=_texts(run, folder) if metrics is not None else {},
        reliability=reliability,
        conclusions=conclusions(stats, metrics, reliability),
        steps=log if len(log) < figures.FEWEST_POINTS else [],
        problems=_problems(stats, dpo, metrics),
    )


def _figures(folder: Path, stats: PairStats | None, metrics: Metrics | None) -> dict[str, Any]:
    """SVG by name, safe in HTML; empty if there is nothing to show."""
    with needs_trainer():
        from client.labels.report import figures as pair_figures
        from trainer.report import figures
    mark, log = folder.name, _lines(folder / DPO.log)
    pairs = read_records(folder / PAIRS_FILE, Pair) if (folder / PAIRS_FILE).exists() else []
    differences = [len(pair.chosen[-1].content) - len(pair.rejected[-1].content) for pair in pairs]
    drawn = {
        "margins": pair_figures.margins(f"{mark}-margins", stats.margins) if stats is not None else "",
        "lengths": pair_figures.length_differences(f"{mark}-lengths", differences),
        "loss": figures.curves(f"{mark}-loss", "DPO loss", log, "loss"),
        "rewards": figures.curves(f"{mark}-rewards", "reward margin", log, "rewards/margins"),
        "accuracy": figures.curves(f"{mark}-accuracy", "share of pairs ranked right", log, "rewards/accuracies"),
        "rates": figures.win_rates(f"{mark}-rates", _rate_rows(metrics)) if metrics is not None else "",
    }
    return {name: _safe(svg) for name, svg in drawn.items()}


def _rate_rows(metrics: Metrics) -> dict[str, WinRate]:
    named = {"all": metrics.pairwise, "flips as ties": metrics.both_orders, "pointwise": metrics.pointwise}
    return {name: rate for name, rate in {**named, **metrics.by_category}.items() if rate is not None}


def _texts(run: Path, folder: Path) -> dict[str, list[AnswerPair]]:
    files = (run / "base.jsonl", folder / "new.jsonl", folder / "pairwise" / ITEMS_FILE, run / HELD_OUT_FILE)
    if not all(file.exists() for file in files):
        return {}
    base, new = (read_records(file, Sample) for file in files[:2])
    duels = make_duels(read_records(files[3], Instruction), base, new)
    return shown_answers(duels, {row.id: row for row in read_rows(files[2])})


def _problems(stats: PairStats | None, dpo: Mapping[str, Any] | None, metrics: Metrics | None) -> list[tuple[str, int]]:
    """What went wrong, and how often."""
    counts: list[tuple[str, int]] = []
    if stats is not None:
        counts += [(f"samples that could not be labelled: {code}", count) for code, count in stats.failures.items()]
        counts += [
            ("samples without a label", stats.unscored),
            ("empty samples", stats.empty),
            ("instructions with fewer than two usable samples", stats.too_few),
            ("instructions of which every sample is cut off", stats.unfinished),
            ("instructions whose samples tie", stats.ties),
            ("instructions below the minimum margin", stats.below_margin),
            ("instructions without a reliable pair", stats.unreliable),
        ]
    if dpo is not None:
        counts.append(("pairs that the chat template renders otherwise than they were sampled", dpo.get("unlike", 0)))
    if metrics is not None:
        counts += [
            (f"comparisons that failed ({mode}): {code}", count)
            for mode, codes in metrics.failures.items()
            for code, count in codes.items()
        ]
        counts += [
            ("held-out instructions with an empty answer", metrics.empty),
            ("held-out instructions without an answer", metrics.missing),
        ]
    return [(what, count) for what, count in counts if count]


def _instructions(folder: Path) -> dict[str, Any] | None:
    """The statistics of the instructions; a source in a file by the file's name."""
    stats = _json(folder / INSTRUCTIONS_STATS_FILE)
    return None if stats is None else {**stats, "source": _file_name(stats.get("source"))}


def _model_name(given: object) -> str:
    """A model for a title: a hub id or a known name as it is, a folder by its last part."""
    name = str(given or "a model")
    return _file_name(name) if name.count("/") != 1 or Path(name).expanduser().is_dir() else name


def _file_name(given: object) -> str:
    name = str(given or "")
    return name if name.startswith(HUB) else Path(name).name or name


def _safe(svg: str) -> Any:
    """Markup that the template does not escape: the figures have escaped the texts in them."""
    from markupsafe import Markup

    return Markup(svg)


def _round_folders(folder: Path) -> list[Path]:
    parts = [part for part in folder.glob("round-*") if part.name.removeprefix("round-").isdigit()]
    return sorted(parts, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))


def _json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None if it is missing or broken: the page shows what there is."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except (OSError, ValueError):
        return []

"""A run as one HTML page that needs nothing else: no network, no scripts, figures inside. Needs `benchmarks` packages.

Texts on it are untrusted: the template escapes all of them, and long ones are cut where the reader sees it. The same
run gives the same bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client import stats
from client.benchmarks.results.numbers import Summary
from client.benchmarks.results.records import Row, Sample
from client.benchmarks.results.summary import answer_probabilities, confidences, length_differences
from client.runtime.extras import needs
from client.runtime.files import write_whole

WORST: Final = 50
MAX_TEXT: Final = 6000


@dataclass(frozen=True, slots=True)
class Misjudgement:
    """The pair of a sample that the judge got most wrong; texts are None where the sample is not known."""

    id: str
    subset: str
    margin: float
    template: str | None
    chosen_log_odds: float
    rejected_log_odds: float
    prompt: str | None
    chosen: str | None
    rejected: str | None


def write_report(
    path: Path, summary: Summary, rows: Sequence[Row], samples: Mapping[str, Sample] | None, *, title: str
) -> None:
    """Write the page of a run. Without `samples` it has no texts, and says so. Raises OSError, ImportError."""
    judged = sorted((row for row in rows if row.error is None), key=lambda row: row.id)
    with needs("benchmarks"):
        from client.benchmarks.report.table import by_section, levels, style_names
    context = {
        "summary": summary,
        "figures": _figures(summary, judged),
        "groups": by_section(summary),
        "style_names": style_names,
        "levels": levels,
        "misjudged": misjudgements(judged, samples or {}),
        "texts_known": samples is not None,
        "command": _command(summary),
        "config": json.dumps(summary.config, indent=2, ensure_ascii=False, default=str),
    }
    write_whole(path, render("report.html.j2", title=title, **context))


def render(template: str, **context: Any) -> str:
    """One of this package's templates, filled; everything is escaped but Markup."""
    with needs("benchmarks"):
        from jinja2 import Environment, PackageLoader, StrictUndefined

        from client.benchmarks.report.table import percent
    environment = Environment(
        loader=PackageLoader("client.benchmarks", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, signed=signed, p_value=p_value)
    return environment.get_template(template).render(**context)


def signed(share: float | None) -> str:
    """A difference of shares in points of 100, with its sign; a dash where there is none."""
    return "-" if share is None else f"{100 * share:+.1f}"


def p_value(p: float | None) -> str:
    """A p-value with three decimals, a small one as what it is below; a dash where there is none."""
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def misjudgements(judged: Iterable[Row], samples: Mapping[str, Sample]) -> list[Misjudgement]:
    """The samples with the most negative margin, worst first, at most `WORST`."""
    worst = sorted((min(_cells(row)), row.id, row) for row in judged if min(_cells(row))[0] < 0)
    return [_misjudgement(row, cell, samples.get(row.id)) for cell, _, row in worst[:WORST]]


def cut(text: str) -> str:
    """The text, or its first `MAX_TEXT` characters and how many are left out."""
    left = len(text) - MAX_TEXT
    return text if left <= 0 else f"{text[:MAX_TEXT]}\n[… {left:,} more characters]"


def _cells(row: Row) -> list[tuple[float, int, int]]:
    """Margin and the places of its two answers."""
    return [(margin, i, j) for i, line in enumerate(row.margins or []) for j, margin in enumerate(line)]


def _misjudgement(row: Row, cell: tuple[float, int, int], sample: Sample | None) -> Misjudgement:
    margin, good, bad = cell
    return Misjudgement(
        id=row.id,
        subset=row.subset,
        margin=margin,
        template=row.template,
        chosen_log_odds=row.chosen_answers[good].log_odds,
        rejected_log_odds=row.rejected_answers[bad].log_odds,
        prompt=None if sample is None else cut(_prompt(sample)),
        chosen=None if sample is None else cut(sample.chosen[good]),
        rejected=None if sample is None else cut(sample.rejected[bad]),
    )


def _prompt(sample: Sample) -> str:
    if isinstance(sample.prompt, str):
        return sample.prompt
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in sample.prompt)


def _figures(summary: Summary, judged: Sequence[Row]) -> dict[str, Any]:
    """SVG by name, already safe in HTML; empty where there is nothing to show."""
    with needs("benchmarks"):
        from markupsafe import Markup

        from client.benchmarks.report import figures
    chosen = [answer.log_odds for row in judged for answer in row.chosen_answers]
    rejected = [answer.log_odds for row in judged for answer in row.rejected_answers]
    drawn = {
        "bars": figures.subset_bars(summary.subsets),
        "scores": figures.score_histogram(chosen, rejected),
        "pairs": figures.reliability("pairs", "Confidence in pairs", stats.reliability_bins(*confidences(judged)), 0.5),
        "answers": "",
        "length": figures.length_accuracy(length_differences(judged, summary.ties)),
    }
    if (answers := answer_probabilities(judged)) is not None:
        bins = stats.reliability_bins(answers.probabilities, answers.outcomes)
        drawn["answers"] = figures.reliability("answers", "Answers", bins, 0.0)
    # Safe: figures.py escapes what it is given.
    return {name: Markup(svg) for name, svg in drawn.items()}


def _command(summary: Summary) -> str:
    """The command that asks the same questions of the same samples, as far as the configuration tells."""
    config = summary.config
    words = ["python", "-m", f"client.benchmarks.{summary.benchmark}", "--data", str(config.get("data", "FILE"))]
    words += ["--map", "questions.json", "--ties", summary.ties]
    for name in ("mode", "truncation", "limit", "seed"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    if isinstance(subsets := config.get("subsets"), list):
        words += ["--subsets", *map(str, subsets)]
    return shlex.join(words)

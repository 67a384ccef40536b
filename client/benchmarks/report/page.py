"""A run as one self-contained HTML page: no network, no scripts, figures inline. Needs the extra `benchmarks`.

Texts on it are untrusted: the templates escape all of them, and long ones are visibly cut. The same run gives the same
bytes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client import stats
from client.benchmarks.report.formats import (
    by_section,
    caveats,
    cut_text,
    interval_text,
    levels,
    p_value,
    percent,
    signed,
    style_names,
    verdict,
)
from client.benchmarks.results.summarise import answer_probabilities, confidences, length_differences
from client.benchmarks.results.summary import Summary
from client.benchmarks.rows import Row, judged_rows
from client.data.samples import Sample
from client.runtime.extras import needs
from client.runtime.files import write_whole

WORST: Final = 50
MAX_TEXT: Final = 6000
# With fewer judged samples only scores are drawn: shares over less say nothing.
FEW: Final = 20


@dataclass(frozen=True, slots=True)
class Misjudgement:
    """The pair of a sample that the judge got most wrong; texts are None if the sample is unknown."""

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
    judged = sorted(judged_rows(rows), key=lambda row: row.id)
    context: dict[str, Any] = {
        "summary": summary,
        "figures": _figures(summary, judged),
        "verdict": verdict(summary),
        "caveats": list(caveats(summary)),
        "groups": by_section(summary),
        "style_names": style_names,
        "levels": levels,
        "interval_text": interval_text,
        "misjudged": misjudgements(judged, samples or {}),
        "few": FEW if len(judged) < FEW else 0,
        "texts_known": samples is not None,
        "command": _command(summary),
        "config": json.dumps(summary.config, indent=2, ensure_ascii=False, default=str),
    }
    write_whole(path, render_page("report.html.j2", title=title, **context))


def render_page(template: str, *, package: str = "client.benchmarks.report", **context: Any) -> str:
    """A template of `package`, filled in; it may extend page.html.j2. Everything but Markup is escaped."""
    with needs("benchmarks"):
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("client.benchmarks.report", "")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, signed=signed, p_value=p_value)
    return environment.get_template(template).render(**context)


def misjudgements(judged: Iterable[Row], samples: Mapping[str, Sample]) -> list[Misjudgement]:
    """The samples with the most negative margins, worst first, at most `WORST`."""
    worst = sorted((min(_cells(row)), row.id, row) for row in judged if min(_cells(row))[0] < 0)
    return [_misjudgement(row, cell, samples.get(row.id)) for cell, _, row in worst[:WORST]]


def _cells(row: Row) -> list[tuple[float, int, int]]:
    """Each margin with the indices of its chosen and its rejected answer."""
    return [(margin, i, j) for i, line in enumerate(row.margin_table) for j, margin in enumerate(line)]


def _misjudgement(row: Row, cell: tuple[float, int, int], sample: Sample | None) -> Misjudgement:
    margin, good, bad = cell
    texts: tuple[str | None, ...] = (None, None, None)
    if sample is not None:
        texts = (_prompt_text(sample), sample.chosen[good], sample.rejected[bad])
    prompt, chosen, rejected = (None if text is None else cut_text(text, MAX_TEXT) for text in texts)
    return Misjudgement(
        id=row.id,
        subset=row.subset,
        margin=margin,
        template=row.template,
        chosen_log_odds=row.chosen_answers[good].log_odds,
        rejected_log_odds=row.rejected_answers[bad].log_odds,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
    )


def _prompt_text(sample: Sample) -> str:
    if isinstance(sample.prompt, str):
        return sample.prompt
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in sample.prompt)


def _figures(summary: Summary, judged: Sequence[Row]) -> dict[str, Any]:
    """SVG by name, already safe in HTML; "" if there is nothing to show."""
    with needs("benchmarks"):
        from markupsafe import Markup

        from client.benchmarks.report import figures
    chosen = [answer.log_odds for row in judged for answer in row.chosen_answers]
    rejected = [answer.log_odds for row in judged for answer in row.rejected_answers]
    drawn = dict.fromkeys(("bars", "scores", "pairs", "answers", "length"), "")
    drawn["scores"] = figures.score_histogram(chosen, rejected)
    if len(summary.subsets) > 1:
        drawn["bars"] = figures.subset_bars(summary.subsets)
    if len(judged) >= FEW:
        bins = stats.reliability_bins(*confidences(judged))
        drawn["pairs"] = figures.reliability("pairs", "Confidence in pairs", bins, 0.5)
        drawn["length"] = figures.length_accuracy(length_differences(judged, summary.ties))
        if (answers := answer_probabilities(judged)) is not None:
            bins = stats.reliability_bins(answers.probabilities, answers.outcomes)
            drawn["answers"] = figures.reliability("answers", "Answers", bins, 0.0)
    # Safe: figures.py escapes every text it is given.
    return {name: Markup(svg) for name, svg in drawn.items()}


def _command(summary: Summary) -> str:
    """The command that asks the same questions of the same samples, as far as the configuration says."""
    config = summary.config
    words = ["python", "-m", f"client.benchmarks.{summary.benchmark}", "--data", str(config.get("data", "FILE"))]
    words += ["--map", "questions.json", "--ties", summary.ties]
    for name in ("mode", "truncation", "limit", "seed"):
        if config.get(name) is not None:
            words += [f"--{name}", str(config[name])]
    if isinstance(subsets := config.get("subsets"), list):
        words += ["--subsets", *map(str, subsets)]
    return shlex.join(words)

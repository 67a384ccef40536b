"""A judge's training as one self-contained HTML page: before against after, the curve, and what it still gets wrong.

Texts on it are untrusted: the template escapes them, and long ones are cut. The same run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client.benchmarks.report.formats import cut_text
from client.benchmarks.report.page import render_page
from trainer.policy.models import needs_trainer
from trainer.run.files import read_record, read_records, write_whole
from trainer.run.records import CONFIG_FILE, HELD_OUT_FILE, REPORT_FILE
from trainer.tuning.judge.evidence import Evidence
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.readings import Reading

WORST: Final = 30
MAX_TEXT: Final = 3000


@dataclass(frozen=True, slots=True)
class Mistake:
    """A label that the tuned judge gets wrong, by `off` log-odds; `before` is the base's value of the same."""

    label: Label
    template: str
    off: float
    before: float
    prompt: str
    answers: Sequence[str]


def write_judge_report(folder: Path) -> Path:
    """Write `folder`/report.html from the run's files. Raises RecordError, ImportError."""
    with needs_trainer():
        from markupsafe import Markup

        from trainer.report import judge_figures
    evidence = read_record(folder / "evidence.json", Evidence)
    curve = {int(count): Evidence.model_validate(point) for count, point in _json(folder / "curve.json").items()}
    training, config = _json(folder / "training.json"), _json(folder / CONFIG_FILE)
    figures = {
        "accuracy": judge_figures.shares("accuracy", _compared(evidence)),
        "loss": judge_figures.loss("loss", _lines(folder / "training.jsonl")),
        "curve": judge_figures.learning_curve("curve", curve, training.get("labels", 0), evidence),
    }
    page = render_page(
        "judge.html.j2",
        package="trainer.report",
        title=f"A judge made of {Path(training.get('base', 'a model')).name}",
        evidence=evidence,
        labels=_json(folder / "labels.json"),
        teacher=_json(folder / "teacher.json"),
        training=training,
        merge=_json(folder / "merge.json"),
        calibration=_json(folder / "calibration.json").get("templates", {}),
        curve=curve,
        mistakes=worst_mistakes(folder),
        figures={name: Markup(svg) for name, svg in figures.items()},
        config=json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False),
    )
    path = folder / REPORT_FILE
    data = page.encode("utf-8", "replace")
    if not path.exists() or path.read_bytes() != data:
        write_whole(path, data)
    return path


def worst_mistakes(folder: Path) -> list[Mistake]:
    """The labels held out that the tuned judge gets most wrong, the worst first."""
    labels = {label.id: label for label in read_records(folder / HELD_OUT_FILE, Label)}
    before = {reading.id: reading for reading in read_records(folder / "before.jsonl", Reading)}
    after = read_records(folder / "after.jsonl", Reading)
    wrong = sorted((reading for reading in after if reading.wrongness > 0), key=lambda r: (-r.wrongness, r.id))
    return [_mistake(labels[reading.id], before[reading.id], reading) for reading in wrong[:WORST]]


def _mistake(label: Label, before: Reading, after: Reading) -> Mistake:
    turns = [label.prompt] if isinstance(label.prompt, str) else [f"{m.role}: {m.content}" for m in label.prompt]
    return Mistake(
        label=label,
        template=after.template,
        off=after.wrongness,
        before=before.wrongness,
        prompt=cut_text("\n\n".join(turns), MAX_TEXT),
        answers=[cut_text(answer, MAX_TEXT) for answer in label.answers],
    )


def _compared(evidence: Evidence) -> dict[str, tuple[Any, Any]]:
    """Accuracy before and after, in all and by group."""
    before, after = evidence.before, evidence.after
    rows = {"all": (before.accuracy, after.accuracy)}
    for kind in ("by_category", "by_length", "by_kind"):
        first, second = getattr(before, kind), getattr(after, kind)
        rows.update({name: (first[name], second[name]) for name in second})
    return rows


def _json(path: Path) -> Mapping[str, Any]:
    """The object in the file; empty if there is none: the page shows what there is."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]

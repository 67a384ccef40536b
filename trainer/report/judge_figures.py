"""The figures of a judge's training, drawn like those of client/benchmarks/report. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from client.benchmarks.report.svg import BAD, GOOD, INK, short_name, svg_figure
from trainer.report.figures import curves
from trainer.tuning.judge.evidence import Evidence, Share


def shares(name: str, rows: Mapping[str, tuple[Share, Share]]) -> str:
    """Accuracy before and after in %, with 95% intervals, a row each."""

    def draw(axes: Axes) -> None:
        for index, (colour, label) in enumerate(((BAD, "before"), (GOOD, "after"))):
            points = [pair[index] for pair in rows.values()]
            values = [100 * point.value for point in points]
            errors = [
                [max(0.0, 100 * (point.value - point.low)) for point in points],
                [max(0.0, 100 * (point.high - point.value)) for point in points],
            ]
            places = [place + 0.3 * index - 0.15 for place in range(len(points))]
            axes.errorbar(
                values, places, xerr=errors, fmt="o", color=colour, ecolor=colour, markersize=5, capsize=3, label=label
            )
        axes.axvline(50, color=INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [short_name(title) for title in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("labels judged right, %")
        axes.grid(visible=False, axis="y")
        axes.legend()

    told = ", ".join(f"{title} {100 * one.value:.1f}% to {100 * two.value:.1f}%" for title, (one, two) in rows.items())
    return svg_figure(name, f"Accuracy before and after: {told}", draw, height=1.4 + 0.4 * len(rows))


def loss(name: str, log: Sequence[Mapping[str, Any]]) -> str:
    """The loss over the steps."""
    return curves(name, "loss", log, "loss")


def learning_curve(name: str, curve: Mapping[int, Evidence], labels: int, evidence: Evidence) -> str:
    """Accuracy by the number of labels, from none to all; "" without a curve."""
    if not curve:
        return ""
    points = {
        **{count: point.after.accuracy for count, point in sorted(curve.items())},
        labels: evidence.after.accuracy,
    }
    start = evidence.before.accuracy

    def draw(axes: Axes) -> None:
        counts, values = list(points), [100 * point.value for point in points.values()]
        lows = [100 * point.low for point in points.values()]
        highs = [100 * point.high for point in points.values()]
        axes.fill_between(counts, lows, highs, color=GOOD, alpha=0.15, linewidth=0)
        axes.plot(counts, values, color=GOOD, marker="o", markersize=4)
        axes.axhline(100 * start.value, color=BAD, linewidth=1.2, linestyle="--", label="before")
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labels")
        axes.set_ylabel("judged right, %")
        axes.legend()

    told = ", ".join(f"{count} labels {100 * point.value:.1f}%" for count, point in points.items())
    return svg_figure(name, f"Learning curve: before {100 * start.value:.1f}%, {told}", draw)

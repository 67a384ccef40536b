"""The figures of a run's report, drawn like those of client/benchmarks/report. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes

from client.benchmarks.report.svg import BAD, GOOD, INK, short_name, svg_figure
from trainer.evaluation.winrate import WinRate

# A curve of fewer points is a table.
FEWEST_POINTS: Final = 3


def win_rates(name: str, rates: Mapping[str, WinRate]) -> str:
    """Each win rate in % with its 95% interval; "" if there is none."""
    known = [
        (title, 100 * rate.value, 100 * rate.low, 100 * rate.high)
        for title, rate in rates.items()
        if rate.low is not None and rate.high is not None
    ]
    if not known:
        return ""

    def draw(axes: Axes) -> None:
        titles, values, lows, highs = zip(*known, strict=True)
        places = range(len(known))
        below = [max(0.0, value - low) for value, low in zip(values, lows, strict=True)]
        above = [max(0.0, high - value) for value, high in zip(values, highs, strict=True)]
        axes.errorbar(values, places, xerr=[below, above], fmt="o", color=GOOD, ecolor=GOOD, markersize=5, capsize=3)
        axes.axvline(50, color=INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(places, [short_name(title) for title in titles])
        axes.set_ylim(len(known) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("win rate over the base, %")
        axes.grid(visible=False, axis="y")

    description = ", ".join(f"{title} {value:.1f}%" for title, value, _, _ in known)
    return svg_figure(name, f"Win rates: {description}", draw, height=1.0 + 0.32 * len(known))


def curves(name: str, what: str, log: Sequence[Mapping[str, Any]], key: str) -> str:
    """A number of the training log over the steps, and its `eval_` counterpart on held-out pairs if there is one.

    "" for fewer than FEWEST_POINTS steps: the page has them as a table.
    """
    trained = _points(log, key)
    held_out = _points(log, f"eval_{key}")
    if len(trained) < FEWEST_POINTS:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(
            *zip(*trained, strict=True),
            color=GOOD,
            linewidth=1.4,
            marker="." if len(trained) < 20 else "",
            label="training",
        )
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=BAD, linewidth=1.4, marker="o", markersize=4, label="held out"
            )
            axes.legend()
        axes.set_xlabel("step")
        axes.set_ylabel(what)

    (_, first), (steps, last) = trained[0], trained[-1]
    return svg_figure(name, f"{what} over {steps} steps: from {first:.3f} to {last:.3f}", draw)


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Steps with their numbers; a number that was NaN is null, and left out."""
    return [(line["step"], line[key]) for line in log if line.get(key) is not None and "step" in line]

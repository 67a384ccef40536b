"""The report's figures, each as SVG (see svg.py), or "" if there is nothing to show. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from client.benchmarks.report.svg import BAD, GOOD, INK, inner_range, short_name, svg_figure
from client.benchmarks.results.summary import SubsetScore
from client.stats import Bin, mean, wilson

HISTOGRAM_BINS: Final = 40
# So few answers of either side are drawn one by one.
FEW_ANSWERS: Final = 60
LENGTH_BINS: Final = 8


def subset_bars(subsets: Mapping[str, SubsetScore]) -> str:
    """Accuracy of each judged subset with its 95% interval, and what chance would get."""
    judged = [
        (name, 100 * subset.accuracy, 100 * subset.low, 100 * subset.high, 100 * (subset.chance or 0.5))
        for name, subset in subsets.items()
        if subset.accuracy is not None and subset.low is not None and subset.high is not None
    ]
    if not judged:
        return ""

    def draw(axes: Axes) -> None:
        names, values, lows, highs, chances = zip(*judged, strict=True)
        places = range(len(judged))
        below = [value - low for value, low in zip(values, lows, strict=True)]
        above = [high - value for value, high in zip(values, highs, strict=True)]
        axes.barh(places, values, color=GOOD, height=0.62)
        axes.errorbar(values, places, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        axes.vlines(chances, [y - 0.5 for y in places], [y + 0.5 for y in places], INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(places, [short_name(name) for name in names])
        axes.set_ylim(len(judged) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, %")
        axes.grid(visible=False, axis="y")

    description = ", ".join(f"{name} {value:.1f}%" for name, value, _, _, _ in judged)
    return svg_figure("bars", f"Accuracy by subset: {description}", draw, height=1.0 + 0.27 * len(judged))


def score_histogram(chosen: Sequence[float], rejected: Sequence[float]) -> str:
    """How the log-odds of chosen and of rejected answers spread; the outermost 1% join the outer bars.

    Few answers are dots instead, each side on a line of its own with a stroke at its mean.
    """
    if not chosen or not rejected:
        return ""
    description = f"Log-odds of the answers: chosen {mean(chosen):.2f} on average, rejected {mean(rejected):.2f}"
    if max(len(chosen), len(rejected)) <= FEW_ANSWERS:
        return svg_figure("scores", description, lambda axes: _dots(axes, chosen, rejected), height=1.8)
    low, high = inner_range([*chosen, *rejected])

    def draw(axes: Axes) -> None:
        for side, colour, label in ((chosen, GOOD, "chosen"), (rejected, BAD, "rejected")):
            inside = [min(max(value, low), high) for value in side]
            axes.hist(inside, HISTOGRAM_BINS, range=(low, high), color=colour, alpha=0.55, label=label)
        axes.set_xlabel("log-odds of Yes")
        axes.set_ylabel("answers")
        axes.legend()

    return svg_figure("scores", description, draw)


def _dots(axes: Axes, chosen: Sequence[float], rejected: Sequence[float]) -> None:
    for place, (side, colour) in enumerate(((rejected, BAD), (chosen, GOOD))):
        axes.plot(side, [place] * len(side), "o", color=colour, alpha=0.55, markersize=6)
        axes.plot([mean(side)] * 2, [place - 0.3, place + 0.3], color=INK, linewidth=1.5)
    axes.set_yticks([0, 1], ["rejected", "chosen"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel("log-odds of Yes")
    axes.grid(visible=False, axis="y")


def reliability(name: str, what: str, bins: Sequence[Bin], range_from: float) -> str:
    """Mean outcome against mean probability in each bin, with its 95% interval, beside the ideal diagonal."""
    filled = [(b.probability, b.outcome, b.count) for b in bins if b.probability is not None and b.outcome is not None]
    if not filled:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot([range_from, 1], [range_from, 1], color=INK, linewidth=0.8, linestyle="--", label="ideal")
        _draw_points(axes, [p for p, _, _ in filled], [(outcome, count) for _, outcome, count in filled])
        axes.set_xlim(range_from - 0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("probability")
        axes.set_ylabel("observed share")

    description = "; ".join(f"at {p:.2f} {outcome:.2f} ({count})" for p, outcome, count in filled)
    return svg_figure(name, f"{what}, observed share at each probability (number): {description}", draw)


def length_accuracy(verdicts: Sequence[tuple[int, float]]) -> str:
    """Accuracy against how many characters the chosen answer is longer, in groups of about the same size."""
    if not verdicts:
        return ""
    groups = _equal_groups(sorted(verdicts))
    points = [(mean([difference for difference, _ in group]), [credit for _, credit in group]) for group in groups]

    def draw(axes: Axes) -> None:
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle="--")
        axes.axvline(0, color=INK, linewidth=0.8)
        _draw_points(axes, [x for x, _ in points], [(mean(values), len(values)) for _, values in points])
        axes.set_xscale("symlog", linthresh=100)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("characters that the chosen answer is longer by")
        axes.set_ylabel("accuracy")

    description = "; ".join(f"{x:+.0f} characters {mean(values):.2f}" for x, values in points)
    return svg_figure("length", f"Accuracy by difference in length: {description}", draw)


def _equal_groups(verdicts: Sequence[tuple[int, float]]) -> list[Sequence[tuple[int, float]]]:
    """Consecutive groups of about the same number; equal differences stay together."""
    size = math.ceil(len(verdicts) / LENGTH_BINS)
    groups: list[Sequence[tuple[int, float]]] = []
    start = 0
    while start < len(verdicts):
        end = min(start + size, len(verdicts))
        while end < len(verdicts) and verdicts[end][0] == verdicts[end - 1][0]:
            end += 1
        groups.append(verdicts[start:end])
        start = end
    return groups


def _draw_points(axes: Axes, xs: Sequence[float], shares: Iterable[tuple[float, int]]) -> None:
    rows = [(share, *wilson(min(share * count, count), count)) for share, count in shares]
    below = [max(0.0, share - low) for share, low, _ in rows]
    above = [max(0.0, high - share) for share, _, high in rows]
    ys = [share for share, _, _ in rows]
    axes.errorbar(xs, ys, yerr=[below, above], fmt="o-", color=GOOD, ecolor=GOOD, markersize=4, capsize=2)

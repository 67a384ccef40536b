"""The figures of pairs, drawn like those of client/benchmarks/report. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from client.benchmarks.report.svg import GOOD, INK, inner_range, svg_figure
from client.labels.records import Histogram
from client.stats import mean

LENGTH_BINS = 30


def margins(name: str, histogram: Histogram) -> str:
    """Pairs by their margin in log-odds."""
    if not histogram.counts:
        return ""

    def draw(axes: Axes) -> None:
        axes.stairs(histogram.counts, histogram.edges, fill=True, color=GOOD)
        axes.set_xlabel("margin, log-odds")
        axes.set_ylabel("pairs")

    return svg_figure(name, f"{sum(histogram.counts)} pairs by margin, up to {histogram.edges[-1]:.2f} log-odds", draw)


def length_differences(name: str, differences: Sequence[int]) -> str:
    """Pairs by how many characters longer the chosen response is; the outermost 1% join the outer bars."""
    if not differences:
        return ""
    low, high = inner_range(differences)

    def draw(axes: Axes) -> None:
        axes.hist([min(max(d, low), high) for d in differences], LENGTH_BINS, range=(low, high), color=GOOD)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("characters that the chosen response is longer by")
        axes.set_ylabel("pairs")

    return svg_figure(name, f"Length differences, {mean(differences):+.0f} characters on average", draw)

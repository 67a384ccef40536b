"""The report's figures as SVG to stand inside an HTML page. Needs matplotlib: import this where it is used.

The same data give the same bytes. Colours are the page's CSS variables, so figures follow its light and dark schemes.
"""

from __future__ import annotations

import html
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from client.benchmarks.results.numbers import SubsetScore
from client.stats import Bin, mean, quantile, wilson

# Drawn with these, then replaced: SVG's own colours cannot follow the page.
_INK, _FAINT, _GOOD, _BAD = "#010101", "#020202", "#030303", "#040404"
_COLOURS: Final = {_INK: "currentColor", _FAINT: "var(--line)", _GOOD: "var(--good)", _BAD: "var(--bad)"}
# Any: the stubs' list of keys differs between releases.
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "judge-as-api",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
HISTOGRAM_BINS: Final = 40
LENGTH_BINS: Final = 8


def subset_bars(subsets: Mapping[str, SubsetScore]) -> str:
    """Accuracy of each judged subset with its 95% interval; "" where there is none."""
    judged = [
        (name, 100 * subset.accuracy, 100 * subset.low, 100 * subset.high)
        for name, subset in subsets.items()
        if subset.accuracy is not None and subset.low is not None and subset.high is not None
    ]
    if not judged:
        return ""

    def draw(axes: Axes) -> None:
        names, values, lows, highs = zip(*judged, strict=True)
        places = range(len(judged))
        below = [value - low for value, low in zip(values, lows, strict=True)]
        above = [high - value for value, high in zip(values, highs, strict=True)]
        axes.barh(places, values, color=_GOOD, height=0.62)
        axes.errorbar(values, places, xerr=[below, above], fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
        axes.axvline(50, color=_INK, linewidth=0.8, linestyle="--")
        axes.set_yticks(places, [_short(name) for name in names])
        axes.set_ylim(len(judged) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, %")
        axes.grid(visible=False, axis="y")

    told = ", ".join(f"{name} {value:.1f}%" for name, value, _, _ in judged)
    return _svg("bars", f"Accuracy by subset: {told}", draw, height=1.0 + 0.27 * len(judged))


def score_histogram(chosen: Sequence[float], rejected: Sequence[float]) -> str:
    """How the log-odds of chosen and of rejected answers spread; the outermost 1% join the outer bars."""
    if not chosen or not rejected:
        return ""
    values = [*chosen, *rejected]
    low, high = quantile(values, 0.005), quantile(values, 0.995)
    if low == high:
        low, high = low - 1, high + 1

    def draw(axes: Axes) -> None:
        for side, colour, label in ((chosen, _GOOD, "chosen"), (rejected, _BAD, "rejected")):
            inside = [min(max(value, low), high) for value in side]
            axes.hist(inside, HISTOGRAM_BINS, range=(low, high), color=colour, alpha=0.55, label=label)
        axes.set_xlabel("log-odds of Yes")
        axes.set_ylabel("answers")
        axes.legend()

    told = f"Log-odds of the answers: chosen {mean(chosen):.2f} on average, rejected {mean(rejected):.2f}"
    return _svg("scores", told, draw)


def reliability(name: str, what: str, bins: Sequence[Bin], range_from: float) -> str:
    """Mean outcome against mean probability in each bin, with its 95% interval, beside the diagonal of the ideal."""
    filled = [(b.probability, b.outcome, b.count) for b in bins if b.probability is not None and b.outcome is not None]
    if not filled:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot([range_from, 1], [range_from, 1], color=_INK, linewidth=0.8, linestyle="--", label="ideal")
        _points(axes, [p for p, _, _ in filled], [(outcome, count) for _, outcome, count in filled])
        axes.set_xlim(range_from - 0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("probability")
        axes.set_ylabel("observed share")

    told = "; ".join(f"at {p:.2f} {outcome:.2f} ({count})" for p, outcome, count in filled)
    return _svg(name, f"{what}, observed share at each probability (number): {told}", draw)


def length_accuracy(verdicts: Sequence[tuple[int, float]]) -> str:
    """Accuracy against how many characters the chosen answer is longer, in bins of about equal number."""
    if not verdicts:
        return ""
    groups = _equal_groups(sorted(verdicts))
    points = [(mean([difference for difference, _ in group]), [credit for _, credit in group]) for group in groups]

    def draw(axes: Axes) -> None:
        axes.axhline(0.5, color=_INK, linewidth=0.8, linestyle="--")
        axes.axvline(0, color=_INK, linewidth=0.8)
        _points(axes, [x for x, _ in points], [(mean(values), len(values)) for _, values in points])
        axes.set_xscale("symlog", linthresh=100)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("characters that the chosen answer is longer by")
        axes.set_ylabel("accuracy")

    told = "; ".join(f"{x:+.0f} characters {mean(values):.2f}" for x, values in points)
    return _svg("length", f"Accuracy by difference in length: {told}", draw)


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


def _points(axes: Axes, xs: Sequence[float], shares: Iterable[tuple[float, int]]) -> None:
    rows = [(share, *wilson(min(share * count, count), count)) for share, count in shares]
    below = [max(0.0, share - low) for share, low, _ in rows]
    above = [max(0.0, high - share) for share, _, high in rows]
    ys = [share for share, _, _ in rows]
    axes.errorbar(xs, ys, yerr=[below, above], fmt="o-", color=_GOOD, ecolor=_GOOD, markersize=4, capsize=2)


def _svg(name: str, told: str, draw: Callable[[Axes], None], height: float = 3.4) -> str:
    """`name` keeps ids apart from those of other figures on the page; `told` is what a screen reader says."""
    with _style():
        figure = Figure(figsize=(5.6, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        out = StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(out.getvalue(), name, told)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # The page's fonts draw the text, not matplotlib's, which measures with a box what it has no glyph for.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _for_page(svg: str, name: str, told: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, replacement in _COLOURS.items():
        svg = svg.replace(colour, replacement)
    svg = re.sub(r"font-family: 'DejaVu Sans'[^;]*; ", "", svg)
    # The page's width rules, not the figure's points; the page's own fonts.
    svg = re.sub(r'<svg ([^>]*?)\bheight="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*" ', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(told)}" ', 1)


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"

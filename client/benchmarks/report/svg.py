"""SVG figures to stand inside an HTML page. Needs matplotlib: import this where it is used.

The same data give the same bytes. Colours are the page's CSS variables, so figures follow its light and dark schemes.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from client.stats import quantile

# Figures are drawn in these colours, which are then replaced: SVG's own colours cannot follow the page's scheme.
INK, FAINT, GOOD, BAD = "#010101", "#020202", "#030303", "#040404"
_COLOURS: Final = {INK: "currentColor", FAINT: "var(--line)", GOOD: "var(--good)", BAD: "var(--bad)"}
# Any: the type stubs' list of keys differs between matplotlib's releases.
_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "judge-as-api",
    "text.parse_math": False,
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def svg_figure(name: str, description: str, draw: Callable[[Axes], None], height: float = 3.4) -> str:
    """What `draw` draws, as an SVG element of this height in inches.

    `name` keeps its ids apart from those of other figures on the page; `description` is what a screen reader says.
    """
    with _figure_style():
        figure = Figure(figsize=(5.6, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        out = StringIO()
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(out.getvalue(), name, description)


def short_name(name: str, limit: int = 28) -> str:
    """The name, cut to `limit` characters for an axis."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def inner_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of a histogram without the outermost 1% of the values; never empty."""
    low, high = quantile(values, 0.005), quantile(values, 0.995)
    return (low, high) if low < high else (low - 1, high + 1)


@contextmanager
def _figure_style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Harmless: the page's fonts draw the text. Matplotlib only measures it, and uses a box for missing glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _for_page(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, replacement in _COLOURS.items():
        svg = svg.replace(colour, replacement)
    svg = re.sub(r"font-family: 'DejaVu Sans'[^;]*; ", "", svg)
    # The page sets the width, not the figure's size in points.
    svg = re.sub(r'<svg ([^>]*?)\bheight="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*" ', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)

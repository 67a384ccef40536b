"""A labelling as one self-contained HTML page, in the style of client/benchmarks/report.

Texts on it are untrusted: the template escapes them, and long ones are cut. The same labels give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from heapq import nlargest
from pathlib import Path
from typing import Any, Final

from client.benchmarks.report.formats import cut_text
from client.benchmarks.report.page import render_page
from client.labels.results import Labelled, flips
from client.runtime.extras import needs
from client.runtime.files import write_whole

REPORT_FILE: Final = "report.html"
EXAMPLES: Final = 12
MAX_TEXT: Final = 3000


def write_label_report(path: Path, labelled: Labelled, config: Mapping[str, Any], remarks: list[str]) -> None:
    """Write the page; `remarks` are sentences about the numbers. Raises OSError, ImportError."""
    stats = labelled.stats
    page = render_page(
        "labels.html.j2",
        package="client.labels.report",
        title=f"Labels by {config['judge']['model']}",
        stats=stats,
        remarks=remarks,
        figures=_figures(labelled),
        pairs=_widest(labelled),
        flips=_clearest_flips(labelled),
        config=json.dumps(config, indent=2, ensure_ascii=False),
    )
    write_whole(path, page.encode("utf-8", "replace"))


def _figures(labelled: Labelled) -> list[Any]:
    with needs("benchmarks"):
        from markupsafe import Markup

        from client.labels.report import figures
    differences = [pair.length_difference for pairs in labelled.pairs.values() for pair in pairs]
    drawn = (
        figures.margins("margins", labelled.stats.pairs.margins),
        figures.length_differences("lengths", differences),
    )
    # Safe: the figures hold numbers alone.
    return [Markup(svg) for svg in drawn if svg]


def _widest(labelled: Labelled) -> list[dict[str, Any]]:
    """The pairs with the widest margins."""
    prompts = {one.id: one for one in labelled.data.sets}
    pairs = ((name, pair) for name, of_prompt in labelled.pairs.items() for pair in of_prompt)
    return [
        _example(
            name, pair.margin, prompts[name].prompt_text, pair.chosen.sample.response, pair.rejected.sample.response
        )
        for name, pair in nlargest(EXAMPLES, pairs, key=lambda named: named[1].margin)
    ]


def _clearest_flips(labelled: Labelled) -> list[dict[str, Any]]:
    widest = nlargest(EXAMPLES, flips(labelled.data, labelled.scores), key=lambda flip: flip.margin)
    return [_example(flip.id, flip.margin, flip.prompt, flip.chosen, flip.rejected) for flip in widest]


def _example(name: str, margin: float, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"id": name, "margin": margin, **{side: cut_text(text, MAX_TEXT) for side, text in texts.items()}}

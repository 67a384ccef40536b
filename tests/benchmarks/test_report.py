"""The page of a run: complete, alone in the world, and safe with whatever the texts hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from client.benchmarks.report.formats import cut_text
from client.benchmarks.report.page import MAX_TEXT, WORST, misjudgements, write_report
from client.benchmarks.rows import Row
from client.data.samples import Sample
from client.schema import Message
from tests.support.html import EVIL, Page, assert_self_contained
from tests.support.rows import answer, failed, pair, pairs, summary_of


def report(
    folder: Path, rows: Sequence[Row], samples: dict[str, Sample] | None = None, benchmark: str = "pairs", **config: Any
) -> str:
    """The page's text."""
    path = folder / "report.html"
    write_report(path, summary_of(benchmark, rows, **config), rows, samples, title="A <run>")
    return path.read_text(encoding="utf-8")


def sample(name: str, prompt: str = "Why?", chosen: str = "Good.", rejected: str = "Bad.") -> Sample:
    """A pair with its texts."""
    return Sample(id=name, subset=name.split("/")[0], prompt=prompt, chosen=(chosen,), rejected=(rejected,))


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    """No scripts, no addresses to load from; references stay on the page, each to one id."""
    text = report(tmp_path, [*pairs("a", 8, 3), *pairs("b", 2, 9)], {"a/9": sample("a/9")})

    assert_self_contained(text)


def test_untrusted_texts_stay_text(tmp_path: Path) -> None:
    """Markup and template code in prompts, answers, ids, subsets, templates, codes and config are shown, not run."""
    row = pair(EVIL, 0, 1, subset=EVIL, template=EVIL, model=EVIL)
    broken = failed("b/0", EVIL)

    text = report(tmp_path, [row, broken], {EVIL: sample(EVIL, EVIL, EVIL, EVIL)}, data=EVIL)

    page = Page(text)
    assert not page.of("script") + page.of("img")
    assert "{{ 7*7 }}" in text
    assert page.open == []


def test_every_figure_says_what_it_shows(tmp_path: Path) -> None:
    """Five figures with an accessible name and a caption; colours follow the page's scheme."""
    rows = [*pairs("a", 28, 6), *pairs("b", 20, 20), pair("a/x", answer(1, length=99), 0)]
    page = Page(text := report(tmp_path, rows))

    figures = [attributes for attributes in page.of("svg") if attributes.get("role") == "img"]
    assert len(figures) == len(page.of("figcaption")) == len(page.of("svg")) == 5
    assert figures[0]["aria-label"] == "Accuracy by subset: a 82.9%, b 50.0%"
    assert not re.findall(r"#0[1-4]0[1-4]0[1-4]", text)
    assert "prefers-color-scheme: dark" in text


def test_table_headers_are_scoped(tmp_path: Path) -> None:
    """A screen reader can tell which row and column a number belongs to."""
    page = Page(report(tmp_path, [*pairs("hep-go", 2, 1), failed("hep-js/0")], benchmark="rewardbench"))

    headers = page.of("th")
    assert len(headers) > 10
    assert {header.get("scope") for header in headers} == {"col", "row", "rowgroup"}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    """No dates, no random ids, whatever the order of the rows."""
    rows = pairs("a", 8, 3)

    assert report(tmp_path, rows) == report(tmp_path, rows[::-1])


def test_the_numbers_are_there(tmp_path: Path) -> None:
    """The mean, a section, an interval, a failure's code, ECE and Brier."""
    text = report(tmp_path, [*pairs("a", 16, 4), failed("a/x")])

    for expected in ("80.0", "58.4 to 91.9", "context_length_exceeded", "ECE 0.0", "Brier 0.", "A &lt;run&gt;"):
        assert expected in text


def test_rmbench_matrices_are_tables(tmp_path: Path) -> None:
    """Three by three with their styles, and the means of their levels."""
    sides = {"chosen": [answer(0.0)] * 3, "rejected": [answer(0.0)] * 3}
    row = Row(id="chat/1", subset="chat", margins=[[1, -1, -1], [1, 1, -1], [1, 1, 1]], **sides)

    text = report(tmp_path, [row], benchmark="rmbench")

    assert '<th scope="row">markdown</th>' in text
    assert "easy 100.0, normal 100.0, hard 0.0" in text


@pytest.mark.parametrize("rows", [[], [failed("a/0")]])
def test_a_run_without_verdicts_has_a_page(tmp_path: Path, rows: list[Row]) -> None:
    """It says so, and has no empty figures."""
    page = Page(text := report(tmp_path, rows, {}))

    assert "No sample was judged" in text
    assert not page.of("svg")


def test_a_run_of_ties_alone_has_a_page(tmp_path: Path) -> None:
    """All values equal: every axis still has a width."""
    rows = [pair(f"{subset}/{number}", 1, 1) for subset in "ab" for number in range(40)]

    assert len(Page(report(tmp_path, rows)).of("svg")) == 5


def test_a_few_samples_have_the_figures_that_say_something(tmp_path: Path) -> None:
    """Scores as dots; no bar of one subset, no curves through one or two points, and why not."""
    page = Page(text := report(tmp_path, [*pairs("a", 3, 1)]))

    assert [figure["aria-label"].partition(":")[0] for figure in page.of("svg") if "aria-label" in figure] == [
        "Log-odds of the answers"
    ]
    assert "drawn from 20 judged samples on" in text


def test_the_verdict_comes_first_and_no_tile_is_a_dash(tmp_path: Path) -> None:
    """A mean that is not there has a reason instead."""
    text = report(tmp_path, pairs("hep-go", 8, 2), benchmark="rewardbench")

    assert text.index("Accuracy 80.0 (95% interval 49.0 to 94.3") < text.index("<dl")
    assert "needs samples of every section" in text
    assert "<dd>-</dd>" not in text


def test_unknown_texts_are_left_out_with_a_note(tmp_path: Path) -> None:
    """Without any samples, and for a single missing one."""
    rows = [pair("a/0", 0, 1)]

    assert "Their texts were not at hand" in report(tmp_path, rows, None)
    assert "No sample of this id was at hand" in report(tmp_path, rows, {})
    assert "at hand" not in report(tmp_path, rows, {"a/0": sample("a/0")})


def test_names_beyond_the_fonts_and_mathematics_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Chinese, dollar signs and control characters in a subset's name neither warn nor fail."""
    text = report(tmp_path, [pair("数学 $x^$ \x07/0", 1, 0)])

    assert "数学 $x^$" in text


def test_misjudgements_come_worst_first() -> None:
    """Largest negative margin first, ties and right ones not at all, no more than fifty."""
    rows = [pair(f"a/{i}", 0, i) for i in range(WORST + 9)] + [pair("a/right", 5, 0)]

    found = misjudgements(rows, {})

    assert len(found) == WORST
    assert [worst.margin for worst in found[:3]] == [-58.0, -57.0, -56.0]


def test_the_worst_pair_of_a_sample_is_shown() -> None:
    """Of several answers, those with the lowest margin, with their own log-odds and texts."""
    row = Row(
        id="a/0",
        subset="a",
        chosen=[answer(3.0), answer(1.0)],
        rejected=[answer(2.0), answer(4.0)],
        margins=[[1.0, -1.0], [-1.0, -3.0]],
    )
    told = Sample("a/0", "a", (Message(role="user", content="Why?"),), ("good", "fair"), ("poor", "bad"))

    worst = misjudgements([row], {"a/0": told})[0]

    assert (worst.chosen, worst.chosen_log_odds, worst.rejected, worst.rejected_log_odds) == ("fair", 1.0, "bad", 4.0)
    assert worst.prompt == "[user]\nWhy?"


def test_long_texts_are_cut_where_the_reader_sees_it() -> None:
    """The page stays small, and says how much is missing."""
    assert cut_text("x" * MAX_TEXT, MAX_TEXT) == "x" * MAX_TEXT
    assert cut_text("x" * (MAX_TEXT + 1500), MAX_TEXT).endswith("x\n[… 1,500 more characters]")


def test_the_command_asks_the_same_of_the_same(tmp_path: Path) -> None:
    """What decides the samples and the questions is in it, quoted for a shell."""
    config = {"data": "my file.jsonl", "mode": "pairwise", "limit": 20, "seed": 3, "subsets": ["hep-*"]}

    text = report(tmp_path, [pair("a/0", 1, 0)], **config)

    assert "python -m client.benchmarks.pairs --data &#39;my file.jsonl&#39; --map questions.json --ties strict" in text
    assert "--mode pairwise --limit 20 --seed 3 --subsets &#39;hep-*&#39;" in text

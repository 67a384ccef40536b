"""Choosing among candidate questions on one half, reporting on the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.benchmarks import search
from client.benchmarks.results.search import SEARCH_FILE, SearchResult
from tests.benchmarks.makers import pairs_file, paper_file
from tests.support.live import live_service

CODE = ["code@1", {"name": "short", "template": {"layout": "{prompt} {response} Good?"}}]


def searched(folder: Path, url: str, *flags: str) -> int:
    """Run a search over the code subset of a small file."""
    data = pairs_file(folder, 100)
    command = ["--judge-url", url, "--data", str(data), "--subsets", "hep-go", "--out", str(folder / "search")]
    return search.main([*command, *flags])


def candidates_file(folder: Path) -> Path:
    """Two ways of asking about code."""
    file = folder / "candidates.json"
    file.write_text(json.dumps({"code": CODE}))
    return file


def test_the_best_on_one_half_is_reported_on_the_other(tmp_path: Path) -> None:
    """Every candidate is judged on the training half; the first of the best, and the baseline, on the held-out half."""
    with live_service() as live:
        code = searched(tmp_path, live.url, "--candidates", str(candidates_file(tmp_path)))
    result = SearchResult.model_validate_json((tmp_path / "search" / SEARCH_FILE).read_text())

    (group,) = result.groups
    best = max(candidate.train.accuracy or 0 for candidate in group.candidates)
    chosen = next(candidate for candidate in group.candidates if candidate.name == group.chosen)
    assert code == 0
    assert chosen.train.accuracy == best
    assert group.held_out.judged + chosen.train.judged == 20
    assert group.baseline.name == "category code"


def test_the_halves_share_no_sample(tmp_path: Path) -> None:
    """What a candidate was chosen on is not what it is reported on."""
    with live_service() as live:
        searched(tmp_path, live.url, "--candidates", str(candidates_file(tmp_path)))
    base = tmp_path / "search" / "code" / "baseline"

    ids = [
        {json.loads(line)["id"] for line in (base / half / "items.jsonl").read_text().splitlines()}
        for half in ("train", "held-out")
    ]
    assert ids[0].isdisjoint(ids[1])
    assert len(ids[0] | ids[1]) == 20


def test_a_rerun_of_a_search_asks_nothing(tmp_path: Path) -> None:
    """Every part of it is a run that is resumed."""
    with live_service() as live:
        first = searched(tmp_path, live.url, "--candidates", str(candidates_file(tmp_path)))
        before = (tmp_path / "search" / SEARCH_FILE).read_text()
        files = sorted((tmp_path / "search").rglob("items.jsonl"))
        stamps = [file.read_bytes() for file in files]
        again = searched(tmp_path, live.url, "--candidates", str(candidates_file(tmp_path)))

    assert (first, again) == (0, 0)
    assert [file.read_bytes() for file in files] == stamps
    assert (tmp_path / "search" / SEARCH_FILE).read_text() == before


def test_the_papers_candidates_are_searched_per_subset(tmp_path: Path) -> None:
    """With the authors' file the candidates of each subset are tried on it."""
    paper = paper_file(tmp_path, candidates={"default": "x", "hep-go": ["Is it right?", "Does it work?"]})
    with live_service() as live:
        code = searched(tmp_path, live.url, "--paper", str(paper), "--per", "subset", "--paper-format", "chat")
    result = SearchResult.model_validate_json((tmp_path / "search" / SEARCH_FILE).read_text())

    assert code == 0
    assert result.groups[0].group == "hep-go"
    assert len(result.groups[0].candidates) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [('{"chat": ["chat@1"]}', "no candidates for code"), ('{"code": []}', "list of candidate"), ("{", "JSON")],
)
def test_candidates_that_cannot_work_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str
) -> None:
    """Exit code 2, before anything is asked."""
    file = tmp_path / "broken.json"
    file.write_text(text)

    code = searched(tmp_path, "http://127.0.0.1:1", "--candidates", str(file))

    assert code == 2
    assert problem in capsys.readouterr().err

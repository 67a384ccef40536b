"""Calibration files: what is read and refused, and what a service makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import calibration
from client.calibration import Calibration, CalibrationError
from client.stats import sigmoid
from tests.support.live import Live, live_service

QUALITY = {"nll": 0.6, "ece": 0.1, "brier": 0.2}
PAIR_FIT = {"temperature": 0.5, "before": QUALITY, "after": QUALITY}
OLD = {"temperature": 2.5, "bias": -0.25, "pairs": 300, "before": QUALITY, "after": {**QUALITY, "nll": 0.5}}
FIT = {**OLD, "pair": PAIR_FIT}
FILE = {
    "format": 1,
    "model": "fake",
    "fingerprint": "fake",
    "templates": {"general@3": FIT},
    "fitted_on": {"sources": ["runs/a"], "seed": 7, "left_out": {"truncated": 3}},
}
PAIR = {"prompt": "What is 2+2?", "response": "4"}
TWO = {"prompt": "What is 2+2?", "responses": ["4", "5"]}
INLINE = {"layout": "{instruction} {prompt} {response}", "instruction": "Good?"}


def written(folder: Path, name: str = "calibration.json", **changes: Any) -> Path:
    """A calibration file with some of its fields changed."""
    path = folder / name
    path.write_text(json.dumps({**FILE, **changes}), "utf-8")
    return path


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service with a calibration of `general@1`."""
    with live_service(calibration_file=[written(tmp_path_factory.mktemp("calibration"))]) as service:
        yield service


def post(live: Live, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = live.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# The file.


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    """What is saved has the documented names, loads as the same, and leaves nothing else in the folder."""
    calibration.save(Calibration.model_validate(FILE), tmp_path / "c.json")

    assert json.loads((tmp_path / "c.json").read_text("utf-8")) == FILE
    assert calibration.load(tmp_path / "c.json") == Calibration.model_validate(FILE)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """Where the new file cannot be put in place, no part of it stays."""
    (tmp_path / "c.json").mkdir()

    with pytest.raises(OSError, match=r"c\.json"):
        calibration.save(Calibration.model_validate(FILE), tmp_path / "c.json")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"templates": {}}, "templates"),
        ({"templates": {"inline": FIT}}, "inline"),
        ({"templates": {"general": FIT}}, "general"),
        ({"templates": {"general@3": {**FIT, "temperature": 0}}}, "temperature"),
        ({"templates": {"general@3": {**FIT, "temperature": -1.0}}}, "temperature"),
        ({"templates": {"general@3": {**FIT, "temperature": "1"}}}, "temperature"),
        ({"templates": {"general@3": {**FIT, "temperature": float("inf")}}}, "Infinity"),
        ({"templates": {"general@3": {**FIT, "bias": float("nan")}}}, "NaN"),
        ({"templates": {"general@3": {**FIT, "scale": 1}}}, "scale"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """The message names the file and what is wrong in it."""
    path = written(tmp_path, **changes)

    with pytest.raises(CalibrationError, match=said) as error:
        calibration.load(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "cannot be read"),
        ('{"templates": {"general@3": 1, "general@3": 2}}', "general@3 is given twice"),
        (json.dumps(FILE).replace("-0.25", "1e999"), "finite"),
    ],
)
def test_a_text_that_is_no_such_json_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """Also a template that is there twice, of which JSON's readers would take the last."""
    path = tmp_path / "c.json"
    path.write_text(text, "utf-8")

    with pytest.raises(CalibrationError, match=said):
        calibration.load(path)


@pytest.mark.parametrize(("log_odds", "expected"), [(0.625, 0.5), (1e308, 1.0), (-1e308, 0.0)])
def test_the_formula_holds_at_both_ends(log_odds: float, expected: float) -> None:
    """sigmoid(log_odds / temperature + bias) never overflows."""
    found = Calibration.model_validate(FILE).templates["general@3"]

    assert found.apply(log_odds) == expected


# The service.


def test_a_calibrated_template_says_the_probability(live: Live) -> None:
    """`calibrated` is the formula applied to the raw log-odds, which stay as they are."""
    result = post(live, "/score", PAIR)

    assert result["template"] == "general@3"
    assert result["calibrated"] == sigmoid(result["log_odds"] / 2.5 - 0.25)
    assert result["score"] == sigmoid(result["log_odds"])


@pytest.mark.parametrize("how", [{"category": "math"}, {"template": INLINE}])
def test_other_templates_are_not_calibrated(live: Live, how: dict[str, Any]) -> None:
    """A template without a calibration, and one sent with the request, get null."""
    assert post(live, "/score", {**PAIR, **how})["calibrated"] is None


def test_a_remembered_judgement_is_calibrated_too(live: Live) -> None:
    """The cache keeps raw numbers: the second answer to a question says the same as the first."""
    first, again = (post(live, "/score/batch", {"items": [PAIR]})["results"][0]["result"] for _ in range(2))

    assert again["usage"]["cached_tokens"] > 0
    assert again["calibrated"] == first["calibrated"] is not None


def test_a_pointwise_comparison_calibrates_each_response(live: Live) -> None:
    """Every response has its own probability, and each pair of them, by a temperature of its own."""
    result = post(live, "/compare", TWO)
    scores, log_odds = result["scores"], [score["log_odds"] for score in result["scores"]]

    assert [each["calibrated"] for each in scores] == [sigmoid(value / 2.5 - 0.25) for value in log_odds]
    assert result["calibrated_win_probability"] == [[sigmoid((a - b) / 0.5) for b in log_odds] for a in log_odds]
    assert result["win_probability"] == [[sigmoid(a - b) for b in log_odds] for a in log_odds]


def test_a_file_of_an_earlier_version_says_nothing_of_pairs(tmp_path: Path) -> None:
    """It is read as before, and written as it was."""
    path = written(tmp_path, templates={"general@3": OLD})
    with live_service(calibration_file=[path]) as live:
        result = post(live, "/compare", TWO)
    calibration.save(calibration.load(path), path)

    assert None not in [score["calibrated"] for score in result["scores"]]
    assert result["calibrated_win_probability"] is None
    assert json.loads(path.read_text("utf-8"))["templates"] == {"general@3": OLD}


def test_a_pairwise_comparison_is_not_calibrated(live: Live) -> None:
    """Log-odds of being the better one of two are no log-odds of being good."""
    result = post(live, "/compare", {**TWO, "mode": "pairwise"})

    assert [each["calibrated"] for each in result["scores"]] == [None, None]
    assert result["calibrated_win_probability"] is None


@pytest.mark.parametrize(("path", "body"), [("/score", PAIR), ("/compare", TWO)])
def test_results_name_the_weights_that_judged(live: Live, path: str, body: dict[str, Any]) -> None:
    """The fingerprint in a result is the one that /v1/models says."""
    fingerprint = live.http.get("/v1/models").json()["data"][0]["fingerprint"]

    assert post(live, path, body)["fingerprint"] == fingerprint == "fake"


def test_a_service_without_a_file_says_null() -> None:
    """The field is there in every answer, as position_bias is."""
    with live_service() as live:
        result = post(live, "/score", PAIR)

    assert result["calibrated"] is None


def test_several_files_add_up(tmp_path: Path) -> None:
    """Each file brings its own templates."""
    files = [written(tmp_path, "a.json"), written(tmp_path, "b.json", templates={"math@2": FIT})]

    with live_service(calibration_file=files) as live:
        found = [post(live, "/score", {**PAIR, "category": name})["calibrated"] for name in ("general", "math")]

    assert None not in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": "0123"}, "fitted to the model fake with the fingerprint 0123"),
        ({"templates": {"nonsense@1": FIT}}, "nonsense@1 is not known"),
        ({"templates": {"general@99": FIT}}, "general@99 is not known"),
        ({"templates": {"pairwise-general@1": FIT}}, "pairwise-general@1 is pairwise"),
        ({"templates": {"general@3": FIT}}, "general@3 is already calibrated in .*a.json"),
    ],
)
def test_a_file_that_does_not_fit_the_service_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    """Another model's, an unknown or pairwise template, and a template that an earlier file has."""
    good, bad = written(tmp_path, "a.json"), written(tmp_path, "b.json", **changes)

    with pytest.raises(CalibrationError, match=said) as error, live_service(calibration_file=[good, bad]):
        pass
    assert str(error.value).startswith(f"{bad}: ")


def test_the_program_ends_with_status_1_and_names_the_file(tmp_path: Path) -> None:
    """A service that cannot have its calibration does not start; files are separated by commas."""
    files = f"{written(tmp_path, 'a.json')},{tmp_path / 'missing.json'}"
    command = [sys.executable, "-m", "service", "--engine", "fake", "--calibration-file", files]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ.copy(), check=False)

    assert ended.returncode == 1
    assert "missing.json" in ended.stderr
    assert "Traceback" not in ended.stderr

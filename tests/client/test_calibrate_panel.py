"""Weights of a panel: the fit, what it is fitted to, and the command, up to the service that has the panel."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import calibration
from client.benchmarks import pairs as pairs_command
from client.calibrate.__main__ import main
from client.calibrate.weights import FOLDS, PanelSample, fit_panel, fit_slopes, split_folds
from client.stats import sigmoid
from tests.support.live import Live, live_service

NAMES = ["general@3", "math@2", "code@2"]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service to ask."""
    with live_service() as service:
        yield service


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that tables are not folded."""
    monkeypatch.setenv("COLUMNS", "240")


def drawn(count: int, slopes: list[float], seed: int = 0) -> list[PanelSample]:
    """Pairs whose better answer is drawn by these slopes of the questions' log-odds."""
    rng = random.Random(seed)
    samples = []
    for number in range(count):
        one, other = (tuple(rng.gauss(1, 2) for _ in slopes) for _ in range(2))
        margin = sum(slope * (a - b) for slope, a, b in zip(slopes, one, other, strict=True))
        better, worse = (one, other) if rng.random() < sigmoid(margin) else (other, one)
        samples.append(PanelSample(f"{number}", (better,), (worse,)))
    return samples


# The fit.


def test_known_weights_are_recovered() -> None:
    """From 4,000 pairs drawn by them, up to their scale, and a question that adds nothing gets next to nothing."""
    fitted = fit_panel(drawn(4000, [0.6, 0.3, 0.0]))

    assert fitted is not None
    assert fitted.weights == (
        pytest.approx(2 / 3, abs=0.04),
        pytest.approx(1 / 3, abs=0.04),
        pytest.approx(0, abs=0.03),
    )
    assert sum(fitted.weights) == pytest.approx(1)
    assert fitted.best == 0
    assert fitted.fitted.accuracy > fitted.equal.accuracy > fitted.alone[2].accuracy
    assert fitted.fitted.brier < min(fitted.equal.brier, *(way.brier for way in fitted.alone))
    assert fitted.fitted.p_value(fitted.alone[0]) < 0.01


def test_the_slopes_are_the_minimum_among_those_that_are_not_negative() -> None:
    """A question that is wrong more often than right gets 0, and the others what they would get without it."""
    pairs = [pair for sample in drawn(500, [0.5, -0.4, 0.2]) for pair in sample.differences]

    slopes = fit_slopes(pairs)

    assert slopes is not None
    assert slopes[1] == 0 < min(slopes[0], slopes[2])
    mirrored = fit_slopes([(b, a, c) for a, b, c in pairs])
    assert mirrored == (pytest.approx(0), pytest.approx(slopes[0]), pytest.approx(slopes[2]))


def test_few_pairs_leave_the_weights_almost_equal() -> None:
    """The prior holds what the data do not say: ten pairs do not tell two good questions apart."""
    fits = [fit_panel(drawn(10, [0.3, 0.3], seed)) for seed in range(6)]

    assert all(fit is not None and abs(fit.weights[0] - fit.weights[1]) < 0.2 for fit in fits)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_log_odds_does_not_matter(scale: float) -> None:
    """Weights of log-odds a million times as large are the same."""
    samples = drawn(200, [0.6, 0.3])
    scaled = [
        PanelSample(s.id, *(tuple(tuple(x * scale for x in a) for a in side) for side in (s.chosen, s.rejected)))
        for s in samples
    ]

    one, other = fit_panel(samples), fit_panel(scaled)

    assert one is not None
    assert other is not None
    assert other.weights == pytest.approx(one.weights, rel=1e-6)


@pytest.mark.parametrize("slopes", [[-0.5, -0.5]])
def test_questions_without_a_signal_have_no_weights(slopes: list[float]) -> None:
    """Nothing is fitted to questions that prefer the worse answer, nor to those that say nothing."""
    silent = [PanelSample(f"{n}", ((1.0, 2.0),), ((1.0, 2.0),)) for n in range(10)]

    assert fit_panel(drawn(200, slopes)) is None
    assert fit_panel(silent) is None


def test_separable_pairs_have_finite_weights() -> None:
    """A question that is always right does not get all the weight."""
    samples = [PanelSample(f"{n}", ((2.0, 1.0 - n % 2),), ((0.0, 0.5),)) for n in range(20)]

    fitted = fit_panel(samples)

    assert fitted is not None
    assert fitted.fitted.accuracy == 1
    assert 0 < fitted.weights[1] < fitted.weights[0] < math.inf


def test_pairs_with_one_id_stay_in_one_fold() -> None:
    """Answers to one prompt are never fitted to and measured on; the order of the samples changes nothing."""
    samples = [PanelSample(f"{n % 7}", ((float(n), 1.0),), ((0.0, 0.0),)) for n in range(28)]

    folds = split_folds(samples, seed=3)

    assert sorted(len(fold) for fold in folds) == [4, 4, 4, 8, 8]
    assert all(len({value % 7 for value, _ in fold}) == len(fold) / 4 for fold in folds)
    assert [sorted(fold) for fold in split_folds(samples[::-1], seed=3)] == [sorted(fold) for fold in folds]
    with pytest.raises(ValueError, match=f"{FOLDS} folds"):
        fit_panel(samples[:3])


def test_every_pair_of_answers_counts() -> None:
    """Samples with several answers a side give a pair for each combination."""
    sample = PanelSample("s", ((1.0, 2.0), (3.0, 4.0)), ((0.0, 0.0), (1.0, 1.0)))

    assert sample.differences == [(1, 2), (0, 1), (3, 4), (2, 3)]


# The command.


def judged_right(live: Live, folder: Path, names: list[str], count: int = 60) -> Path:
    """A file of pairs that the first question, whose answers are made up, gets right."""
    items = [
        {"prompt": f"Question {n}", "response": answer, "template": names[0]}
        for n in range(count)
        for answer in ("one", "two")
    ]
    results = [one["result"] for one in live.http.post("/score/batch", json={"items": items}).json()["results"]]
    lines = []
    for n in range(count):
        first, second = (result["log_odds"] for result in results[2 * n : 2 * n + 2])
        chosen, rejected = ("one", "two") if first > second else ("two", "one")
        lines.append({"prompt": f"Question {n}", "chosen": chosen, "rejected": rejected, "category": "chat"})
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def test_fitted_weights_are_what_a_service_answers_by(
    tmp_path: Path, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged, fitted, written, served: the new panel's log-odds are its members' mean by these weights."""
    data, out = judged_right(live, tmp_path, NAMES), tmp_path / "mine.toml"

    code = main(
        ["--data", str(data), "--judge-url", live.url, "--template", *NAMES, "--panel", "mine@3", "--out", str(out)]
    )
    with live_service(template_file=[out]) as served:
        (panel,) = served.http.get("/templates").json()["panels"]
        body = {"prompt": "Question 1", "response": "one", "template": "mine"}
        result = served.http.post("/score", json=body).json()

    assert code == 0
    assert (panel["name"], panel["version"], set(panel["members"])) == ("mine", 3, {*panel["members"]} & {*NAMES})
    assert panel["weights"][panel["members"].index("general@3")] == max(panel["weights"])
    mean = math.fsum(one["weight"] * one["log_odds"] for one in result["panel"]) / math.fsum(panel["weights"])
    assert result["log_odds"] == mean
    shown = capsys.readouterr().out
    assert "equal weights" in shown
    assert "p = " in shown


def test_weights_are_fitted_to_a_run_as_to_pairs(tmp_path: Path, live: Live) -> None:
    """A benchmark's rows say what each template said; the run itself can be calibrated as any other."""
    data, run = judged_right(live, tmp_path, NAMES), tmp_path / "run"
    asked = ["--data", str(data), "--judge-url", live.url]

    codes = [
        pairs_command.main([*asked, "--template", *NAMES, "--out", str(run)]),
        main([*asked, "--template", ",".join(NAMES), "--panel", "mine", "--out", str(tmp_path / "a.toml")]),
        main(["--run", str(run), "--panel", "mine", "--out", str(tmp_path / "b.toml")]),
        main(["--run", str(run), "--out", str(tmp_path / "c.json")]),
    ]

    one, other = ((tmp_path / name).read_text("utf-8").partition("[[panels]]")[2] for name in ("a.toml", "b.toml"))
    name = "general@3,math@2,code@2"
    assert codes == [0, 0, 0, 0]
    assert one == other != ""
    assert list(calibration.load(tmp_path / "c.json").templates) == [name]
    with live_service(calibration_file=[tmp_path / "c.json"]) as served:
        body = {"prompt": "Question 1", "response": "one", "template": NAMES}
        assert served.http.post("/score", json=body).json()["calibrated"] is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--panel", "no,name"], "give a name"),
        (["--panel", "mine@0"], "give a name"),
        (["--panel", "mine"], "one panel"),
        (["--panel", "mine", "--template", "general"], "one panel"),
        (["--panel", "mine", "--template", *NAMES, "--min-pairs", "61"], "too few"),
        (["--panel", "mine", "--template", "general", "general"], "distinct"),
        (["--run", "RUN", "--template", "general"], "--template is for --data"),
    ],
)
def test_what_cannot_be_fitted_is_said(
    tmp_path: Path, live: Live, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """A bad name, no panel, too few pairs: nothing is written."""
    source = [] if "--run" in arguments else ["--data", str(judged_right(live, tmp_path, NAMES))]

    code = main([*source, "--judge-url", live.url, *arguments, "--out", str(tmp_path / "out.toml")])

    assert (code, (tmp_path / "out.toml").exists()) == (2, False)
    assert said in capsys.readouterr().err


def test_a_question_that_says_all_is_to_be_asked_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No panel is written where the fit leaves one question; the table says why."""
    rows = [row(sample) for sample in drawn(200, [0.8, -0.8])]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")

    code = main(["--run", str(tmp_path), "--panel", "mine", "--out", str(tmp_path / "out.toml")])

    assert (code, (tmp_path / "out.toml").exists()) == (2, False)
    shown = capsys.readouterr()
    assert "add nothing to a@1: ask it alone" in shown.err
    assert "fitted weights" in shown.out


def row(sample: PanelSample) -> dict[str, Any]:
    """A sample as a line of items.jsonl, by a panel of two."""
    chosen, rejected = (
        {
            "log_odds": sum(z) / 2,
            "score": 0.5,
            "label_mass": 0.9,
            "length": 3,
            "members": dict(zip("ab", z, strict=True)),
        }
        for ((z),) in (sample.chosen, sample.rejected)
    )
    for answer in (chosen, rejected):
        answer["members"] = {f"{name}@1": value for name, value in answer["members"].items()}
    margins = [[chosen["log_odds"] - rejected["log_odds"]]]
    who = {"template": "a@1,b@1", "model": "fake", "fingerprint": "fake"}
    return {"id": sample.id, "subset": "s", "chosen": chosen, "rejected": rejected, "margins": margins, **who}

"""Fitting a calibration: the fit itself, what it is fitted to, and the command, with runs and a live service."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from client import calibration
from client.calibrate.__main__ import _verdict, main
from client.calibrate.evidence import EvidenceError, Pair, from_runs, read_pairs
from client.calibrate.fitting import LabelledSample, calibrate, fit, quality, split_halves
from client.stats import sigmoid
from tests.support.live import Live, live_service

JUDGE = {"model": "fake", "fingerprint": "fake"}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service to calibrate."""
    with live_service() as service:
        yield service


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough that tables are not folded."""
    monkeypatch.setenv("COLUMNS", "240")


def answers(count: int, temperature: float, bias: float, seed: int = 0) -> tuple[list[float], list[bool]]:
    """Log-odds of a judge with exactly this calibration, and whether each answer is good."""
    rng = random.Random(seed)
    log_odds = [rng.gauss(0.5, 3.0) * temperature for _ in range(count)]
    return log_odds, [rng.random() < sigmoid(x / temperature + bias) for x in log_odds]


def pairs(count: int, gap: float = 3.0, sd: float = 4.0, seed: int = 0) -> list[LabelledSample]:
    """Pairs of an overconfident judge: normal log-odds, those of chosen answers `gap` above those of rejected ones.

    With equal variances the right log-odds are linear in the judge's, with temperature sd²/gap.
    """
    rng = random.Random(seed)
    return [LabelledSample(f"{i}", (rng.gauss(5 + gap, sd),), (rng.gauss(5, sd),)) for i in range(count)]


def row(sample: LabelledSample, template: str = "general@3", **changes: Any) -> dict[str, Any]:
    """A sample as a line of items.jsonl."""
    chosen, rejected = (
        {"log_odds": side[0], "score": sigmoid(side[0]), "label_mass": 0.9, "length": 3}
        for side in (sample.chosen, sample.rejected)
    )
    margins = [[sample.chosen[0] - sample.rejected[0]]]
    both = {"chosen": chosen, "rejected": rejected, "margins": margins}
    return {"id": sample.id, "subset": "s", **both, "template": template, **JUDGE, **changes}


def run_folder(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the folder of a benchmark run with these rows."""
    folder.mkdir(exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows), "utf-8")
    return folder


def command(tmp_path: Path, *arguments: object) -> tuple[int, Path]:
    """Run the command; returns its exit code and the path that it writes to."""
    out = tmp_path / "calibration.json"
    return main([*map(str, arguments), "--out", str(out)]), out


# The fit.


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (5.0, -0.75), (0.5, 0.25)])
def test_a_known_calibration_is_recovered(temperature: float, bias: float) -> None:
    """From 20,000 answers drawn from it, the fit recovers temperature and bias."""
    fitted = fit(*answers(20_000, temperature, bias))

    assert fitted == (pytest.approx(temperature, rel=0.05), pytest.approx(bias, abs=0.1))


def test_the_fit_is_the_minimum() -> None:
    """No neighbouring temperature or bias has a higher likelihood."""
    log_odds, labels = answers(2000, 3.0, -0.5)
    temperature, bias = fit(log_odds, labels) or (0.0, 0.0)
    near = [(temperature * t, bias + b) for t in (0.98, 1, 1.02) for b in (-0.02, 0, 0.02)]

    losses = {(t, b): quality([x / t + b for x in log_odds], labels).nll for t, b in near}

    assert min(losses, key=lambda at: losses[at]) == (temperature, bias)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_scale_of_the_log_odds_does_not_matter(scale: float) -> None:
    """Log-odds a million times as large get a million times the temperature, and the same bias."""
    log_odds, labels = answers(500, 3.0, -0.5)
    temperature, bias = fit(log_odds, labels) or (0.0, 0.0)

    fitted = fit([x * scale for x in log_odds], labels)

    assert fitted == (pytest.approx(temperature * scale, rel=1e-6), pytest.approx(bias, rel=1e-6))


def test_separable_answers_have_a_temperature() -> None:
    """The likelihood alone would have no maximum; with the prior the temperature is finite, positive and small."""
    temperature, bias = fit([3.0, 4.0, 5.0, -3.0, -4.0, -5.0], [True] * 3 + [False] * 3) or (0.0, 0.0)

    assert 0.01 < temperature < 1.5
    assert sigmoid(3.0 / temperature + bias) > 0.9


@pytest.mark.parametrize(
    ("log_odds", "labels"),
    [([2.0, 3.0, 1.0, 2.5], [False, False, True, True]), ([1.0, 1.0, 1.0, 1.0], [True, False, True, False])],
)
def test_a_judge_without_signal_has_no_calibration(log_odds: list[float], labels: list[bool]) -> None:
    """No positive temperature fits a judge that prefers the wrong answers, or rates all the same."""
    assert fit(log_odds, labels) is None


def test_swapped_pairs_have_no_signal() -> None:
    """A judge with chosen and rejected answers swapped has no calibration."""
    swapped = [LabelledSample(pair.id, pair.rejected, pair.chosen) for pair in pairs(400)]

    assert calibrate(swapped) is None


def test_a_fit_improves_the_held_out_half() -> None:
    """An overconfident judge is closer to the truth on pairs that the fit has not seen, by all three measures."""
    fitted = calibrate(pairs(2000))

    assert fitted is not None
    assert fitted.pairs == 2000
    assert fitted.temperature == pytest.approx(4.0**2 / 3.0, rel=0.15)
    assert fitted.after.nll < fitted.before.nll - 0.5
    assert fitted.after.ece < 0.05 < fitted.before.ece
    assert fitted.after.brier < fitted.before.brier


def test_pairs_have_a_temperature_of_their_own() -> None:
    """What a judge adds to all answers to a prompt spoils its single scores, and no comparison: it cancels out."""
    rng = random.Random(3)
    samples = []
    for number in range(2000):
        shift, lead = rng.gauss(0.0, 3.0), rng.gauss(0.0, 2.0)
        better = rng.random() < sigmoid(lead / 1.5)
        one, other = (shift + lead, shift) if better else (shift, shift + lead)
        samples.append(LabelledSample(str(number), (one,), (other,)))

    fitted = calibrate(samples)

    assert fitted is not None
    assert fitted.pair is not None
    assert fitted.pair.temperature == pytest.approx(1.5, rel=0.15)
    assert fitted.temperature > 2 * fitted.pair.temperature
    assert fitted.pair.after.ece < 0.03 < fitted.pair.before.ece
    assert fitted.pair.apply(1.5) + fitted.pair.apply(-1.5) == pytest.approx(1.0)


def test_quality_is_measured_on_the_held_out_pairs() -> None:
    """`before` is the quality of the second half's raw scores."""
    samples = pairs(100)
    _, held_out = split_halves(samples, seed=3)
    log_odds = [s.chosen[0] for s in held_out] + [s.rejected[0] for s in held_out]

    fitted = calibrate(samples, seed=3)

    assert fitted is not None
    assert fitted.before.nll == pytest.approx(quality(log_odds, [True] * 50 + [False] * 50).nll)


def test_halves_depend_on_seed_and_ids_only() -> None:
    """The order of the samples does not matter, the seed does; both halves are equally large."""
    samples = pairs(101)
    first, second = split_halves(samples, 0)

    again, _ = split_halves(samples[::-1], 0)
    other, _ = split_halves(samples, 1)

    assert (len(first), len(second)) == (51, 50)
    assert set(again) == set(first)
    assert set(other) != set(first)


def test_samples_with_one_id_stay_together() -> None:
    """Samples that share an id, and so a prompt, are in the same half."""
    samples = [LabelledSample(f"{i % 10}", (float(i),), (0.0,)) for i in range(40)]

    first, second = split_halves(samples, 0)

    assert not {s.id for s in first} & {s.id for s in second}


# The evidence.


def test_unusable_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    """Failed, truncated and pairwise rows, rows by a template without a name, and duplicates."""
    sample = LabelledSample("a", (2.0,), (1.0,))
    cut = row(LabelledSample("b", (2.0,), (1.0,)))
    cut["rejected"]["truncated"] = True
    failed = {"id": "c", "subset": "s", "error": {"code": "overloaded", "message": "busy"}}
    unnamed = [
        row(LabelledSample(name, (2.0,), (1.0,)), template) for name, template in (("d", "inline"), ("e", "mine (raw)"))
    ]
    pairwise = row(LabelledSample("f", (2.0,), (1.0,)), "pairwise-general@1", flips=0)

    folder = run_folder(tmp_path / "run", [row(sample), cut, failed, *unnamed, pairwise])
    evidence = from_runs([folder, folder])

    assert evidence.templates == {"general@3": [sample]}
    assert evidence.left_out == {
        "given twice": 1,
        "truncated": 2,
        "failed": 2,
        "template sent with the request": 4,
        "pairwise": 2,
    }


def test_all_answers_of_a_sample_are_fitted_to(tmp_path: Path) -> None:
    """A sample keeps every chosen and every rejected answer."""
    single = row(LabelledSample("a", (2.0,), (1.0,)))
    several = single | {"rejected": [single["rejected"], {**single["rejected"], "log_odds": -4.0}], "margins": [[1, 6]]}

    evidence = from_runs([run_folder(tmp_path / "run", [several])])

    assert evidence.templates == {"general@3": [LabelledSample("a", (2.0,), (1.0, -4.0))]}


@pytest.mark.parametrize(
    "text", ["{", '{"prompt": "p", "chosen": "a"}', '{"prompt": "", "chosen": "a", "rejected": "b"}']
)
def test_an_invalid_pair_is_named(tmp_path: Path, text: str) -> None:
    """The message has the file and the line."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n' + text + "\n", "utf-8")

    with pytest.raises(EvidenceError, match=r"pairs\.jsonl, line 2: not a pair"):
        read_pairs([file])


def test_pairs_without_an_id_share_their_prompts_key() -> None:
    """Two pairs with the same prompt share a key, and so a half."""
    one, two, other = (Pair(prompt=p, chosen="a", rejected=r) for p, r in (("p", "b"), ("p", "c"), ("q", "b")))

    assert one.key() == two.key() != other.key()


# The command.


def test_runs_are_fitted_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every template with enough pairs and a signal is in the file; the table says why others are not."""
    swapped = [LabelledSample(pair.id, pair.rejected, pair.chosen) for pair in pairs(60)]
    rows = [row(pair) for pair in pairs(60)] + [row(pair, "math@2", id=f"m{pair.id}") for pair in swapped]
    few = [row(pair, "code@2", id=f"c{pair.id}") for pair in pairs(49)]
    folders = run_folder(tmp_path / "a", rows), run_folder(tmp_path / "b", few)

    code, out = command(tmp_path, "--run", *folders, "--seed", 5)

    written = calibration.load(out)
    assert code == 0
    assert written.templates == {"general@3": calibrate(pairs(60), seed=5)}
    assert (written.model, written.fingerprint) == ("fake", "fake")
    assert written.fitted_on.sources == [str(folder) for folder in folders]
    shown = capsys.readouterr().out
    assert "no signal" in shown
    assert "fewer than 50 pairs" in shown
    assert "general@3: calibrated probabilities are closer to the truth than raw scores" in shown


def test_a_fit_that_tells_nothing_says_so() -> None:
    """Where always saying 50% would do as well on the held-out half."""
    fit = calibrate(pairs(60))
    assert fit is not None
    idle = fit.model_copy(update={"after": fit.after.model_copy(update={"nll": 0.7})})

    assert _verdict("general@3", idle).endswith("always saying 50% has 0.693, so this judge tells nothing here.")


@pytest.mark.parametrize("changes", [{"fingerprint": "0123"}, {"model": "other"}])
def test_judgements_of_two_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str]
) -> None:
    """A file belongs to one model's weights."""
    rows = [row(pair) for pair in pairs(60)]

    code, out = command(tmp_path, "--run", run_folder(tmp_path / "run", [{**rows[0], **changes}, *rows[1:]]))

    assert (code, out.exists()) == (2, False)
    assert "more than one model judged" in capsys.readouterr().err


def test_judgements_without_a_fingerprint_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A service could not check a file for unknown weights."""
    code, out = command(tmp_path, "--run", run_folder(tmp_path / "run", [row(pairs(1)[0], fingerprint=None)]))

    assert (code, out.exists()) == (2, False)
    assert "fingerprint" in capsys.readouterr().err


def test_nothing_to_fit_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If no template has enough pairs, no file is written, and an existing one stays."""
    (tmp_path / "calibration.json").write_text("old", "utf-8")

    code, out = command(tmp_path, "--run", run_folder(tmp_path / "run", [row(pair) for pair in pairs(10)]))

    assert (code, out.read_text("utf-8")) == (1, "old")
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run", "no-such-folder"],
        ["--data", "no-such-file.jsonl"],
        ["--run", ".", "--min-pairs", "1"],
    ],
)
def test_wrong_usage_ends_with_2(tmp_path: Path, arguments: list[str]) -> None:
    """Missing files and impossible values are refused before anything is asked."""
    code, out = command(tmp_path, *arguments)

    assert (code, out.exists()) == (2, False)


def test_the_output_folder_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is checked at once, not after an hour of judging."""
    code = main(["--run", str(tmp_path), "--out", str(tmp_path / "none" / "c.json")])

    assert code == 2
    assert "no such folder" in capsys.readouterr().err


def test_an_unreachable_judge_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the service is unreachable, the command says so and ends with 1."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n', "utf-8")

    code, _ = command(tmp_path, "--data", tmp_path / "pairs.jsonl", "--judge-url", "http://127.0.0.1:9")

    assert code == 1
    assert "127.0.0.1:9" in capsys.readouterr().err


def pairs_file(path: Path, live: Live, count: int) -> Path:
    """Write pairs that this judge (whose scores are made up) gets right, and one that is too long for it."""
    items = [{"prompt": f"Question {i}", "response": answer} for i in range(count) for answer in ("one", "two")]
    results = [item["result"] for item in live.http.post("/score/batch", json={"items": items}).json()["results"]]
    lines = [json.dumps({"prompt": "Question", "chosen": "x " * 20_000, "rejected": "one"})]
    for i in range(count):
        first, second = (result["log_odds"] for result in results[2 * i : 2 * i + 2])
        chosen, rejected = ("one", "two") if first > second else ("two", "one")
        lines.append(
            json.dumps({"prompt": f"Question {i}", "chosen": chosen, "rejected": rejected, "note": "passed over"})
        )
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_a_live_judge_is_calibrated_end_to_end(tmp_path: Path, live: Live) -> None:
    """Judged, fitted and served: the service answers by the file's formula, and the failed pair was counted."""
    data = pairs_file(tmp_path / "pairs.jsonl", live, 60)

    code, out = command(tmp_path, "--data", data, "--judge-url", live.url)
    with live_service(calibration_file=[out]) as calibrated:
        result = calibrated.http.post("/score", json={"prompt": "Question 1", "response": "one"}).json()

    written = calibration.load(out)
    assert code == 0
    assert (written.templates["general@3"].pairs, written.fitted_on.left_out) == (60, {"failed": 1})
    assert result["calibrated"] == written.templates["general@3"].apply(result["log_odds"])

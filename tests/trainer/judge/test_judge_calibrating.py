"""Probabilities of pairs after calibration: fitted to other prompts, by group, and never better than they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from client import calibration
from client.stats import sigmoid
from trainer.tuning.judge.calibrating import calibrate_pairs, confidence, fit_of, write_calibration
from trainer.tuning.judge.readings import Reading


def reading(number: int, margin: float, lengths: tuple[int, int] = (10, 10), prompt: str = "") -> Reading:
    """A pair whose first answer is the better one."""
    return Reading(
        id=f"{number}",
        category=("math", "code")[number % 2],
        template="general@1",
        asking="pointwise",
        target=1.0,
        log_odds=(margin, 0.0),
        label_mass=(1.0, 1.0),
        margin=margin,
        lengths=lengths,
        prompt=prompt,
    )


def overconfident(count: int, factor: float, prompt: Callable[[int], str] = str) -> list[Reading]:
    """Pairs whose true log-odds are the margins divided by `factor`."""
    rng = random.Random(7)
    margins = [rng.uniform(0, 3) for _ in range(count)]
    right = [rng.random() < sigmoid(margin) for margin in margins]
    return [
        reading(n, factor * (margin if yes else -margin), (10, 10 + n % 7), prompt(n))
        for n, (margin, yes) in enumerate(zip(margins, right, strict=True))
    ]


def test_calibration_finds_the_temperature() -> None:
    """A judge whose margins are five times too large becomes as good as chance allows, and so do its groups."""
    pairs = overconfident(1000, 5.0)
    raw = fit_of([confidence(one) for one in pairs])

    found = calibrate_pairs(pairs, seed=1)

    assert found is not None
    assert raw is not None
    assert found.temperature == pytest.approx(5.0, rel=0.2)
    assert found.pairs.ece < 2 * found.pairs.noise < raw.ece
    assert found.pairs.brier < raw.brier
    assert sum(fit.count for fit in found.by_category.values()) == found.pairs.count == 1000
    assert set(found.by_length) == {"like length", "better is shorter"}


def test_no_pair_is_measured_with_a_temperature_that_it_decided() -> None:
    """Labels of one prompt are in one fold: where all are of one prompt there is nothing to fit to, and all get 0.5."""
    alone = calibrate_pairs(overconfident(60, 5.0, lambda _: "the same"), seed=1)

    assert alone is not None
    assert alone.pairs.brier == pytest.approx(0.25)


def test_margins_without_signal_have_no_temperature() -> None:
    """A judge that is more often wrong the surer it is gets the probability one half."""
    found = calibrate_pairs([reading(n, -1.0 - n % 3) for n in range(60)], seed=1)

    assert found is not None
    assert found.temperature is None
    assert found.pairs.ece == pytest.approx(0.5)


@pytest.mark.parametrize("pairs", [[], overconfident(49, 1.0)], ids=["none", "too few"])
def test_too_few_pairs_are_not_calibrated(pairs: Sequence[Reading]) -> None:
    """Below fifty pairs there is no calibration, as in client.calibrate."""
    assert calibrate_pairs(pairs, seed=1) is None


def test_perfect_probabilities_show_the_noise() -> None:
    """The ECE of true probabilities is about what `noise` says, and falls with the number of labels."""
    fits = [fit_of([confidence(one) for one in overconfident(count, 1.0)]) for count in (100, 4000)]

    few, many = (fit for fit in fits if fit is not None)
    assert 3 * many.noise < few.noise
    assert many.ece < 3 * many.noise


def test_the_services_file_has_halves_of_prompts(tmp_path: Path) -> None:
    """A template with enough labels of several prompts is calibrated, one with a single prompt is not."""
    several = write_calibration(
        tmp_path / "several.json", overconfident(80, 2.0, lambda n: f"{n // 2}"), "m", "f" * 16, {}, 1
    )
    single = write_calibration(tmp_path / "single.json", overconfident(80, 2.0, lambda _: "one"), "m", "f" * 16, {}, 1)

    assert set(several) == set(calibration.load(tmp_path / "several.json").templates) == {"general@1"}
    assert not single
    assert not (tmp_path / "single.json").exists()

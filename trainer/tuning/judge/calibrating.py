"""How far a judge's probabilities can be trusted, and what makes them better: temperatures fitted to labels held out.

Of a pair the probability is `sigmoid(margin / temperature)`; its confidence is that in the answer which the judge
prefers. Answers have a temperature and a bias of their own (client/calibrate), which are what the service applies. The
two temperatures differ, several times over: how good a judge finds any answer varies from prompt to prompt, and in a
pair's margin that cancels out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from client import stats
from client.calibrate.fitting import LabelledSample, calibrate, fit_pairs, shuffled
from client.calibration import Calibration, FittedOn, TemplateCalibration, save
from trainer.run.records import Record
from trainer.tuning.judge.readings import Reading

MIN_CALIBRATED: Final = 50
"""Labels at least for a calibration; as in `python -m client.calibrate`."""
FOLDS: Final = 5


class Fit(Record):
    """How far `count` probabilities are from the truth: ECE over 10 equal-width bins, Brier score.

    `noise` is the ECE that perfect probabilities would show on average, by chance alone, on so few labels.
    """

    ece: float
    brier: float
    count: int
    noise: float = 0.0


class PairCalibration(Record):
    """Pairs after calibration. Every pair's temperature was fitted to the others, in FOLDS folds of prompts.

    `temperature` is fitted to all pairs: for margins of other labels. None if greater margins do not make a right
    verdict likelier; such a fold's pairs get the probability one half.
    """

    temperature: float | None
    pairs: Fit
    by_category: dict[str, Fit]
    by_length: dict[str, Fit]


def fit_of(judged: Sequence[tuple[float, float]]) -> Fit | None:
    """How well probabilities, each with its outcome, fit; None if there are none."""
    if not judged:
        return None
    probabilities, outcomes = zip(*judged, strict=True)
    return Fit(
        ece=stats.ece(probabilities, outcomes),
        brier=stats.brier(probabilities, outcomes),
        count=len(probabilities),
        noise=_noise(probabilities, outcomes),
    )


def confidence(reading: Reading, temperature: float | None = 1.0) -> tuple[float, float]:
    """How sure the judge is of the answer that it prefers, and how right it is; without a temperature, one half."""
    margin = 0.0 if temperature is None else (reading.margin or 0.0) / temperature
    return stats.sigmoid(abs(margin)), reading.credit


def calibrate_pairs(readings: Sequence[Reading], seed: int) -> PairCalibration | None:
    """The pairs' probabilities after calibration; None for fewer than MIN_CALIBRATED pairs."""
    pairs = [reading for reading in readings if reading.margin is not None]
    if len(pairs) < MIN_CALIBRATED:
        return None
    folds = _folds(pairs, seed)
    judged: list[tuple[Reading, tuple[float, float]]] = []
    for fold in folds:
        temperature = _temperature([reading for other in folds if other is not fold for reading in other])
        judged += [(reading, confidence(reading, temperature)) for reading in fold]
    everything = fit_of([one for _, one in judged])
    assert everything is not None  # there are pairs
    return PairCalibration(
        temperature=_temperature(pairs),
        pairs=everything,
        by_category=_fits(judged, lambda reading: reading.category or "none"),
        by_length=_fits(judged, lambda reading: reading.length_class),
    )


def write_calibration(
    path: Path, readings: Sequence[Reading], model: str, fingerprint: str, asked_with: Mapping[str, str], seed: int
) -> dict[str, TemplateCalibration]:
    """Fit a calibration of each template with enough pairs, and write the service's --calibration-file.

    Returns them by template; without any, there is no file. Pairwise templates have none: the service calibrates
    single responses alone.
    """
    by_template: defaultdict[str, list[LabelledSample]] = defaultdict(list)
    for reading in readings:
        if reading.asking == "pointwise":
            by_template[reading.template].append(_labelled(reading))
    fitted: dict[str, TemplateCalibration] = {}
    for template, samples in by_template.items():
        # Halves are made of prompts, and of a single one there are none.
        enough = len(samples) >= MIN_CALIBRATED and len({sample.id for sample in samples}) > 1
        result = calibrate(samples, seed) if enough else None
        if result is not None:
            fitted[template] = result.model_copy(update={"asked_with": asked_with.get(template)})
    if fitted:
        sources = FittedOn(sources=["held-out labels"], seed=seed)
        save(Calibration(model=model, fingerprint=fingerprint, templates=fitted, fitted_on=sources), path)
    return fitted


def _noise(probabilities: Sequence[float], outcomes: Sequence[float]) -> float:
    """The mean ECE of perfect probabilities: a bin's gap is then about normal, and the mean of |normal| is
    sqrt(2/pi) of its standard deviation.
    """
    bins = [b for b in stats.reliability_bins(probabilities, outcomes) if b.probability is not None]
    gaps = [math.sqrt(2 / math.pi * b.count * b.probability * (1 - b.probability)) for b in bins if b.probability]
    return math.fsum(gaps) / len(probabilities)


def _temperature(pairs: Sequence[Reading]) -> float | None:
    return fit_pairs([-pair.wrongness for pair in pairs])


def _folds(pairs: Sequence[Reading], seed: int) -> list[list[Reading]]:
    """The pairs in FOLDS parts; those of one prompt are in the same."""
    order = shuffled({reading.group for reading in pairs}, seed)
    place = {prompt: index % FOLDS for index, prompt in enumerate(order)}
    return [[reading for reading in pairs if place[reading.group] == fold] for fold in range(FOLDS)]


def _fits(judged: Sequence[tuple[Reading, tuple[float, float]]], key: Callable[[Reading], str]) -> dict[str, Fit]:
    groups: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for reading, one in judged:
        groups[key(reading)].append(one)
    return {name: found for name, group in sorted(groups.items()) if (found := fit_of(group)) is not None}


def _labelled(reading: Reading) -> LabelledSample:
    """The reading as the calibration takes it: good answers, and worse ones. Those of one prompt share a name."""
    sides: tuple[list[float], list[float]] = [], []
    for value, target in zip(reading.log_odds, (reading.target, 1 - reading.target), strict=False):
        sides[target <= 0.5].append(value)
    return LabelledSample(reading.group, tuple(sides[0]), tuple(sides[1]))

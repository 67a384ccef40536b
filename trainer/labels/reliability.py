"""How far a judge's labels can be trusted, measured on the run's own samples before anything is trained on them.

Whoever labels at random changes the verdict with the order of two responses in half of the pairs, and agrees with
another wording of the question in half of them. What asks the judge is in `measuring.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Final

from client.benchmarks.report.formats import percent
from client.benchmarks.rows import Row
from client.labels.candidates import CandidatePair
from client.labels.records import SampleKey, Score
from client.stats import mean, quantile, ranked_correlation, wilson
from trainer.run.records import Record, Sample

RELIABILITY_FILE: Final = "reliability.json"
CHANCE: Final = 0.5
_LOW: Final = 0.05
# What a check of the labels prefers, and what follows if checks contradict each other, or not all show anything.
_MORE: Final = "the chosen responses more often than chance would"
_NO_MORE: Final = "the chosen responses no more often than chance would"
_LESS: Final = "the rejected responses"
_CONTRADICTED: Final = ". The judge contradicts itself: expect little of these labels"
_HALF_BACKED: Final = ". Only one of the two shows that these labels are more than chance"
_UNBACKED: Final = ": nothing here shows that these labels are better than random ones"


class Share(Record):
    """`count` of `of`, as a share with its 95% Wilson interval; null of nothing."""

    count: float
    of: int
    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def among(cls, count: float, of: int) -> Share:
        """The share of `count` among `of` independent cases."""
        low, high = wilson(count, of) if of else (None, None)
        return cls(count=count, of=of, value=count / of if of else None, low=low, high=high)

    def __str__(self) -> str:
        """For a sentence: 61.0% (95% interval 51.2 to 70.0) of 100."""
        return f"{percent(self.value)}% (95% interval {percent(self.low)} to {percent(self.high)}) of {self.of}"


class Concordance(Record):
    """How two numbers order the responses of the same prompt.

    `alike` is the share of the `comparisons` (two responses of one prompt, neither number equal) that both order the
    same way, `tau` Kendall's tau-b over all such comparisons, equal numbers included, and `rho` Spearman's correlation
    over all responses. Comparisons of one prompt are not independent, so there is no interval.
    """

    responses: int
    comparisons: int
    alike: float | None
    tau: float | None
    rho: float | None


class Orders(Record):
    """The same pairs shown in both orders: `flips` changed their winner, `agrees` have the chosen response as the
    winner by both orders together (a tie counts half), `first_log_odds` is what being shown first is worth.
    """

    failed: int
    flips: Share
    agrees: Share
    first_log_odds: float | None


class Wording(Record):
    """The same responses under a second wording of the question, `templates` by category.

    `agrees` are the pairs whose chosen response the second wording prefers too (a tie counts half).
    """

    templates: dict[str, str]
    failed: int
    agrees: Share
    scores: Concordance
    label_mass: float | None


class LabelMass(Record):
    """The probability that the judge puts on its labels, over all scored samples: mean and 5th percentile."""

    mean: float
    low: float


class Reliability(Record):
    """reliability.json: measured on `pairs` of the run's pairs, one a prompt, and all samples of these prompts.

    `orders` and `wording` are null for a labeler without questions, `wording` also for a judge with a single template.
    """

    labeler: str
    pairs: int
    orders: Orders | None
    wording: Wording | None
    length: Concordance
    label_mass: LabelMass | None

    @property
    def sentences(self) -> list[str]:
        """The numbers in words, the conclusion first."""
        return [*self._conclusion(), *self._numbers()]

    def _conclusion(self) -> Iterator[str]:
        checks = {
            "another wording of the question": self.wording,
            "the judge, shown both responses in both orders,": self.orders,
        }
        shares = {who: check.agrees for who, check in checks.items() if check is not None and check.agrees.of}
        found = {who: _preference(share) for who, share in shares.items()}
        if found:
            said = "; ".join(f"{who} prefers {what}" for who, what in found.items())
            yield said[0].upper() + said[1:] + _what_follows({*found.values()})
        if self.orders is not None and self.orders.flips.low is not None and self.orders.flips.low > CHANCE:
            yield "The order in which two responses are shown decides more pairs than their contents do"

    def _numbers(self) -> Iterator[str]:
        if self.orders is not None:
            yield (
                f"order: the preferred response changes with it in {self.orders.flips} pairs; by both orders together "
                f"the judge prefers the chosen response in {self.orders.agrees}"
            )
        if self.wording is not None:
            yield (
                f"wording: a second one prefers the chosen response in {self.wording.agrees} pairs; "
                f"{_correlations(self.wording.scores)}"
            )
        if self.length.alike is not None:
            yield (
                f"length: the longer response has the higher score in {percent(self.length.alike)}% of "
                f"{self.length.comparisons} comparisons within a prompt; {_correlations(self.length)}"
            )
        if self.label_mass is not None:
            yield f"label mass: {self.label_mass.mean:.3f} on average, {self.label_mass.low:.3f} at the 5th percentile"


def _preference(share: Share) -> str:
    """What a share of pairs with the chosen response as the winner says by its interval."""
    assert share.low is not None
    assert share.high is not None
    return _MORE if share.low > CHANCE else _LESS if share.high < CHANCE else _NO_MORE


def _what_follows(found: set[str]) -> str:
    if _MORE not in found:
        return _UNBACKED
    return _CONTRADICTED if _LESS in found else _HALF_BACKED if _NO_MORE in found else ""


def _correlations(found: Concordance) -> str:
    tau, rho = ("none" if value is None else f"{value:+.2f}" for value in (found.tau, found.rho))
    return f"Kendall's tau within prompts {tau}, Spearman's rho over all responses {rho}"


def concordance(groups: Sequence[Sequence[tuple[float, float]]]) -> Concordance:
    """The concordance of two numbers; each group has the pairs of numbers of one prompt's responses."""
    alike = against = first_only = second_only = 0
    for group in groups:
        for one, other in combinations(group, 2):
            first, second = one[0] - other[0], one[1] - other[1]
            if first and second:
                alike, against = (alike + 1, against) if (first > 0) == (second > 0) else (alike, against + 1)
            else:
                first_only, second_only = first_only + bool(first), second_only + bool(second)
    decided = alike + against
    scale = math.sqrt((decided + first_only) * (decided + second_only))
    numbers = [pair for group in groups for pair in group]
    return Concordance(
        responses=len(numbers),
        comparisons=decided,
        alike=alike / decided if decided else None,
        tau=(alike - against) / scale if scale else None,
        rho=ranked_correlation(*zip(*numbers, strict=True)) if len(numbers) > 1 else None,
    )


def orders_of(rows: Sequence[Row]) -> Orders:
    """What pairs judged in both orders say; the chosen response is that of the labels."""
    judged = [row for row in rows if row.error is None]
    margins = [row.margin_table[0][0] for row in judged]
    return Orders(
        failed=len(rows) - len(judged),
        flips=Share.among(sum(row.flips or 0 for row in judged), len(judged)),
        agrees=Share.among(_preferring(margins), len(margins)),
        first_log_odds=mean([row.first_log_odds or 0.0 for row in judged]) if judged else None,
    )


def wording_of(
    templates: Mapping[str, str],
    pairs: Sequence[CandidatePair],
    samples: Mapping[str, Sequence[Sample]],
    first: Mapping[SampleKey, Score],
    second: Mapping[SampleKey, Score],
) -> Wording:
    """How the second wording's scores go with the first's; `samples` are those of the measured prompts, by prompt."""
    margins = [margin for pair in pairs if (margin := second_margin(pair, second)) is not None]
    masses = [score.label_mass for score in second.values() if score.label_mass is not None]
    return Wording(
        templates=dict(templates),
        failed=sum(score.error is not None for score in second.values()),
        agrees=Share.among(_preferring(margins), len(margins)),
        scores=concordance(
            [
                [
                    (one, other)
                    for sample in group
                    if (one := _log_odds(first, sample.key)) is not None
                    and (other := _log_odds(second, sample.key)) is not None
                ]
                for group in samples.values()
            ]
        ),
        label_mass=mean(masses) if masses else None,
    )


def lengths_of(samples: Mapping[str, Sequence[Sample]], scores: Mapping[SampleKey, Score]) -> Concordance:
    """How scores go with lengths in characters."""
    return concordance(
        [
            [
                (float(len(sample.response)), log_odds)
                for sample in group
                if (log_odds := _log_odds(scores, sample.key)) is not None
            ]
            for group in samples.values()
        ]
    )


def label_mass_of(scores: Mapping[SampleKey, Score]) -> LabelMass | None:
    """None for a labeler that is no model."""
    masses = [score.label_mass for score in scores.values() if score.label_mass is not None]
    return LabelMass(mean=mean(masses), low=quantile(masses, _LOW)) if masses else None


def second_margin(pair: CandidatePair, second: Mapping[SampleKey, Score]) -> float | None:
    """By how many log-odds the second wording prefers the pair's chosen response; None if it has not judged both."""
    chosen, rejected = (_log_odds(second, one.sample.key) for one in (pair.chosen, pair.rejected))
    return None if chosen is None or rejected is None else chosen - rejected


def _log_odds(scores: Mapping[SampleKey, Score], key: SampleKey) -> float | None:
    score = scores.get(key)
    return None if score is None else score.log_odds


def _preferring(margins: Sequence[float]) -> float:
    """How many margins are above 0; a tie counts half."""
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)

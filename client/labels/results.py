"""What a labelling came to: counts, statistics of the pairs, and agreement with labels that were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from client.labels.candidates import CandidatePair
from client.labels.reading import LabelData, ResponseSet
from client.labels.records import LabelLine, PairStats, SampleKey, Score, count_by
from client.stats import wilson


class Agreement(LabelLine):
    """How often the judge prefers the response that the data call better.

    `compared = agreed + flipped + ties + unjudged`, over every better response against every worse one of its prompt;
    `share` is agreed / (agreed + flipped), with its 95% interval.
    """

    compared: int
    agreed: int
    flipped: int
    ties: int
    unjudged: int
    share: float | None
    low: float | None
    high: float | None


class LabelStats(LabelLine):
    """stats.json. `failures` counts the responses without a score by error code, empty ones included.

    In `pairs`, an instruction is a prompt with responses and a sample one of these; with several pairs a prompt,
    `paired` is how many prompts have one. `agreement` is null for data without labels.
    """

    prompts: int
    bad_rows: int
    without_responses: int
    responses: int
    scored: int
    failures: dict[str, int]
    paired: int
    pairs: PairStats
    agreement: Agreement | None


class Flip(LabelLine):
    """A line of flips.jsonl: labels that the judge would turn round, by `margin` log-odds; texts as the data have them.

    `chosen_sample` and `rejected_sample` number the responses as scores.jsonl does.
    """

    id: str
    margin: float
    chosen_sample: int
    rejected_sample: int
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """The data with their scores and pairs, and the statistics."""

    data: LabelData
    scores: Mapping[SampleKey, Score]
    pairs: Mapping[str, Sequence[CandidatePair]]
    stats: LabelStats


def label_stats(
    data: LabelData,
    scores: Mapping[SampleKey, Score],
    pairs: Mapping[str, Sequence[CandidatePair]],
    pair_stats: PairStats,
) -> LabelStats:
    """The numbers of stats.json."""
    return LabelStats(
        prompts=len(data.sets),
        bad_rows=data.bad_rows,
        without_responses=sum(not one.responses for one in data.sets),
        responses=len(scores),
        scored=sum(score.error is None for score in scores.values()),
        failures=count_by(score.error.code for score in scores.values() if score.error is not None),
        paired=len(pairs),
        pairs=pair_stats,
        agreement=_agreement(data, scores),
    )


def flips(data: LabelData, scores: Mapping[SampleKey, Score]) -> Iterator[Flip]:
    """Every given preference that the judge turns round, in the order of the data."""
    for one in data.sets:
        for better, worse, margin in _comparisons(one, scores):
            if margin is not None and margin < 0:
                yield Flip(
                    id=one.id,
                    margin=-margin,
                    chosen_sample=better,
                    rejected_sample=worse,
                    prompt=one.prompt_text,
                    chosen=one.responses[better],
                    rejected=one.responses[worse],
                )


def _agreement(data: LabelData, scores: Mapping[SampleKey, Score]) -> Agreement | None:
    margins = [margin for one in data.sets for _, _, margin in _comparisons(one, scores)]
    if not margins:
        return None
    judged = [margin for margin in margins if margin is not None]
    agreed, flipped = sum(margin > 0 for margin in judged), sum(margin < 0 for margin in judged)
    decided = agreed + flipped
    low, high = wilson(agreed, decided) if decided else (None, None)
    return Agreement(
        compared=len(margins),
        agreed=agreed,
        flipped=flipped,
        ties=len(judged) - decided,
        unjudged=len(margins) - len(judged),
        share=agreed / decided if decided else None,
        low=low,
        high=high,
    )


def _comparisons(one: ResponseSet, scores: Mapping[SampleKey, Score]) -> Iterator[tuple[int, int, float | None]]:
    """Each given preference as the numbers of both responses and the margin in log-odds; None if one has no score."""
    if not one.better:
        return
    log_odds = [scores[one.id, number].log_odds for number in range(len(one.responses))]
    for better, first in enumerate(log_odds[: one.better]):
        for worse, second in enumerate(log_odds[one.better :], start=one.better):
            yield better, worse, None if first is None or second is None else first - second

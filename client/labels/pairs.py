"""From scores to preference pairs: each prompt's best response against its worst, by log-odds.

Everything left out is counted, by reason, in PairStats. The same responses and scores always give the same pairs,
whatever the order of the lines.

A response cut off at the limit of new tokens may be rejected, but by default not chosen: it is half an answer, and a
training that ends each response with the end of a turn, as TRL's does, would teach the policy to stop in mid-sentence.
Rejecting one does no harm, and where most responses are cut off, leaving them out would cost most of the pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import fmean, median
from typing import Final, Literal, Protocol, TypeAlias

from client.labels.candidates import Answer, CandidatePair, ScoredSample, balance_lengths
from client.labels.records import CategoryStats, Histogram, Pair, PairStats, SampleKey, Score, count_by
from client.schema import Message
from client.texts import EMPTY_RESPONSE, is_blank

CutOff: TypeAlias = Literal["reject-only", "keep", "drop"]
Rejected: TypeAlias = Literal["worst", "middle"]

HISTOGRAM_BINS: Final = 20


class AskedPrompt(Protocol):
    """What the responses answer."""

    @property
    def id(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def messages(self) -> list[Message]: ...


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How pairs are chosen. Raises ValueError for a negative margin.

    A pair needs a margin above 0 and of at least `min_margin` log-odds. `cut_off` decides about responses that were cut
    off: rejected but never chosen, treated like others, or dropped. `rejected` is the worst response, or the middle
    one of those below the best. `length_balance` replaces best against worst by pairs whose lengths even out; see
    client.labels.candidates.balance_lengths.
    """

    min_margin: float = field(
        default=0.0, metadata={"help": "least margin between chosen and rejected response, in log-odds"}
    )
    cut_off: CutOff = field(
        default="reject-only", metadata={"help": "how to use responses that were cut off at --max-new-tokens"}
    )
    length_balance: bool = field(
        default=False,
        metadata={"help": "choose pairs so that chosen and rejected responses are equally long on average"},
    )
    rejected: Rejected = field(
        default="worst", metadata={"help": "which response the best one is paired with; `middle` is nearer to it"}
    )

    def __post_init__(self) -> None:
        if self.length_balance and self.rejected != "worst":
            raise ValueError("--length-balance chooses the rejected response by itself: leave --rejected out")
        if not 0 <= self.min_margin < inf:
            raise ValueError(f"the minimum margin must be 0 or more log-odds, and finite, not {self.min_margin}")


@dataclass(frozen=True, slots=True)
class RankLimits:
    """Each of a prompt's `top` best responses is paired with each of its `bottom` worst.

    Raises ValueError for numbers below 1. With `PairOptions.length_balance` the limits do not apply.
    """

    top: int = 1
    bottom: int = 1

    def __post_init__(self) -> None:
        if min(self.top, self.bottom) < 1:
            raise ValueError(f"at least one response must be on either side, not {self.top} and {self.bottom}")


BEST_AGAINST_WORST: Final = RankLimits()


def choose_pairs(
    prompts: Iterable[AskedPrompt],
    samples: Sequence[Answer],
    scores: Mapping[SampleKey, Score],
    options: PairOptions,
    limits: RankLimits = BEST_AGAINST_WORST,
    is_reliable: Callable[[CandidatePair], bool] | None = None,
) -> tuple[dict[str, list[CandidatePair]], PairStats]:
    """The pairs of each prompt that has any, by its id, in the order of the prompts; and how they came about.

    Every sample's id must be that of a prompt. Prompts without samples do not count in the statistics. Two responses
    that are not reliably ordered, if there is `is_reliable` to say so, make no pair.
    """
    finder = CandidateFinder(scores, options, is_reliable)
    grouped: dict[str, list[Answer]] = {}
    for sample in samples:
        grouped.setdefault(sample.id, []).append(sample)
    sampled = [prompt for prompt in prompts if prompt.id in grouped]
    found: dict[str, list[CandidatePair]] = {}
    for prompt in sampled:
        if candidates := finder.candidates(grouped[prompt.id]):
            found[prompt.id] = _chosen_of(candidates, options, limits)
    if options.length_balance:
        found = {name: [pair] for name, pair in balance_lengths(found).items()}
    return found, _pair_stats(sampled, samples, finder, found)


def _chosen_of(candidates: Sequence[CandidatePair], options: PairOptions, limits: RankLimits) -> list[CandidatePair]:
    if options.length_balance:
        return list(candidates)
    if options.rejected == "worst":
        return within_limits(candidates, limits)
    best = [pair for pair in candidates if pair.chosen is candidates[0].chosen]
    return [best[len(best) // 2]]


def pair_of(prompt: AskedPrompt, pair: CandidatePair, before: Sequence[Message] = ()) -> Pair:
    """The line of pairs.jsonl; `before` are messages in front of the prompt's own."""
    return Pair(
        prompt=[*before, *prompt.messages],
        chosen=[Message(role="assistant", content=pair.chosen.sample.response)],
        rejected=[Message(role="assistant", content=pair.rejected.sample.response)],
        id=prompt.id,
        category=prompt.category,
        margin=pair.margin,
        score_chosen=pair.chosen.score,
        score_rejected=pair.rejected.score,
    )


def within_limits(candidates: Sequence[CandidatePair], limits: RankLimits) -> list[CandidatePair]:
    """The candidates of the best and worst responses that the limits allow, widest margin first.

    `candidates` has the widest margin first: so a response's first pair gives its rank from the top, and the pairs of
    the best response, which has one with every worse response, give the ranks from the bottom.
    """
    ranked = list(dict.fromkeys(pair.chosen.sample.key for pair in candidates))
    top = ranked[: limits.top]
    bottom = [pair.rejected.sample.key for pair in candidates if pair.chosen.sample.key == ranked[0]][: limits.bottom]
    return [pair for pair in candidates if pair.chosen.sample.key in top and pair.rejected.sample.key in bottom]


class CandidateFinder:
    """Finds each prompt's candidate pairs, and counts what is left out by the names of PairStats' fields."""

    def __init__(
        self,
        scores: Mapping[SampleKey, Score],
        options: PairOptions,
        is_reliable: Callable[[CandidatePair], bool] | None = None,
    ) -> None:
        self._scores, self._options, self._is_reliable = scores, options, is_reliable
        self.counts: Counter[str] = Counter()
        self.error_codes: list[str] = []

    def candidates(self, samples: Sequence[Answer]) -> list[CandidatePair]:
        """All pairs of one prompt's responses that may be trained on, widest margin first; maybe none."""
        usable = self._usable(sorted(samples, key=lambda sample: sample.sample))
        self.counts["usable"] += len(usable)
        if len(usable) < 2:
            self.counts["too_few"] += 1
            return []
        only_rejected = self._options.cut_off == "reject-only"
        choosable = [one for one in usable if one.sample.finish == "stop" or not only_rejected]
        if not choosable:
            self.counts["unfinished"] += 1
            return []
        pairs = sorted(
            (CandidatePair(one, other) for one in choosable for other in usable if other is not one), key=_rank
        )
        widest = pairs[0].margin
        if widest == 0:
            self.counts["ties"] += 1
            return []
        # A finished response that is the worst one has a negative margin to all others.
        if widest < max(self._options.min_margin, 0.0):
            self.counts["below_margin"] += 1
            return []
        wide = [pair for pair in pairs if pair.margin > 0 and pair.margin >= self._options.min_margin]
        reliable = wide if self._is_reliable is None else list(filter(self._is_reliable, wide))
        self.counts["unreliable"] += not reliable
        return reliable

    def _usable(self, samples: Sequence[Answer]) -> list[ScoredSample]:
        usable: dict[str, ScoredSample] = {}
        for sample in samples:
            text, score = sample.response.strip(), self._scores.get(sample.key)
            reason = self._reason_against(sample, score)
            if reason is None and text in usable:
                reason = "duplicates"
            if reason is not None:
                self.counts[reason] += 1
                continue
            assert score is not None
            assert score.log_odds is not None
            assert score.score is not None
            usable[text] = ScoredSample(sample, score.log_odds, score.score)
        return list(usable.values())

    def _reason_against(self, sample: Answer, score: Score | None) -> str | None:
        """Why a sample is unusable by itself, as a field of PairStats; None if it is usable."""
        if is_blank(sample.response):
            return "empty"
        if sample.finish == "length" and self._options.cut_off == "drop":
            return "cut_off"
        if score is None:
            return "unscored"
        if score.error is None:
            return None
        if score.error.code == EMPTY_RESPONSE:
            return "empty"
        self.error_codes.append(score.error.code)
        return "failed"


def _rank(pair: CandidatePair) -> tuple[float, bool, int, int]:
    """Widest margin first; then a chosen response that was not cut off, then the earlier samples."""
    chosen, rejected = pair.chosen.sample, pair.rejected.sample
    return -pair.margin, chosen.finish == "length", chosen.sample, rejected.sample


def _pair_stats(
    prompts: Sequence[AskedPrompt],
    samples: Sequence[Answer],
    finder: CandidateFinder,
    found: Mapping[str, Sequence[CandidatePair]],
) -> PairStats:
    counts = finder.counts
    pairs = [pair for of_prompt in found.values() for pair in of_prompt]
    margins = [pair.margin for pair in pairs]
    differences = [pair.length_difference for pair in pairs]
    prompts_by_category = Counter(prompt.category for prompt in prompts)
    paired_by_category = Counter(prompt.category for prompt in prompts if prompt.id in found)
    return PairStats(
        instructions=len(prompts),
        samples=len(samples),
        usable=counts["usable"],
        failed=counts["failed"],
        failures=count_by(finder.error_codes),
        unscored=counts["unscored"],
        empty=counts["empty"],
        cut_off=counts["cut_off"],
        cut_off_share=_share(sum(sample.finish == "length" for sample in samples), len(samples)),
        duplicates=counts["duplicates"],
        too_few=counts["too_few"],
        unfinished=counts["unfinished"],
        ties=counts["ties"],
        tie_share=_share(counts["ties"], len(found) + counts["ties"] + counts["below_margin"] + counts["unreliable"]),
        below_margin=counts["below_margin"],
        unreliable=counts["unreliable"],
        pairs=len(pairs),
        chosen_cut_off=sum(pair.chosen.sample.finish == "length" for pair in pairs),
        margin_mean=fmean(margins) if margins else None,
        margin_median=median(margins) if margins else None,
        margins=_histogram(margins),
        length_difference=fmean(differences) if differences else None,
        chosen_longer=_share(sum((d > 0) + 0.5 * (d == 0) for d in differences), len(differences)),
        by_category={
            name: CategoryStats(instructions=count, pairs=paired_by_category[name])
            for name, count in prompts_by_category.items()
        },
    )


def _histogram(values: Sequence[float]) -> Histogram:
    """HISTOGRAM_BINS bins of equal width from 0 to the largest value; none if there are no values above 0."""
    top = max(values, default=0.0)
    if not top:
        return Histogram(edges=[], counts=[])
    bins = Counter(min(int(value / top * HISTOGRAM_BINS), HISTOGRAM_BINS - 1) for value in values)
    edges = [top * index / HISTOGRAM_BINS for index in range(HISTOGRAM_BINS + 1)]
    return Histogram(edges=edges, counts=[bins[index] for index in range(HISTOGRAM_BINS)])


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None

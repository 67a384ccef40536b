"""Scores to preference pairs: of each instruction's samples the best against the worst, by log-odds.

What is left out is counted, by reason, in PairStats. For one set of samples and scores the pairs are always the same,
whatever the order of the lines.

A response that was cut off at the limit of new tokens may be rejected, but by default not chosen: training ends each
response with the end-of-turn token, so a chosen half would teach the policy to stop in mid-sentence. Keeping it as a
rejected one costs nothing, and where most samples are cut off, leaving it out would cost most of the pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Final, Literal, TypeAlias

from client.benchmarks.run import EMPTY_RESPONSE
from client.schema import Message
from client.texts import is_blank
from trainer.errors import StageError
from trainer.labels.candidates import CandidatePair, ScoredSample, balance_lengths
from trainer.run.files import write_record, write_records
from trainer.run.records import (
    PAIRS_FILE,
    PAIRS_STATS_FILE,
    CategoryStats,
    Histogram,
    Instruction,
    Pair,
    PairStats,
    Sample,
    SampleKey,
    Score,
    count_by,
)

CutOff: TypeAlias = Literal["reject-only", "keep", "drop"]

HISTOGRAM_BINS: Final = 20


class NoPairsError(StageError):
    """No instruction gave a pair; the message says where they went."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How pairs are chosen. Raises ValueError for a margin that is negative.

    A pair needs a margin above 0 and of at least `min_margin` log-odds. `cut_off` says what becomes of responses that
    were cut off: they may be rejected but not chosen, are treated like others, or are left out. `length_balance` takes
    other pairs than best against worst where that evens out the lengths; see trainer.labels.candidates.balance_lengths.
    """

    min_margin: float = field(
        default=0.0, metadata={"help": "the log-odds by which a chosen response must be better than a rejected one"}
    )
    cut_off: CutOff = field(
        default="reject-only", metadata={"help": "what responses cut off at --max-new-tokens may be used for"}
    )
    length_balance: bool = field(
        default=False, metadata={"help": "take pairs whose responses are, on average, equally long"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.min_margin < inf:
            raise ValueError(f"the minimum margin must be 0 or more log-odds, and finite, not {self.min_margin}")


def write_pairs(
    folder: Path,
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    scores: Sequence[Score],
    options: PairOptions,
    system: str | None = None,
) -> PairStats:
    """Make the pairs, and write pairs.jsonl and pairs_stats.json into `folder`.

    Raises NoPairsError where there are none; the statistics are written then too.
    """
    pairs, stats = make_pairs(instructions, samples, scores, options, system)
    write_record(folder / PAIRS_STATS_FILE, stats)
    if not pairs:
        raise NoPairsError(explanation(stats, options))
    write_records(folder / PAIRS_FILE, pairs)
    return stats


def make_pairs(
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    scores: Sequence[Score],
    options: PairOptions,
    system: str | None = None,
) -> tuple[list[Pair], PairStats]:
    """At most one pair for each instruction, in the order of the instructions; of several scores of a sample the last.

    `system` is the message that the samples were asked for with; training repeats it. Raises StageError for a sample of
    an unknown instruction.
    """
    sorter = _Sorter({score.key: score for score in scores}, options)
    of_instruction = _grouped(instructions, samples)
    candidates: dict[str, list[CandidatePair]] = {}
    for instruction in instructions:
        if instruction.id in of_instruction:
            candidates[instruction.id] = sorter.candidates(of_instruction[instruction.id])
    choices = {name: found for name, found in candidates.items() if found}
    chosen = balance_lengths(choices) if options.length_balance else {name: found[0] for name, found in choices.items()}
    before = [] if system is None else [Message(role="system", content=system)]
    pairs = [
        _pair(before, instruction, chosen[instruction.id]) for instruction in instructions if instruction.id in chosen
    ]
    with_samples = [instruction for instruction in instructions if instruction.id in of_instruction]
    return pairs, _stats(with_samples, samples, sorter, list(chosen.values()), pairs)


def explanation(stats: PairStats, options: PairOptions) -> str:
    """Why there are no pairs, for people."""
    samples = {
        "could not be scored": stats.failed,
        "have no score": stats.unscored,
        "are empty": stats.empty,
        "are cut off": stats.cut_off,
        "repeat another response": stats.duplicates,
    }
    instructions = {
        "have fewer than two usable samples": stats.too_few,
        "have cut-off samples only (see samples.jsonl: where responses run on into further turns, put the token that "
        "should end them into eos_token_id of the model's generation_config.json; where they are only long, raise "
        "--max-new-tokens)": stats.unfinished,
        "have samples of equal log-odds": stats.ties,
        f"are below the minimum margin of {options.min_margin:g} log-odds": stats.below_margin,
    }
    return (
        f"no usable pairs: of {stats.samples} samples {_listed(samples)}; "
        f"of {stats.instructions} instructions {_listed(instructions)}"
    )


class _Sorter:
    """Tells usable samples from others, finds their candidates, and counts what is left out."""

    def __init__(self, scores: Mapping[SampleKey, Score], options: PairOptions) -> None:
        self._scores, self._options = scores, options
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def candidates(self, samples: Sequence[Sample]) -> list[CandidatePair]:
        """What may become the pair of one instruction, the widest margin first; none where there is no usable pair."""
        usable = self._usable(sorted(samples, key=lambda sample: sample.sample))
        self.counts["usable"] += len(usable)
        if len(usable) < 2:
            self.counts["too_few"] += 1
            return []
        only_rejected = self._options.cut_off == "reject-only"
        good = [one for one in usable if one.sample.finish == "stop" or not only_rejected]
        if not good:
            self.counts["unfinished"] += 1
            return []
        found = [CandidatePair(one, other) for one in good for other in usable if other is not one]
        found.sort(key=_rank)
        widest = found[0].margin
        if widest == 0:
            self.counts["ties"] += 1
            return []
        if widest < max(self._options.min_margin, 0.0):
            self.counts["below_margin"] += 1
            return []
        return [one for one in found if one.margin > 0 and one.margin >= self._options.min_margin]

    def _usable(self, samples: Sequence[Sample]) -> list[ScoredSample]:
        usable: list[ScoredSample] = []
        seen: set[str] = set()
        for sample in samples:
            text, score = sample.response.strip(), self._scores.get(sample.key)
            reason = self._reason_against(sample, score)
            if reason is None and text in seen:
                reason = "duplicates"
            if reason is not None:
                self.counts[reason] += 1
                continue
            assert score is not None
            assert score.log_odds is not None
            assert score.score is not None
            seen.add(text)
            usable.append(ScoredSample(sample, score.log_odds, score.score))
        return usable

    def _reason_against(self, sample: Sample, score: Score | None) -> str | None:
        """Why a sample is of no use by itself, as a field of PairStats."""
        if is_blank(sample.response):
            return "empty"
        if sample.finish == "length" and self._options.cut_off == "drop":
            return "cut_off"
        if score is None:
            return "unscored"
        if score.error is not None:
            self.failures.append(score.error.code)
            return "empty" if score.error.code == EMPTY_RESPONSE else "failed"
        return None


def _rank(candidate: CandidatePair) -> tuple[float, bool, int, int]:
    """The widest margin first; of equal ones a chosen response that is not cut off, then the earlier samples."""
    chosen, rejected = candidate.chosen.sample, candidate.rejected.sample
    return -candidate.margin, chosen.finish == "length", chosen.sample, rejected.sample


def _grouped(instructions: Sequence[Instruction], samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    known = {instruction.id for instruction in instructions}
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.id not in known:
            raise StageError(f"sample {sample.id}/{sample.sample} belongs to no instruction of this run")
        groups.setdefault(sample.id, []).append(sample)
    return groups


def _pair(before: list[Message], instruction: Instruction, candidate: CandidatePair) -> Pair:
    return Pair(
        prompt=[*before, Message(role="user", content=instruction.prompt)],
        chosen=[Message(role="assistant", content=candidate.chosen.sample.response)],
        rejected=[Message(role="assistant", content=candidate.rejected.sample.response)],
        id=instruction.id,
        category=instruction.category,
        margin=candidate.margin,
        score_chosen=candidate.chosen.score,
        score_rejected=candidate.rejected.score,
    )


def _stats(
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    sorter: _Sorter,
    chosen: Sequence[CandidatePair],
    pairs: Sequence[Pair],
) -> PairStats:
    counts = sorter.counts
    margins = [candidate.margin for candidate in chosen]
    differences = [candidate.length_difference for candidate in chosen]
    compared = len(pairs) + counts["ties"] + counts["below_margin"]
    of_category = Counter(instruction.category for instruction in instructions)
    pairs_of = Counter(pair.category for pair in pairs)
    return PairStats(
        instructions=len(instructions),
        samples=len(samples),
        usable=counts["usable"],
        failed=counts["failed"],
        failures=count_by(code for code in sorter.failures if code != EMPTY_RESPONSE),
        unscored=counts["unscored"],
        empty=counts["empty"],
        cut_off=counts["cut_off"],
        cut_off_share=_share(sum(sample.finish == "length" for sample in samples), len(samples)),
        duplicates=counts["duplicates"],
        too_few=counts["too_few"],
        unfinished=counts["unfinished"],
        ties=counts["ties"],
        tie_share=_share(counts["ties"], compared),
        below_margin=counts["below_margin"],
        pairs=len(pairs),
        chosen_cut_off=sum(candidate.chosen.sample.finish == "length" for candidate in chosen),
        margin_mean=fmean(margins) if margins else None,
        margin_median=median(margins) if margins else None,
        margins=_histogram(margins),
        length_difference=fmean(differences) if differences else None,
        chosen_longer=_share(sum((d > 0) + 0.5 * (d == 0) for d in differences), len(differences)),
        by_category={
            name: CategoryStats(instructions=count, pairs=pairs_of[name]) for name, count in of_category.items()
        },
    )


def _histogram(values: Sequence[float]) -> Histogram:
    """HISTOGRAM_BINS bins of equal width from 0 to the largest value."""
    top = max(values, default=0.0)
    if not top:
        return Histogram(edges=[], counts=[])
    bins = Counter(min(int(value / top * HISTOGRAM_BINS), HISTOGRAM_BINS - 1) for value in values)
    edges = [top * index / HISTOGRAM_BINS for index in range(HISTOGRAM_BINS + 1)]
    return Histogram(edges=edges, counts=[bins[index] for index in range(HISTOGRAM_BINS)])


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _listed(counts: Mapping[str, int]) -> str:
    """The reasons that occurred, with their numbers."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "all are usable"

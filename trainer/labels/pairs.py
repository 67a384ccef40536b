"""From scores to preference pairs: each instruction's best sample against its worst, by log-odds.

Everything left out is counted, by reason, in PairStats. The same samples and scores always give the same pairs,
whatever the order of the lines.

A response cut off at the limit of new tokens may be rejected, but by default not chosen: training ends each response
with the end-of-turn token, so choosing one would teach the policy to stop in mid-sentence. Rejecting one does no harm,
and where most samples are cut off, leaving them out would cost most of the pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Final, Literal, TypeAlias

from client.schema import Message
from client.texts import EMPTY_RESPONSE, is_blank
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
    """No instruction gave a pair; the message counts the reasons."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How pairs are chosen. Raises ValueError for a negative margin.

    A pair needs a margin above 0 and of at least `min_margin` log-odds. `cut_off` decides about responses that were cut
    off: rejected but never chosen, treated like others, or dropped. `length_balance` replaces best against worst by
    pairs whose lengths even out; see trainer.labels.candidates.balance_lengths.
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

    Raises NoPairsError if there are none; the statistics are written even then.
    """
    pairs, stats = make_pairs(instructions, samples, scores, options, system)
    write_record(folder / PAIRS_STATS_FILE, stats)
    if not pairs:
        raise NoPairsError(explain_no_pairs(stats, options))
    write_records(folder / PAIRS_FILE, pairs)
    return stats


def make_pairs(
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    scores: Sequence[Score],
    options: PairOptions,
    system: str | None = None,
) -> tuple[list[Pair], PairStats]:
    """At most one pair per instruction, in the instructions' order; the last of several scores of a sample counts.

    `system` is the system message the samples were generated with; training repeats it. Raises StageError for a sample
    of an unknown instruction.
    """
    finder = _CandidateFinder({score.key: score for score in scores}, options)
    grouped = _by_instruction(instructions, samples)
    sampled = [instruction for instruction in instructions if instruction.id in grouped]
    found = {instruction.id: finder.candidates(grouped[instruction.id]) for instruction in sampled}
    candidates = {name: pairs for name, pairs in found.items() if pairs}
    widest = {name: pairs[0] for name, pairs in candidates.items()}
    chosen = balance_lengths(candidates) if options.length_balance else widest
    before = [] if system is None else [Message(role="system", content=system)]
    pairs = [
        _pair(before, instruction, chosen[instruction.id]) for instruction in instructions if instruction.id in chosen
    ]
    return pairs, _pair_stats(sampled, samples, finder, chosen)


def explain_no_pairs(stats: PairStats, options: PairOptions) -> str:
    """What became of all samples and instructions, as an error message."""
    samples = {
        "could not be scored": stats.failed,
        "have no score": stats.unscored,
        "are empty": stats.empty,
        "are cut off": stats.cut_off,
        "repeat another response": stats.duplicates,
    }
    instructions = {
        "have fewer than two usable samples": stats.too_few,
        "have cut-off samples only (see samples.jsonl: if responses run on into further turns, add the token that "
        "should end them to eos_token_id in the model's generation_config.json; if they are merely long, raise "
        "--max-new-tokens)": stats.unfinished,
        "have samples of equal log-odds": stats.ties,
        f"are below the minimum margin of {options.min_margin:g} log-odds": stats.below_margin,
    }
    return (
        f"no usable pairs: of {stats.samples} samples {_listed(samples)}; "
        f"of {stats.instructions} instructions {_listed(instructions)}"
    )


class _CandidateFinder:
    """Finds each instruction's candidate pairs, and counts what is left out by the names of PairStats' fields."""

    def __init__(self, scores: Mapping[SampleKey, Score], options: PairOptions) -> None:
        self._scores, self._options = scores, options
        self.counts: Counter[str] = Counter()
        self.error_codes: list[str] = []

    def candidates(self, samples: Sequence[Sample]) -> list[CandidatePair]:
        """All pairs of one instruction's samples that may be trained on, widest margin first; maybe none."""
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
        return [pair for pair in pairs if pair.margin > 0 and pair.margin >= self._options.min_margin]

    def _usable(self, samples: Sequence[Sample]) -> list[ScoredSample]:
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

    def _reason_against(self, sample: Sample, score: Score | None) -> str | None:
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


def _by_instruction(instructions: Sequence[Instruction], samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    known = {instruction.id for instruction in instructions}
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.id not in known:
            raise StageError(f"sample {sample.id}/{sample.sample} belongs to no instruction of this run")
        groups.setdefault(sample.id, []).append(sample)
    return groups


def _pair(before: list[Message], instruction: Instruction, pair: CandidatePair) -> Pair:
    return Pair(
        prompt=[*before, Message(role="user", content=instruction.prompt)],
        chosen=[Message(role="assistant", content=pair.chosen.sample.response)],
        rejected=[Message(role="assistant", content=pair.rejected.sample.response)],
        id=instruction.id,
        category=instruction.category,
        margin=pair.margin,
        score_chosen=pair.chosen.score,
        score_rejected=pair.rejected.score,
    )


def _pair_stats(
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    finder: _CandidateFinder,
    pairs: Mapping[str, CandidatePair],
) -> PairStats:
    counts = finder.counts
    margins = [pair.margin for pair in pairs.values()]
    differences = [pair.length_difference for pair in pairs.values()]
    instructions_by_category = Counter(instruction.category for instruction in instructions)
    pairs_by_category = Counter(instruction.category for instruction in instructions if instruction.id in pairs)
    return PairStats(
        instructions=len(instructions),
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
        tie_share=_share(counts["ties"], len(pairs) + counts["ties"] + counts["below_margin"]),
        below_margin=counts["below_margin"],
        pairs=len(pairs),
        chosen_cut_off=sum(pair.chosen.sample.finish == "length" for pair in pairs.values()),
        margin_mean=fmean(margins) if margins else None,
        margin_median=median(margins) if margins else None,
        margins=_histogram(margins),
        length_difference=fmean(differences) if differences else None,
        chosen_longer=_share(sum((d > 0) + 0.5 * (d == 0) for d in differences), len(differences)),
        by_category={
            name: CategoryStats(instructions=count, pairs=pairs_by_category[name])
            for name, count in instructions_by_category.items()
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


def _listed(counts: Mapping[str, int]) -> str:
    """The reasons that occurred, with their counts."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "all are usable"

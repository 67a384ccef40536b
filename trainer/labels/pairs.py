"""A round's pairs: pairs.jsonl and its statistics, made by client/labels/pairs.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from client.labels.candidates import CandidatePair
from client.labels.pairs import BEST_AGAINST_WORST, PairOptions, choose_pairs, pair_of
from client.labels.records import Pair, PairStats, Score
from client.schema import Message
from client.stats import wilson
from trainer.errors import StageError
from trainer.labels.reliability import CHANCE
from trainer.run.files import write_record, write_records
from trainer.run.records import PAIRS_FILE, PAIRS_STATS_FILE, Instruction, Sample, SampledPair


class NoPairsError(StageError):
    """No instruction gave a pair; the message counts the reasons."""


def write_pairs(
    folder: Path,
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    scores: Sequence[Score],
    options: PairOptions,
    system: str | None = None,
    is_reliable: Callable[[CandidatePair], bool] | None = None,
) -> PairStats:
    """Make the pairs, and write pairs.jsonl and pairs_stats.json into `folder`.

    Raises NoPairsError if there are none; the statistics are written even then.
    """
    pairs, stats = make_pairs(instructions, samples, scores, options, system, is_reliable)
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
    is_reliable: Callable[[CandidatePair], bool] | None = None,
) -> tuple[list[SampledPair], PairStats]:
    """At most one pair per instruction, in the instructions' order; the last of several scores of a sample counts.

    `system` is the system message the samples were generated with; training repeats it. `is_reliable` is that of
    client.labels.pairs.choose_pairs. Raises StageError for a sample of an unknown instruction.
    """
    known = {instruction.id for instruction in instructions}
    for sample in samples:
        if sample.id not in known:
            raise StageError(f"sample {sample.id}/{sample.sample} belongs to no instruction of this run")
    by_key = {score.key: score for score in scores}
    found, stats = choose_pairs(instructions, samples, by_key, options, BEST_AGAINST_WORST, is_reliable)
    before = [] if system is None else [Message(role="system", content=system)]
    pairs = [
        _sampled_pair(pair_of(instruction, pair, before), pair)
        for instruction in instructions
        for pair in found.get(instruction.id, ())
    ]
    return pairs, stats


def _sampled_pair(line: Pair, pair: CandidatePair) -> SampledPair:
    return SampledPair(
        **dict(line),
        chosen_cut_off=pair.chosen.sample.finish == "length",
        rejected_cut_off=pair.rejected.sample.finish == "length",
    )


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
        "have no pair that a second wording of the question orders alike (--reliable-pairs)": stats.unreliable,
    }
    return (
        f"no usable pairs: of {stats.samples} samples {_listed(samples)}; "
        f"of {stats.instructions} instructions {_listed(instructions)}"
    )


def length_remark(stats: PairStats) -> str | None:
    """What training does to lengths, if chosen responses are not as often the longer as the shorter ones (95%)."""
    if stats.chosen_longer is None or stats.length_difference is None:
        return None
    low, high = wilson(stats.chosen_longer * stats.pairs, stats.pairs)
    if low <= CHANCE <= high:
        return None
    way, share = ("longer", stats.chosen_longer) if low > CHANCE else ("shorter", 1 - stats.chosen_longer)
    found = (
        f"The chosen response is the {way} one in {100 * share:.0f}% of the pairs, by "
        f"{abs(stats.length_difference):.0f} characters on average, and training tends to make answers {way}"
    )
    if way == "shorter" and stats.cut_off_share and not stats.cut_off and not stats.chosen_cut_off:
        return (
            f"{found}: {100 * stats.cut_off_share:.0f}% of the samples were cut off, which can only be rejected. Raise "
            "--max-new-tokens, or leave them out with --cut-off drop"
        )
    return f"{found}. --length-balance chooses pairs that are equally long on average"


def _listed(counts: Mapping[str, int]) -> str:
    """The reasons that occurred, with their counts."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "all are usable"

"""A labelling's numbers in sentences, for the terminal, the report and errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from client.benchmarks.report.formats import percent
from client.labels.records import PairStats
from client.labels.results import Agreement, LabelStats


def remarks_on(stats: LabelStats) -> list[str]:
    """What was labelled, what became of it, and what to know before trusting it."""
    return list(_remarks(stats))


def no_pairs(stats: LabelStats, min_margin: float) -> str:
    """Why there are no pairs, as an error."""
    reasons = [*_left_out(stats.pairs), *_unusable(stats)]
    return f"no pairs of {stats.prompts} prompts at a minimum margin of {min_margin:g}: {', '.join(reasons)}"


def _remarks(stats: LabelStats) -> Iterator[str]:
    pairs = stats.pairs
    yield (
        f"{pairs.pairs} pairs of {stats.paired} of {stats.prompts} prompts; "
        f"{stats.scored} of {stats.responses} responses scored"
    )
    if left := _left_out(pairs):
        yield f"prompts without a pair: {', '.join(left)}"
    if unusable := _unusable(stats):
        yield f"left out: {', '.join(unusable)}"
    if pairs.margin_mean is not None and pairs.margin_median is not None:
        yield f"margin: mean {pairs.margin_mean:.2f}, median {pairs.margin_median:.2f} log-odds"
    if pairs.length_difference is not None:
        yield (
            f"length: the chosen response is longer in {percent(pairs.chosen_longer)}% of pairs, by "
            f"{pairs.length_difference:+.1f} characters on average"
        )
    if stats.agreement is not None:
        yield _agreed(stats.agreement)


def _agreed(agreement: Agreement) -> str:
    decided = agreement.agreed + agreement.flipped
    return (
        f"agreement with the given labels: {percent(agreement.share)}% of {decided} "
        f"(95% interval {percent(agreement.low)} to {percent(agreement.high)}), {agreement.flipped} flipped, "
        f"{agreement.ties} ties, {agreement.unjudged} not judged"
    )


def _left_out(pairs: PairStats) -> list[str]:
    return _counted(
        {
            "with fewer than two usable responses": pairs.too_few,
            "with equal scores": pairs.ties,
            "below the minimum margin": pairs.below_margin,
        }
    )


def _unusable(stats: LabelStats) -> list[str]:
    codes = {f"responses that failed ({code})": count for code, count in stats.pairs.failures.items()}
    return _counted(
        {
            "rows that cannot be read": stats.bad_rows,
            "prompts without responses": stats.without_responses,
            "empty responses": stats.pairs.empty,
            "responses that repeat another": stats.pairs.duplicates,
            **codes,
        }
    )


def _counted(counts: Mapping[str, int]) -> list[str]:
    """The reasons that occurred."""
    return [f"{count} {reason}" for reason, count in counts.items() if count]

"""How numbers, subsets and texts are put in reports, on the page and on the terminal alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Final

from client.benchmarks.results.paired import Paired
from client.benchmarks.results.summary import Level, SubsetScore, Summary
from client.benchmarks.scoring.rmbench import STYLES, level_scores

# A mean label mass below this, or a share of answers below one half above this, is said in words.
LOW_MASS: Final = 0.5
MANY: Final = 0.1
# Shares of comparisons that flip with the order: a coin's is one half.
MOST_FLIPS: Final = 0.5


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; None as a dash."""
    return "-" if share is None else f"{100 * share:.1f}"


def signed(share: float | None) -> str:
    """A difference of shares in percentage points, with its sign; None as a dash."""
    return "-" if share is None else f"{100 * share:+.1f}"


def p_value(p: float | None) -> str:
    """A p-value with three decimals, or "below 0.001"; None as a dash."""
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def model_name(model: str | None) -> str:
    """A judge's name for a title: of a folder its own name, not its path."""
    if model is None:
        return "no one"
    return PurePath(model).name or model if model.startswith(("/", "./", "../", "~")) else model


def interval_text(level: Level | SubsetScore) -> str:
    """A 95% interval in percent, or a dash where nothing was judged."""
    return "-" if level.low is None else f"{percent(level.low)} to {percent(level.high)}"


def level_text(level: Level) -> str:
    """A share in percent with its interval and chance: "55.0 (95% interval 39.8 to 69.3; chance is 50.0)"."""
    return f"{percent(level.value)} (95% interval {interval_text(level)}; chance is {percent(level.chance)})"


def verdict(summary: Summary) -> str:
    """The run in one sentence: its level, the interval, and whether that is better than chance."""
    if not summary.counts.judged:
        return "No sample was judged: there are no accuracies."
    level = summary.official or summary.accuracy
    if level is None:
        # A summary of an older version.
        return f"Mean {percent(summary.mean)}."
    name = "Mean" if summary.official else "Accuracy"
    against = "no better than chance"
    if level.low > level.chance:
        against = "better than chance"
    elif level.high < level.chance:
        against = "worse than chance: the judge prefers the rejected answers"
    samples = f"{level.samples:,} sample{'' if level.samples == 1 else 's'}"
    return f"{name} {level_text(level)}: on {samples} this is {against}."


def pair_verdict(pair: Paired, baseline: str) -> str:
    """A run against the baseline in one sentence: by how much it is better, if its interval tells."""
    if pair.accuracy is None:
        return f"{pair.run} and {baseline} judged no sample in common: nothing can be told."
    samples = f"on {pair.samples:,} sample{'' if pair.samples == 1 else 's'}"
    found = pair.official_mean if pair.official_mean and pair.official_mean.low is not None else pair.accuracy
    name = "official mean" if found is pair.official_mean else "accuracy"
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        said = f"No difference between {pair.run} and {baseline} can be told {samples}"
    else:
        said = f"{pair.run} is {'better' if found.value > 0 else 'worse'} than {baseline} {samples}"
    interval = "" if found.low is None else f", 95% interval {signed(found.low)} to {signed(found.high)}"
    return f"{said}: {signed(found.value)} points of {name}{interval}."


def caveats(summary: Summary) -> Iterator[str]:
    """What speaks against taking the verdict at face value, in sentences."""
    if summary.counts.judged and summary.mean is None:
        yield "The benchmark's own mean needs samples of every section: the verdict is on all judged samples alike."
    elif summary.counts.judged and summary.official is None and summary.accuracy is not None:
        yield (
            f"The benchmark's own mean is {percent(summary.mean)}. It is no weighted mean of the samples' credits, so "
            "the verdict is on all judged samples alike."
        )
    if (mass := summary.label_mass) is not None and mass.mean < LOW_MASS:
        yield (
            f"Low label mass: on average the model gave the labels {percent(mass.mean)}% of its probability, so it "
            "hardly meant to answer. Trust this little; try another template or model."
        )
    elif mass is not None and mass.share_below_half > MANY:
        yield (
            f"Low label mass: in {percent(mass.share_below_half)}% of the answers the model gave the labels less than "
            "half of its probability."
        )
    if (position := summary.position) is not None and position.flip_rate >= MOST_FLIPS:
        yield (
            f"Position bias: {percent(position.flip_rate)}% of the comparisons change their winner with the order, and "
            "half of them would by chance."
        )


def cut_text(text: str, limit: int) -> str:
    """The text, or its first `limit` characters and a note that says how many are left out."""
    left = len(text) - limit
    return text if left <= 0 else f"{text[:limit]}\n[… {left:,} more characters]"


def by_section(summary: Summary) -> list[tuple[str | None, list[tuple[str, SubsetScore]]]]:
    """The subsets under their sections, in the official order. A section of one subset of the same name is left out."""
    groups: dict[str | None, list[tuple[str, SubsetScore]]] = {}
    for name, subset in summary.subsets.items():
        groups.setdefault(None if subset.section == name else subset.section, []).append((name, subset))
    return list(groups.items())


def style_names(count: int) -> Sequence[str]:
    """The names of a matrix's rows or columns: RM-Bench's styles, or numbers for any other count."""
    return STYLES if count == len(STYLES) else [str(number + 1) for number in range(count)]


def levels(matrix: Sequence[Sequence[float]]) -> str:
    """RM-Bench's easy, normal and hard accuracy of a matrix of its styles; "" for any other matrix."""
    if [len(line) for line in matrix] != [len(STYLES)] * len(STYLES):
        return ""
    return ", ".join(f"{level} {percent(score)}" for level, score in level_scores(matrix).items())

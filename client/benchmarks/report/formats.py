"""How numbers, subsets and texts are put in reports, on the page and on the terminal alike."""

from __future__ import annotations

from collections.abc import Sequence

from client.benchmarks.results.summary import SubsetScore, Summary
from client.benchmarks.scoring.rmbench import STYLES, level_scores


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

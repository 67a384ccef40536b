"""What a round's numbers support, in sentences, and which answers show it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from client.benchmarks.report.formats import cut_text, percent
from client.benchmarks.rows import Row
from client.labels.records import PairStats
from trainer.evaluation.metrics import Metrics, preference
from trainer.evaluation.verdicts import Duel
from trainer.labels.pairs import length_remark
from trainer.labels.reliability import CHANCE, Reliability

# Characters of each text, and answers under each heading.
MAX_TEXT: Final = 3000
SHOWN: Final = 4
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """A held-out instruction with both answers, and the log-odds that the new one is better; None if not judged."""

    id: str
    category: str
    prompt: str
    base: str
    new: str
    log_odds: float | None


def conclusions(stats: PairStats | None, metrics: Metrics | None, reliability: Reliability | None) -> list[str]:
    """What the evidence supports, and what weakens it."""
    lengths = None if stats is None else length_remark(stats)
    return [
        *_on_the_model(metrics),
        *(reliability.sentences[:1] if reliability is not None else ()),
        *([] if lengths is None else [lengths]),
    ]


def _on_the_model(metrics: Metrics | None) -> Iterator[str]:
    if metrics is None or metrics.same_weights or metrics.pairwise is None:
        return
    rate = metrics.pairwise
    if rate.low is None or rate.high is None:
        return
    found = (
        f"{rate.count} comparisons ({percent(rate.value)}%, 95% interval {percent(rate.low)} to {percent(rate.high)})"
    )
    if rate.low > CHANCE:
        yield f"{metrics.new} is preferred to {metrics.base} on {found}"
    elif rate.high < CHANCE:
        yield f"{metrics.new} is worse than {metrics.base} on {found}"
    else:
        yield f"{metrics.new} is no better than {metrics.base} as far as can be told from {found}"
    if metrics.judge_is_labeler:
        yield "The judge of this comparison also gave the labels: what it prefers is what it was asked for"
    if metrics.position is not None and metrics.position.flip_rate > CHANCE:
        yield (
            f"Its verdict changes with the order of the answers in {percent(metrics.position.flip_rate)}% of the "
            "comparisons: it hears the order more than the answers"
        )


def shown_answers(duels: Sequence[Duel], rows: Mapping[str, Row]) -> dict[str, list[AnswerPair]]:
    """Judged answers that differ, by heading: the clearest wins and losses of the new model, and some others at random.

    The same answers are chosen every time. None is shown twice.
    """
    pairs = [answer_pair(duel, rows.get(duel.instruction.id)) for duel in duels if not duel.identical]
    judged = sorted((pair for pair in pairs if pair.log_odds is not None), key=lambda pair: (pair.log_odds, pair.id))
    wins = [pair for pair in judged if (pair.log_odds or 0) > 0][::-1][:SHOWN]
    losses = [pair for pair in judged if (pair.log_odds or 0) < 0][:SHOWN]
    others = [pair for pair in judged if pair not in (*wins, *losses)]
    drawn = random.Random(_SEED).sample(others, min(SHOWN, len(others)))
    headings = {"The clearest wins of the new model": wins, "Its clearest losses": losses, "Drawn at random": drawn}
    return {heading: shown for heading, shown in headings.items() if shown}


def answer_pair(duel: Duel, row: Row | None) -> AnswerPair:
    """Both answers, cut to MAX_TEXT characters."""
    return AnswerPair(
        id=duel.instruction.id,
        category=duel.instruction.category,
        prompt=cut_text(duel.instruction.prompt, MAX_TEXT),
        base=cut_text(duel.base.response, MAX_TEXT),
        new=cut_text(duel.new.response, MAX_TEXT),
        log_odds=preference(duel, row),
    )

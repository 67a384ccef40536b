"""The scoring rule: from an engine's answers to a judgement, and from judgements to a ranking.

Source of the rule for labels: "IPO: Your Language Model is Secretly a Preference Classifier" (arXiv 2502.16182), with
the label's spellings summed over distinct token ids and everything kept in log space, where nothing underflows. Every
label has a weight from 0 to 1, its share in Yes; the rest of it goes to No. Yes and No themselves are the case of 1 and
0, the grades k from 0 to 5 have k/5. A reward model's logit and grades that were read from text are brought to the same
numbers, so that one ranking serves all judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from client.stats import logsumexp, sigmoid
from service.engine.contract import LabelLogprobs
from service.prompts.templates import GRADE_WEIGHTS, TOP_GRADE


@dataclass(frozen=True, slots=True)
class Samples:
    """How many texts were written for a judgement, and from how many of them a grade could be read."""

    drawn: int
    parsed: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """Natural-log probabilities of both sides, over the full vocabulary.

    `exact_log_odds` is there where the log-odds were known first, so that rounding moves neither them nor a tie.
    `grade` (0 to 5) is that of a judge who grades, `samples` of one whose grade is read from text; `floored` as in
    LabelLogprobs.
    """

    yes_logprob: float
    no_logprob: float
    label_is_argmax: bool
    exact_log_odds: float | None = None
    floored: bool = False
    grade: float | None = None
    samples: Samples | None = None

    @property
    def log_odds(self) -> float:
        """`log P(Yes) - log P(No)`: what to rank by."""
        return self.yes_logprob - self.no_logprob if self.exact_log_odds is None else self.exact_log_odds

    @property
    def score(self) -> float:
        """`P(Yes) / (P(Yes) + P(No))`."""
        return sigmoid(self.log_odds)

    @property
    def label_mass(self) -> float:
        """`P(Yes) + P(No)`."""
        return math.exp(self.yes_logprob) + math.exp(self.no_logprob)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Responses against each other; `win_probability[i][j]` that i is better than j, `ranking` best first."""

    log_odds: tuple[float, ...]
    scores: tuple[float, ...]
    win_probability: tuple[tuple[float, ...], ...]
    ranking: tuple[int, ...]
    tie: bool


@dataclass(frozen=True, slots=True)
class OrderEffect:
    """What the order of presentation did: `flips` of `pairs` changed their winner with it."""

    pairs: int
    flips: int
    first_log_odds: float


def judgement(answer: LabelLogprobs, yes_ids: Sequence[int], no_ids: Sequence[int]) -> Judgement:
    """Apply the rule to an engine's answer, whose log-probabilities stand in the order `yes_ids + no_ids`."""
    return weighted_judgement(answer, (*yes_ids, *no_ids), (1.0,) * len(yes_ids) + (0.0,) * len(no_ids))


def weighted_judgement(answer: LabelLogprobs, label_ids: Sequence[int], weights: Sequence[float]) -> Judgement:
    """The rule for labels with weights: `P(Yes) = sum of w·p`, `P(No) = sum of (1 - w)·p`.

    `score` is then the mean weight within the labels, `label_mass` the sum of their probabilities. The answer stands in
    the order of `label_ids`, which must be distinct: a spelling counted twice would weigh twice. Some weight must be
    above 0, and some below 1.
    """
    pairs = list(zip(answer.logprobs, weights, strict=True))
    return Judgement(
        yes_logprob=logsumexp([value + math.log(weight) for value, weight in pairs if weight > 0]),
        no_logprob=logsumexp([value + math.log(1 - weight) for value, weight in pairs if weight < 1]),
        label_is_argmax=answer.argmax_id in label_ids,
        floored=answer.floored,
    )


def graded_judgement(answer: LabelLogprobs, label_ids: Sequence[int]) -> Judgement:
    """The rule for one label for each grade: `grade` is the expected one within the labels, `score` a fifth of it."""
    verdict = weighted_judgement(answer, label_ids, GRADE_WEIGHTS)
    return replace(verdict, grade=TOP_GRADE * verdict.score)


def parsed_judgement(grades: Sequence[int | None]) -> Judgement | None:
    """From the grades that were read in sampled texts, None where there was none to be read; None if there is none.

    `score = (mean + 1/2) / 6`: grade k stands for the middle of the k-th sixth of [0, 1]. So grades 0 and 5, which are
    common, give log-odds that are finite (±2.4), 2.5 gives 0, and the order is that of the means. `label_mass` is the
    share of the texts that held a grade.
    """
    read = [grade for grade in grades if grade is not None]
    if not read:
        return None
    mean = sum(read) / len(read)
    score = (mean + 0.5) / (TOP_GRADE + 1)
    share = math.log(len(read) / len(grades))
    return Judgement(
        yes_logprob=math.log(score) + share,
        no_logprob=math.log1p(-score) + share,
        label_is_argmax=len(read) == len(grades),
        exact_log_odds=math.log(score) - math.log1p(-score),
        grade=mean,
        samples=Samples(len(grades), len(read)),
    )


def logit_judgement(logit: float) -> Judgement:
    """A reward model's logit is the log-odds (Bradley-Terry): nothing is left for other tokens, `label_mass` is 1."""
    return Judgement(-softplus(-logit), -softplus(logit), label_is_argmax=True, exact_log_odds=logit)


def softplus(value: float) -> float:
    """`log(1 + e^v)`, which neither overflows nor loses small values."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def compare_pointwise(log_odds: Sequence[float], tie_margin: float) -> Comparison:
    """Rank responses that were judged one by one; `P(i beats j) = sigmoid(l_i - l_j)` (Bradley-Terry)."""
    wins = tuple(tuple(sigmoid(a - b) for b in log_odds) for a in log_odds)
    return _ranked(tuple(log_odds), tuple(map(sigmoid, log_odds)), wins, tie_margin)


def compare_pairwise(first_wins: Sequence[Sequence[float]], tie_margin: float) -> tuple[Comparison, OrderEffect]:
    """Rank responses that were judged two by two, in both orders.

    `first_wins[i][j]` is the log-odds that i is better when i is shown first and j second (the diagonal is not read).
    An order-free log-odds is the mean of both orders: `m_ij = (l_ij - l_ji) / 2`. A response's own is its mean over the
    others. A winner has flipped when the two orders disagree on the sign.
    """
    n = len(first_wins)
    mean = [[0.0 if i == j else (first_wins[i][j] - first_wins[j][i]) / 2 for j in range(n)] for i in range(n)]
    wins = tuple(tuple(sigmoid(x) for x in row) for row in mean)
    log_odds = tuple(math.fsum(row) / (n - 1) for row in mean)
    scores = tuple((math.fsum(row) - 0.5) / (n - 1) for row in wins)
    pairs = [(first_wins[i][j], first_wins[j][i]) for i in range(n) for j in range(i)]
    effect = OrderEffect(
        pairs=len(pairs),
        flips=sum(a * b > 0 for a, b in pairs),
        first_log_odds=math.fsum(a + b for a, b in pairs) / (2 * len(pairs)),
    )
    return _ranked(log_odds, scores, wins, tie_margin), effect


def _ranked(
    log_odds: tuple[float, ...],
    scores: tuple[float, ...],
    wins: tuple[tuple[float, ...], ...],
    tie_margin: float,
) -> Comparison:
    ranking = tuple(sorted(range(len(log_odds)), key=lambda i: -log_odds[i]))
    tie = log_odds[ranking[0]] - log_odds[ranking[1]] <= tie_margin
    return Comparison(log_odds, scores, wins, ranking, tie)

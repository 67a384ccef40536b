"""The scoring rule: from an engine's answer to a judgement, and from judgements to a ranking. Pure.

Source of the rule: "IPO: Your Language Model is Secretly a Preference Classifier" (arXiv 2502.16182), with an option's
spellings summed over distinct token ids, and everything kept in log space, where nothing underflows. Every option has a
weight from 0 to 1, its share in Yes; the rest goes to No. Yes and No themselves weigh 1 and 0, level k of a scale of n
weighs k/(n-1). A reward model's logit and grades read from text are brought to the same numbers, so that one ranking
serves all judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from client.stats import logsumexp, sigmoid
from service.engine.contract import LabelLogprobs
from service.questions import TOP_GRADE, Question, Scale


@dataclass(frozen=True, slots=True)
class Samples:
    """How many texts were generated for a judgement, and from how many of them a grade was read."""

    drawn: int
    parsed: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a judgement took: times in seconds (0 for a cached one), tokens of all its items together.

    `tokenize` is the time of the chunk of prompts that this one was tokenized with. `truncated`: its texts were cut.
    """

    tokenize: float = 0.0
    queued: float = 0.0
    inference: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    truncated: bool = False

    @classmethod
    def together(cls, costs: Sequence[Cost]) -> Cost:
        """Of several judgements: the sum of their tokens, and the slowest one's times."""
        return cls(
            tokenize=max(cost.tokenize for cost in costs),
            queued=max(cost.queued for cost in costs),
            inference=max(cost.inference for cost in costs),
            prompt_tokens=sum(cost.prompt_tokens for cost in costs),
            cached_tokens=sum(cost.cached_tokens for cost in costs),
            completion_tokens=sum(cost.completion_tokens for cost in costs),
            truncated=any(cost.truncated for cost in costs),
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer to a question. Log-probabilities are natural ones, over the full vocabulary.

    `yes_logprob` and `no_logprob` are the two sides that the options' weights add up to, `logprobs` the options
    themselves, in the question's order; empty where a judge reads no labels. `exact_log_odds` is set where the log-odds
    are known first, so that rounding changes neither them nor a tie. `grade` (from 0) is the expected level of a scale,
    `samples` is set where grades were read from text; `floored` as in LabelLogprobs. `members` are the judgements that
    a panel's was made of, each by another template.
    """

    yes_logprob: float
    no_logprob: float
    label_is_argmax: bool
    exact_log_odds: float | None = None
    floored: bool = False
    grade: float | None = None
    samples: Samples | None = None
    logprobs: tuple[float, ...] = ()
    cost: Cost = Cost()
    members: tuple[Judgement, ...] = ()

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
        """`P(Yes) + P(No)`: the probability that the next token is any of the labels."""
        return math.exp(self.yes_logprob) + math.exp(self.no_logprob)

    @property
    def distribution(self) -> tuple[float, ...]:
        """The options' probabilities among themselves, summing to 1."""
        total = logsumexp(self.logprobs)
        return tuple(math.exp(value - total) for value in self.logprobs)


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


def label_judgement(
    question: Question, answer: LabelLogprobs, label_ids: Sequence[int], spellings: Sequence[int]
) -> Judgement:
    """`P(Yes) = sum of w·p` over the question's options, `P(No) = sum of (1 - w)·p`.

    `score` is then the mean weight within the labels, and for a Scale `grade` the expected level. The answer is in the
    order of `label_ids`, of which the first `spellings[0]` belong to the first option, and so on; the ids are distinct,
    because a spelling counted twice would weigh twice. Raises ValueError for an answer of another length.
    """
    if len(answer.logprobs) != sum(spellings):
        raise ValueError(f"{len(answer.logprobs)} log-probabilities for {sum(spellings)} labels")
    rest = iter(answer.logprobs)
    logprobs = tuple(logsumexp(list(islice(rest, count))) for count in spellings)
    weighted = list(zip(logprobs, question.weights, strict=True))
    judged = Judgement(
        yes_logprob=logsumexp([value + math.log(weight) for value, weight in weighted if weight > 0]),
        no_logprob=logsumexp([value + math.log(1 - weight) for value, weight in weighted if weight < 1]),
        label_is_argmax=answer.argmax_id in label_ids,
        floored=answer.floored,
        logprobs=logprobs,
    )
    return replace(judged, grade=question.top * judged.score) if isinstance(question, Scale) else judged


def parsed_judgement(grades: Sequence[int | None]) -> Judgement | None:
    """From the grades read in generated texts, None for a text without one. Returns None if no text has a grade.

    `score = (mean + 1/2) / 6`: grade k stands for the middle of the k-th sixth of [0, 1]. So grades 0 and 5, which are
    common, give finite log-odds (±2.4), 2.5 gives 0, and the order is that of the means. `label_mass` is the share of
    the texts that stated a grade, which is the nearest to what it says of labels: how often the judge answered at all.
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
    """A reward model's logit is the log-odds (Bradley-Terry). Other tokens get nothing: `label_mass` is 1."""
    return Judgement(-softplus(-logit), -softplus(logit), label_is_argmax=True, exact_log_odds=logit)


def panel_judgement(members: Sequence[Judgement], weights: Sequence[float]) -> Judgement:
    """Several judgements of one text as one: their log-odds' mean, `Σ w·z / Σ w`, with positive weights.

    That is the logarithm of the odds' weighted geometric mean (a logarithmic opinion pool). `label_mass` is the
    smallest of the members': the panel is as much to be trusted as the question that the model least meant to answer.
    """
    pairs = zip(weights, members, strict=True)
    log_odds = math.fsum(weight * member.log_odds for weight, member in pairs) / math.fsum(weights)
    mass = min(logsumexp((member.yes_logprob, member.no_logprob)) for member in members)
    return Judgement(
        yes_logprob=mass - softplus(-log_odds),
        no_logprob=mass - softplus(log_odds),
        label_is_argmax=all(member.label_is_argmax for member in members),
        exact_log_odds=log_odds,
        floored=any(member.floored for member in members),
        cost=Cost.together([member.cost for member in members]),
        members=tuple(members),
    )


def softplus(value: float) -> float:
    """`log(1 + e^v)`, without overflow and without losing small values."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def compare_pointwise(log_odds: Sequence[float], tie_margin: float) -> Comparison:
    """Rank responses that were judged one by one; `P(i beats j) = sigmoid(l_i - l_j)` (Bradley-Terry)."""
    wins = tuple(tuple(sigmoid(a - b) for b in log_odds) for a in log_odds)
    return _ranked(tuple(log_odds), tuple(map(sigmoid, log_odds)), wins, tie_margin)


def compare_pairwise(first_wins: Sequence[Sequence[float]], tie_margin: float) -> tuple[Comparison, OrderEffect]:
    """Rank responses that were judged two by two, in both orders.

    `first_wins[i][j]` is the log-odds that i is better when i is shown first and j second (the diagonal is not read).
    Averaging both orders removes the effect of the order: `m_ij = (l_ij - l_ji) / 2`. A response's own log-odds are its
    mean over the others. A winner has flipped when the two orders disagree on the sign.
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

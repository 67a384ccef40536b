"""The judge's answers about one sample, put together as its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

from client.benchmarks.rows import JudgedAnswer, Mode, Row
from client.data.samples import Sample
from client.errors import JudgeAPIError
from client.runs.resumable import RecordedError
from client.schema import CompareResult, ScoreResult, Usage

Outcome: TypeAlias = ScoreResult | CompareResult | JudgeAPIError


def row_of(sample: Sample, outcomes: Sequence[Outcome | None], mode: Mode, template: str | None) -> Row:
    """The row of a sample once everything asked about it has been answered.

    `template` names an inline template, which the service itself only calls "inline".
    """
    usage = _usage(outcomes)
    for outcome in outcomes:
        if isinstance(outcome, JudgeAPIError):
            error = RecordedError(code=outcome.code, message=outcome.message)
            return failed_row(sample, error).model_copy(update={"usage": usage})
    if mode == "pointwise":
        row = _pointwise_row(sample, cast("Sequence[ScoreResult]", outcomes))
    else:
        row = _pairwise_row(sample, cast("Sequence[CompareResult]", outcomes))
    return row.model_copy(update={"usage": usage, **({} if template is None else {"template": template})})


def failed_row(sample: Sample, error: RecordedError) -> Row:
    """The row of a sample without a verdict."""
    return Row(id=sample.id, subset=sample.subset, error=error)


def judged_answer(result: ScoreResult, text: str) -> JudgedAnswer:
    """An answer judged by itself."""
    return JudgedAnswer(
        log_odds=result.log_odds,
        score=result.score,
        label_mass=result.label_mass,
        length=len(text),
        truncated=result.truncated,
        calibrated=result.calibrated,
        members={member.template: member.log_odds for member in result.panel} if result.panel else None,
    )


def _usage(outcomes: Sequence[Outcome | None]) -> Usage | None:
    """The tokens of all answered judgements; the service reports none for failed ones."""
    known = [outcome.usage for outcome in outcomes if isinstance(outcome, ScoreResult | CompareResult)]
    if not known:
        return None
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in known),
        cached_tokens=sum(usage.cached_tokens for usage in known),
        completion_tokens=sum(usage.completion_tokens for usage in known),
    )


def _pointwise_row(sample: Sample, results: Sequence[ScoreResult]) -> Row:
    texts = (*sample.chosen, *sample.rejected)
    answers = [judged_answer(result, text) for text, result in zip(texts, results, strict=True)]
    chosen, rejected = answers[: len(sample.chosen)], answers[len(sample.chosen) :]
    return Row(
        id=sample.id,
        subset=sample.subset,
        chosen=_single(chosen),
        rejected=_single(rejected),
        margins=[[good.log_odds - bad.log_odds for bad in rejected] for good in chosen],
        template=results[0].template,
        asked_with=results[0].asked_with,
        model=results[0].model,
        fingerprint=results[0].fingerprint,
    )


def _pairwise_row(sample: Sample, results: Sequence[CompareResult]) -> Row:
    """`scores[0].log_odds` of a comparison of two is the log-odds that the first, the chosen one, is better."""
    width = len(sample.rejected)
    table = [results[start : start + width] for start in range(0, len(results), width)]
    columns = list(zip(*table, strict=True))
    biases = [result.position_bias for result in results if result.position_bias is not None]
    return Row(
        id=sample.id,
        subset=sample.subset,
        chosen=_single([_mean_answer(row, 0, text) for row, text in zip(table, sample.chosen, strict=True)]),
        rejected=_single(
            [_mean_answer(column, 1, text) for column, text in zip(columns, sample.rejected, strict=True)]
        ),
        margins=[[result.scores[0].log_odds for result in row] for row in table],
        template=results[0].template,
        asked_with=results[0].asked_with,
        model=results[0].model,
        fingerprint=results[0].fingerprint,
        flips=sum(bias.flips for bias in biases),
        first_log_odds=sum(bias.first_log_odds for bias in biases) / len(biases) if biases else None,
    )


def _mean_answer(results: Sequence[CompareResult], side: int, text: str) -> JudgedAnswer:
    """One answer over all comparisons it took part in, on the given side."""
    scores = [result.scores[side] for result in results]
    count = len(scores)
    return JudgedAnswer(
        log_odds=sum(score.log_odds for score in scores) / count,
        score=sum(score.score for score in scores) / count,
        label_mass=sum(score.label_mass for score in scores) / count,
        length=len(text),
        truncated=any(score.truncated for score in scores),
    )


def _single(answers: list[JudgedAnswer]) -> JudgedAnswer | list[JudgedAnswer]:
    return answers[0] if len(answers) == 1 else answers

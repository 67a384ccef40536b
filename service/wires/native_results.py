"""What the product's own wire answers, from judgements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from client.schema import (
    CompareMode,
    CompareRequest,
    CompareResult,
    PanelMember,
    PositionBias,
    ResponseScore,
    SampleCount,
    ScoreResult,
    Timing,
    Usage,
)
from service.judge.judges import REWARD_TEMPLATE
from service.judge.provenance import Provenance
from service.judge.scoring import (
    Comparison,
    Cost,
    Judgement,
    OrderEffect,
    compare_pairwise,
    compare_pointwise,
    panel_judgement,
)
from service.judge.templates import Panel

ShownIn: TypeAlias = Sequence[tuple[int, ...]]
"""Which responses each text shows, by their numbers: one, or two in this order."""


def score_result(provenance: Provenance, panel: Panel | None, judgements: Sequence[Judgement]) -> ScoreResult:
    """From the judgements of one response, one by each member of the panel (None for a reward model)."""
    (judged,) = _verdicts(panel, judgements)
    name = panel.id if panel else REWARD_TEMPLATE
    return ScoreResult(
        score=judged.score,
        log_odds=judged.log_odds,
        yes_logprob=judged.yes_logprob,
        no_logprob=judged.no_logprob,
        label_mass=judged.label_mass,
        label_is_argmax=judged.label_is_argmax,
        truncated=judged.cost.truncated,
        template=name,
        model=provenance.model,
        usage=_usage(judged.cost),
        timing_ms=_timing(judged.cost),
        calibrated=provenance.calibrated(name, judged.log_odds),
        fingerprint=provenance.fingerprint,
        grade=judged.grade,
        samples=_samples(judged),
        floored=judged.floored,
        asked_with=provenance.asked_with(panel),
        panel=_members(panel, judged),
    )


def compare_result(
    provenance: Provenance,
    request: CompareRequest,
    panel: Panel | None,
    shown_in: ShownIn,
    judgements: Sequence[Judgement],
) -> CompareResult:
    """From the judgements of all that was shown, of each text one by each member of the panel; see `score_result`."""
    judged = _verdicts(panel, judgements)
    mode: CompareMode = "pointwise" if len(shown_in[0]) == 1 else "pairwise"
    name = panel.id if panel else REWARD_TEMPLATE
    comparison, effect = _compared(request, shown_in, judged)
    by_response = _by_response(request, shown_in, judged)
    members = _members_compared(panel, request, shown_in, judged)
    single = mode == "pointwise"
    cost = Cost.together([judgement.cost for judgement in judged])
    return CompareResult(
        best=comparison.ranking[0],
        ranking=list(comparison.ranking),
        scores=[
            ResponseScore(
                score=score,
                log_odds=log_odds,
                label_mass=_mean_mass(own),
                truncated=any(judgement.cost.truncated for judgement in own),
                calibrated=provenance.calibrated(name, log_odds),
                grade=own[0].grade if single else None,
                samples=_samples(own[0]) if single else None,
                floored=any(judgement.floored for judgement in own),
                panel=said,
            )
            for score, log_odds, own, said in zip(
                comparison.scores, comparison.log_odds, by_response, members, strict=True
            )
        ],
        win_probability=[list(row) for row in comparison.win_probability],
        tie=comparison.tie,
        position_bias=_position_bias(effect) if effect else None,
        mode=mode,
        template=name,
        model=provenance.model,
        usage=_usage(cost),
        timing_ms=_timing(cost),
        fingerprint=provenance.fingerprint,
        asked_with=provenance.asked_with(panel),
        calibrated_win_probability=provenance.calibrated_wins(name, comparison.log_odds),
    )


def _verdicts(panel: Panel | None, judged: Sequence[Judgement]) -> list[Judgement]:
    """One judgement for each text that was shown, from those of all members of the panel."""
    if panel is None or panel.single:
        return list(judged)
    size = len(panel.members)
    return [panel_judgement(judged[first : first + size], panel.weights) for first in range(0, len(judged), size)]


def _members(panel: Panel | None, judged: Judgement) -> list[PanelMember] | None:
    """What each member of a panel said; None if there was no panel of several."""
    if panel is None or not judged.members:
        return None
    return [
        PanelMember(
            template=template.id,
            weight=weight,
            log_odds=member.log_odds,
            score=member.score,
            label_mass=member.label_mass,
        )
        for template, weight, member in zip(panel.members, panel.weights, judged.members, strict=True)
    ]


def _members_compared(
    panel: Panel | None, request: CompareRequest, shown_in: ShownIn, judged: Sequence[Judgement]
) -> list[list[PanelMember] | None]:
    """`_members` of each response: how it would have fared with that member alone."""
    if panel is None or panel.single:
        return [None for _ in request.responses]
    by_member = []
    for place, (template, weight) in enumerate(zip(panel.members, panel.weights, strict=True)):
        said = [judgement.members[place] for judgement in judged]
        comparison, _ = _compared(request, shown_in, said)
        masses = [_mean_mass(own) for own in _by_response(request, shown_in, said)]
        by_member.append(
            [
                PanelMember(template=template.id, weight=weight, log_odds=log_odds, score=score, label_mass=mass)
                for log_odds, score, mass in zip(comparison.log_odds, comparison.scores, masses, strict=True)
            ]
        )
    return [list(response) for response in zip(*by_member, strict=True)]


def _by_response(request: CompareRequest, shown_in: ShownIn, judged: Sequence[Judgement]) -> list[list[Judgement]]:
    """For each response the judgements that it was shown in."""
    return [
        [judgement for shown, judgement in zip(shown_in, judged, strict=True) if index in shown]
        for index in range(len(request.responses))
    ]


def _mean_mass(judged: Sequence[Judgement]) -> float:
    return sum(judgement.label_mass for judgement in judged) / len(judged)


def _compared(
    request: CompareRequest, shown_in: ShownIn, judged: Sequence[Judgement]
) -> tuple[Comparison, OrderEffect | None]:
    log_odds = [judgement.log_odds for judgement in judged]
    if len(shown_in[0]) == 1:
        return compare_pointwise(log_odds, request.tie_margin), None
    n = len(request.responses)
    first_wins = [[0.0] * n for _ in range(n)]
    for (i, j), value in zip(shown_in, log_odds, strict=True):
        first_wins[i][j] = value
    return compare_pairwise(first_wins, request.tie_margin)


def _position_bias(effect: OrderEffect) -> PositionBias:
    return PositionBias(
        pairs=effect.pairs,
        flips=effect.flips,
        flip_rate=effect.flips / effect.pairs,
        first_log_odds=effect.first_log_odds,
    )


def _samples(judged: Judgement) -> SampleCount | None:
    return SampleCount(drawn=judged.samples.drawn, parsed=judged.samples.parsed) if judged.samples else None


def _usage(cost: Cost) -> Usage:
    return Usage(
        prompt_tokens=cost.prompt_tokens, cached_tokens=cost.cached_tokens, completion_tokens=cost.completion_tokens
    )


def _timing(cost: Cost) -> Timing:
    return Timing(
        tokenize=round(cost.tokenize * 1e3, 3),
        queue=round(cost.queued * 1e3, 3),
        inference=round(cost.inference * 1e3, 3),
    )

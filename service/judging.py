"""From requests to results: render, queue, await, apply the scoring rule. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import islice

from client.errors import ErrorCode
from client.schema import (
    CompareRequest,
    CompareResult,
    InlineTemplate,
    PositionBias,
    ResponseScore,
    ScoreRequest,
    ScoreResult,
    Timing,
    Usage,
)
from service.engine.contract import EngineItem
from service.errors import ServiceError
from service.jobs import Job, JobFailure, JobQueue, Lane, Reply
from service.metrics import Metrics
from service.prompt import JudgePrompt, PromptBuilder
from service.scoring import Comparison, Judgement, OrderEffect, compare_pairwise, compare_pointwise, judgement
from service.templates import Template, TemplateLibrary, from_inline

# The worker itself answers a job that is past its deadline; this is how long that answer may take to arrive.
GRACE_SECONDS = 0.5
# Requests rendered and tokenised in one go by one thread: enough to outweigh the hand-over.
CHUNK = 16

AnyRequest = ScoreRequest | CompareRequest


@dataclass(frozen=True, slots=True)
class Call:
    """What comes with a request besides its body. `deadline` is in seconds of `time.time()`."""

    deadline: float
    lane: Lane = Lane.INTERACTIVE
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A request after rendering: its prompts, in the order in which its result reads their judgements."""

    template: Template
    prompts: list[JudgePrompt]
    tokenize_seconds: float


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt's judgement, and the reply that it came in."""

    judgement: Judgement
    prompt: JudgePrompt
    reply: Reply
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's judgements, one for each prompt of its plan, in order."""

    plan: Plan
    judged: list[Judged]


class Judging:
    """Answers score and compare requests with a model behind a queue.

    Methods return one entry for each request, in order: its result, or the ServiceError that befell it alone. They
    raise ServiceError for what befalls the call as a whole (a full queue).
    """

    def __init__(
        self,
        model_id: str,
        prompts: PromptBuilder,
        templates: TemplateLibrary,
        queue: JobQueue,
        metrics: Metrics,
        executor: Executor,
    ) -> None:
        self.templates = templates
        self._model_id = model_id
        self._prompts = prompts
        self._queue = queue
        self._metrics = metrics
        self._executor = executor

    async def score(self, requests: Sequence[ScoreRequest], call: Call) -> list[ScoreResult | ServiceError]:
        """Judge each response by itself."""
        answers = await self._answer(requests, call)
        return [answer if isinstance(answer, ServiceError) else self._score_result(answer) for answer in answers]

    async def compare(self, requests: Sequence[CompareRequest], call: Call) -> list[CompareResult | ServiceError]:
        """Rank each request's responses."""
        answers = await self._answer(requests, call)
        return [
            answer if isinstance(answer, ServiceError) else self._compare_result(request, answer)
            for request, answer in zip(requests, answers, strict=True)
        ]

    async def _answer(self, requests: Sequence[AnyRequest], call: Call) -> list[Answer | ServiceError]:
        plans = await self._plan_all(requests)
        prompts = [prompt for plan in plans if isinstance(plan, Plan) for prompt in plan.prompts]
        outcomes = iter(await self._ask(prompts, call) if prompts else [])
        return [
            plan if isinstance(plan, ServiceError) else _gathered(plan, list(islice(outcomes, len(plan.prompts))))
            for plan in plans
        ]

    async def _plan_all(self, requests: Sequence[AnyRequest]) -> list[Plan | ServiceError]:
        loop = asyncio.get_running_loop()
        chunks = [requests[start : start + CHUNK] for start in range(0, len(requests), CHUNK)]
        planned = await asyncio.gather(*(loop.run_in_executor(self._executor, self._plan_some, c) for c in chunks))
        return [plan for chunk in planned for plan in chunk]

    def _plan_some(self, requests: Sequence[AnyRequest]) -> list[Plan | ServiceError]:
        return [self._plan(request) for request in requests]

    def _plan(self, request: AnyRequest) -> Plan | ServiceError:
        started = time.perf_counter()
        try:
            template = self._template(request)
            prompts = [self._render(template, request, shown) for shown in _shown(request)]
        except ServiceError as error:
            return error
        return Plan(template, prompts, time.perf_counter() - started)

    def _template(self, request: AnyRequest) -> Template:
        mode = request.mode if isinstance(request, CompareRequest) else "pointwise"
        if isinstance(request.template, InlineTemplate):
            template = from_inline(request.template)
        elif request.template is not None:
            template = self.templates.get(request.template)
        elif request.category is not None:
            template = self.templates.for_category(request.category, mode)
        else:
            template = self.templates.default(mode)
        if template.mode != mode:
            raise ServiceError(
                ErrorCode.BAD_TEMPLATE, f"this template is {template.mode}, the request {mode}", param="template"
            )
        return template

    def _render(self, template: Template, request: AnyRequest, shown: tuple[int, ...]) -> JudgePrompt:
        responses = [request.response] if isinstance(request, ScoreRequest) else request.responses
        try:
            return self._prompts.build(template, request.prompt, [responses[i] for i in shown], request.truncation)
        except ServiceError as error:
            if error.param == "response" and isinstance(request, CompareRequest):
                error.param = f"responses[{max(shown, key=lambda i: len(responses[i]))}]"
            raise

    async def _ask(self, prompts: Sequence[JudgePrompt], call: Call) -> list[Judged | ServiceError]:
        jobs = [_job(prompt, call) for prompt in prompts]
        futures = await self._queue.submit(jobs)
        try:
            await asyncio.wait(futures, timeout=max(0.0, call.deadline - time.time()) + GRACE_SECONDS)
            return [self._outcome(prompt, future) for prompt, future in zip(prompts, futures, strict=True)]
        finally:
            # Whatever is still open has nobody waiting: the deadline has passed, or the caller has left.
            self._queue.cancel([job.id for job, future in zip(jobs, futures, strict=True) if not future.done()])

    def _outcome(self, prompt: JudgePrompt, future: asyncio.Future[Reply]) -> Judged | ServiceError:
        if not future.done():
            return ServiceError(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline")
        reply = future.result()
        if isinstance(reply.outcome, JobFailure):
            return ServiceError(reply.outcome.code, reply.outcome.message)
        verdict = judgement(reply.outcome, prompt.yes_ids, prompt.no_ids)
        self._metrics.judged(verdict.label_mass, reply.queued)
        return Judged(verdict, prompt, reply, reply.outcome.cached_tokens)

    def _score_result(self, answer: Answer) -> ScoreResult:
        (judged,) = answer.judged
        verdict = judged.judgement
        return ScoreResult(
            score=verdict.score,
            log_odds=verdict.log_odds,
            yes_logprob=verdict.yes_logprob,
            no_logprob=verdict.no_logprob,
            label_mass=verdict.label_mass,
            label_is_argmax=verdict.label_is_argmax,
            truncated=judged.prompt.truncated,
            template=answer.plan.template.id,
            model=self._model_id,
            usage=_usage(answer),
            timing_ms=_timing(answer),
        )

    def _compare_result(self, request: CompareRequest, answer: Answer) -> CompareResult:
        comparison, effect = _compared(request, answer.judged)
        judged_with = [
            [judged for shown, judged in zip(_shown(request), answer.judged, strict=True) if i in shown]
            for i in range(len(request.responses))
        ]
        return CompareResult(
            best=comparison.ranking[0],
            ranking=list(comparison.ranking),
            scores=[
                ResponseScore(
                    score=score,
                    log_odds=log_odds,
                    label_mass=sum(a.judgement.label_mass for a in mine) / len(mine),
                    truncated=any(a.prompt.truncated for a in mine),
                )
                for score, log_odds, mine in zip(comparison.scores, comparison.log_odds, judged_with, strict=True)
            ],
            win_probability=[list(row) for row in comparison.win_probability],
            tie=comparison.tie,
            position_bias=_position_bias(effect) if effect else None,
            mode=request.mode,
            template=answer.plan.template.id,
            model=self._model_id,
            usage=_usage(answer),
            timing_ms=_timing(answer),
        )


def cost(request: AnyRequest) -> int:
    """How many judgements a request asks for."""
    return len(_shown(request))


def _shown(request: AnyRequest) -> list[tuple[int, ...]]:
    """Which responses each of the request's prompts shows, in order."""
    if isinstance(request, ScoreRequest):
        return [(0,)]
    n = len(request.responses)
    if request.mode == "pointwise":
        return [(i,) for i in range(n)]
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def _compared(request: CompareRequest, answers: Sequence[Judged]) -> tuple[Comparison, OrderEffect | None]:
    log_odds = [answer.judgement.log_odds for answer in answers]
    if request.mode == "pointwise":
        return compare_pointwise(log_odds, request.tie_margin), None
    n = len(request.responses)
    first_wins = [[0.0] * n for _ in range(n)]
    for (i, j), value in zip(_shown(request), log_odds, strict=True):
        first_wins[i][j] = value
    return compare_pairwise(first_wins, request.tie_margin)


def _position_bias(effect: OrderEffect) -> PositionBias:
    return PositionBias(
        pairs=effect.pairs,
        flips=effect.flips,
        flip_rate=effect.flips / effect.pairs,
        first_log_odds=effect.first_log_odds,
    )


def _job(prompt: JudgePrompt, call: Call) -> Job:
    item = EngineItem(prompt.token_ids, prompt.yes_ids + prompt.no_ids, prompt.boundaries)
    return Job(uuid.uuid4().hex, item, call.deadline, time.time(), call.lane, traceparent=call.traceparent)


def _gathered(plan: Plan, outcomes: Sequence[Judged | ServiceError]) -> Answer | ServiceError:
    judged = [outcome for outcome in outcomes if isinstance(outcome, Judged)]
    if len(judged) == len(plan.prompts):
        return Answer(plan, judged)
    return next(outcome for outcome in outcomes if isinstance(outcome, ServiceError))


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=sum(len(judged.prompt.token_ids) for judged in answer.judged),
        cached_tokens=sum(judged.cached_tokens for judged in answer.judged),
    )


def _timing(answer: Answer) -> Timing:
    return Timing(
        tokenize=round(answer.plan.tokenize_seconds * 1e3, 3),
        queue=round(max(judged.reply.queued for judged in answer.judged) * 1e3, 3),
        inference=round(max(judged.reply.inference for judged in answer.judged) * 1e3, 3),
    )

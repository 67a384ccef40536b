"""From requests to results: render, have judged, apply the scoring rule. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import TypeVar

from client.calibration import TemplateCalibration
from client.errors import ErrorCode
from client.schema import (
    CompareMode,
    CompareRequest,
    CompareResult,
    InlineTemplate,
    PositionBias,
    ResponseScore,
    SampleCount,
    ScoreRequest,
    ScoreResult,
    Timing,
    Usage,
)
from service.errors import ServiceError
from service.judge.dispatch import Asker, Call, Judged, Meter
from service.judge.judges import REWARD_TEMPLATE, YES_NO, Judge
from service.judge.scoring import Comparison, Judgement, OrderEffect, compare_pairwise, compare_pointwise
from service.prompts.builder import Wanted
from service.prompts.templates import Mode, Template, TemplateLibrary, from_inline
from service.prompts.text_builder import Prompt, Prompts
from service.telemetry.tracing import OFF, Tracing

# Prompts rendered and tokenised in one go by one thread, or those of one request.
CHUNK = 64
# Characters and prompts of a request up to which handing it to a thread costs more than it gains.
INLINE_CHARS = 2000
INLINE_PROMPTS = 8
# Of the digests that tell how a judgement was asked for.
_DIGITS = 16

AnyRequest = ScoreRequest | CompareRequest
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Provenance:
    """The judge, and what results say of its model; its calibrations by template id (single responses only).

    `settings` is the digest of those that decide judgements besides; see `settings_digest`.
    """

    model: str
    fingerprint: str
    calibrations: Mapping[str, TemplateCalibration] = field(default_factory=dict)
    judge: Judge = YES_NO
    settings: str = ""

    def calibrated(self, template: str, log_odds: float) -> float | None:
        """The fitted probability that the response is good; None for a template (its id) that has no calibration."""
        calibration = self.calibrations.get(template)
        return calibration.apply(log_odds) if calibration else None

    def asked_with(self, template: Template | None) -> str:
        """See ScoreResult."""
        return _digest(self.settings, template.digest if template else None)


@dataclass(frozen=True, slots=True)
class Plan:
    """A request after rendering: its prompts, in the order in which its result reads their judgements.

    `template` is the id of what was asked, `asked` the template itself, `tokenize_seconds` the time taken for it and
    what was rendered together with it.
    """

    template: str
    asked: Template | None
    mode: CompareMode
    prompts: list[Prompt]
    tokenize_seconds: float


@dataclass(frozen=True, slots=True)
class _Way:
    """How a request is to be judged; without a template the judge reads the conversation itself."""

    mode: CompareMode
    template: Template | None


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
        provenance: Provenance,
        prompts: Prompts,
        templates: TemplateLibrary,
        asker: Asker,
        executor: Executor,
        tracing: Tracing = OFF,
    ) -> None:
        self.templates = templates
        self._provenance = provenance
        self._judge = provenance.judge
        self._prompts = prompts
        self._asker = asker
        self._executor = executor
        self._tracing = tracing
        # When each of its threads that are at work began with the piece in hand.
        self._begun: dict[int, float] = {}

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

    def admit(self, requests: Sequence[AnyRequest]) -> int:
        """How many judgements these ask for; raises ServiceError(PAYLOAD_TOO_LARGE) for more than the queue holds."""
        judgements = sum(map(self._cost, requests))
        self._asker.meter().foresee(judgements, 0)
        return judgements

    def _cost(self, request: AnyRequest) -> int:
        if isinstance(request, ScoreRequest):
            return 1
        n = len(request.responses)
        return n if self._mode(request) == "pointwise" else n * (n - 1)

    async def close(self) -> None:
        """Let go of the score cache; to be called when nothing is asked any more."""
        await self._asker.close()

    async def _answer(self, requests: Sequence[AnyRequest], call: Call) -> list[Answer | ServiceError]:
        with self._tracing.span("tokenize", requests=len(requests)) as span:
            plans = await self._plan_in_time(requests, call)
            prompts = [prompt for plan in plans if isinstance(plan, Plan) for prompt in plan.prompts]
            span.set(prompts=len(prompts), tokens=sum(prompt.tokens for prompt in prompts))
        outcomes = iter(await self._asker.ask(prompts, call))
        return [
            plan if isinstance(plan, ServiceError) else _gathered(plan, list(islice(outcomes, len(plan.prompts))))
            for plan in plans
        ]

    async def _plan_in_time(self, requests: Sequence[AnyRequest], call: Call) -> list[Plan | ServiceError]:
        try:
            async with asyncio.timeout(call.seconds_left):
                return await self._plan_all(requests)
        except TimeoutError:
            return [ServiceError(ErrorCode.DEADLINE_EXCEEDED, "not tokenised before the deadline") for _ in requests]

    def stuck(self, seconds: float) -> int:
        """How many of the threads that tokenise have been at one piece of work for longer than that."""
        return sum(time.monotonic() - begun > seconds for begun in list(self._begun.values()))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._watched, work)

    def _watched(self, work: Callable[[], T]) -> T:
        self._begun[threading.get_ident()] = time.monotonic()
        try:
            return work()
        finally:
            del self._begun[threading.get_ident()]

    async def _plan_all(self, requests: Sequence[AnyRequest]) -> list[Plan | ServiceError]:
        meter = self._asker.meter()
        if len(requests) == 1 and _is_short(requests[0], self._mode(requests[0])):
            return self._plan_some(requests, meter)
        await self._in_thread(partial(self._foresee, requests, meter))
        work = [partial(self._plan_some, chunk, meter) for chunk in self._chunks(requests)]
        planned = await asyncio.gather(*map(self._in_thread, work))
        return [plan for chunk in planned for plan in chunk]

    def _chunks(self, requests: Sequence[AnyRequest]) -> Iterator[list[AnyRequest]]:
        some: list[AnyRequest] = []
        prompts = 0
        for request in requests:
            some.append(request)
            prompts += self._cost(request)
            if prompts >= CHUNK:
                yield some
                some, prompts = [], 0
        if some:
            yield some

    def _foresee(self, requests: Sequence[AnyRequest], meter: Meter) -> None:
        """Raise ServiceError(PAYLOAD_TOO_LARGE) where the texts alone, however they are tokenised, are too much."""
        meter.foresee(0, sum(map(self._fewest_tokens, requests)))

    def _fewest_tokens(self, request: AnyRequest) -> int:
        """What a request's prompts read at least; 0 for one that is refused, as it is too long and may not be cut."""
        prompt = request.prompt if isinstance(request.prompt, str) else "".join(turn.content for turn in request.prompt)
        least = self._prompts.fewest_tokens
        asked, answers = least([prompt]), [least([response]) for response in _responses(request)]
        longest = self._prompts.max_tokens
        # A token may hold the end of one text and the beginning of the next.
        sizes = [asked + sum(answers[i] - 1 for i in shown) for shown in _shown(request, self._mode(request))]
        if request.truncation == "error" and max(sizes) > longest:
            return 0
        return sum(min(max(0, size), longest) for size in sizes)

    def _plan_some(self, requests: Sequence[AnyRequest], meter: Meter) -> list[Plan | ServiceError]:
        meter.check()
        started = time.perf_counter()
        ways = [self._way(request) for request in requests]
        wanted = [
            each
            for request, way in zip(requests, ways, strict=True)
            if isinstance(way, _Way)
            for each in _wanted(request, way)
        ]
        built = iter(list(_metered(self._prompts.build_each(wanted), meter)))
        took = time.perf_counter() - started
        return [
            _plan(request, way, list(islice(built, len(_shown(request, way.mode)))), took)
            if isinstance(way, _Way)
            else way
            for request, way in zip(requests, ways, strict=True)
        ]

    def _mode(self, request: AnyRequest) -> CompareMode:
        if isinstance(request, ScoreRequest):
            return "pointwise"
        return request.mode or self._judge.own_mode

    def _way(self, request: AnyRequest) -> _Way | ServiceError:
        mode = self._mode(request)
        if mode not in self._judge.modes:
            return self._judge.refusal(compares=isinstance(request, CompareRequest))
        wanted = self._judge.modes[mode]
        if wanted is None:
            return self._untemplated(request) or _Way(mode, None)
        try:
            return _Way(mode, self._template(request, wanted))
        except ServiceError as error:
            return error

    def _untemplated(self, request: AnyRequest) -> ServiceError | None:
        """What is wrong with a request to a judge that has no templates."""
        given = "category" if request.category is not None else "template" if request.template is not None else None
        if given is None:
            return None
        return ServiceError(
            ErrorCode.UNSUPPORTED_BY_JUDGE,
            f"this service's judge is {self._judge.name}, which reads the conversation itself: leave {given} out",
            param=given,
        )

    def _template(self, request: AnyRequest, mode: Mode) -> Template:
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
                ErrorCode.BAD_TEMPLATE,
                f"this template is {template.mode}, and this service's judge, {self._judge.name}, needs one that is "
                f"{mode} here; GET /templates lists those",
                param="template",
            )
        return template

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
            template=answer.plan.template,
            model=self._provenance.model,
            usage=_usage(answer),
            timing_ms=_timing(answer),
            calibrated=self._provenance.calibrated(answer.plan.template, verdict.log_odds),
            fingerprint=self._provenance.fingerprint,
            grade=verdict.grade,
            samples=_samples(verdict),
            floored=verdict.floored,
            asked_with=self._provenance.asked_with(answer.plan.asked),
        )

    def _compare_result(self, request: CompareRequest, answer: Answer) -> CompareResult:
        mode = answer.plan.mode
        comparison, effect = _compared(request, mode, answer.judged)
        judged_with = [
            [judged for shown, judged in zip(_shown(request, mode), answer.judged, strict=True) if i in shown]
            for i in range(len(request.responses))
        ]
        single = mode == "pointwise"
        return CompareResult(
            best=comparison.ranking[0],
            ranking=list(comparison.ranking),
            scores=[
                ResponseScore(
                    score=score,
                    log_odds=log_odds,
                    label_mass=sum(a.judgement.label_mass for a in mine) / len(mine),
                    truncated=any(a.prompt.truncated for a in mine),
                    calibrated=self._provenance.calibrated(answer.plan.template, log_odds),
                    grade=mine[0].judgement.grade if single else None,
                    samples=_samples(mine[0].judgement) if single else None,
                    floored=any(a.judgement.floored for a in mine),
                )
                for score, log_odds, mine in zip(comparison.scores, comparison.log_odds, judged_with, strict=True)
            ],
            win_probability=[list(row) for row in comparison.win_probability],
            tie=comparison.tie,
            position_bias=_position_bias(effect) if effect else None,
            mode=mode,
            template=answer.plan.template,
            model=self._provenance.model,
            usage=_usage(answer),
            timing_ms=_timing(answer),
            fingerprint=self._provenance.fingerprint,
            asked_with=self._provenance.asked_with(answer.plan.asked),
        )


def settings_digest(judge: Judge, floor: float | None) -> str:
    """Of the settings that decide judgements besides the model and the template; `floor` is of an upstream."""
    return _digest(judge.name, judge.reader.settings, floor)


def _digest(*parts: object) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()[:_DIGITS]


def _metered(built: Iterator[Prompt | ServiceError], meter: Meter) -> Iterator[Prompt | ServiceError]:
    for prompt in built:
        if not isinstance(prompt, ServiceError):
            meter.add(prompt)
        yield prompt


def _shown(request: AnyRequest, mode: CompareMode) -> list[tuple[int, ...]]:
    """Which responses each of the request's prompts shows, in order."""
    if isinstance(request, ScoreRequest):
        return [(0,)]
    n = len(request.responses)
    if mode == "pointwise":
        return [(i,) for i in range(n)]
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def _compared(
    request: CompareRequest, mode: CompareMode, answers: Sequence[Judged]
) -> tuple[Comparison, OrderEffect | None]:
    log_odds = [answer.judgement.log_odds for answer in answers]
    if mode == "pointwise":
        return compare_pointwise(log_odds, request.tie_margin), None
    n = len(request.responses)
    first_wins = [[0.0] * n for _ in range(n)]
    for (i, j), value in zip(_shown(request, mode), log_odds, strict=True):
        first_wins[i][j] = value
    return compare_pairwise(first_wins, request.tie_margin)


def _position_bias(effect: OrderEffect) -> PositionBias:
    return PositionBias(
        pairs=effect.pairs,
        flips=effect.flips,
        flip_rate=effect.flips / effect.pairs,
        first_log_odds=effect.first_log_odds,
    )


def _samples(verdict: Judgement) -> SampleCount | None:
    found = verdict.samples
    return None if found is None else SampleCount(drawn=found.drawn, parsed=found.parsed)


def _wanted(request: AnyRequest, way: _Way) -> list[Wanted]:
    """The prompts that a request needs, in the order of `_shown`."""
    responses = _responses(request)
    return [
        Wanted(way.template, request.prompt, [responses[i] for i in shown], request.truncation)
        for shown in _shown(request, way.mode)
    ]


def _plan(
    request: AnyRequest, way: _Way, built: Sequence[Prompt | ServiceError], seconds: float
) -> Plan | ServiceError:
    for shown, prompt in zip(_shown(request, way.mode), built, strict=True):
        if isinstance(prompt, ServiceError):
            if prompt.param == "response" and isinstance(request, CompareRequest):
                prompt.param = f"responses[{max(shown, key=lambda i: len(request.responses[i]))}]"
            return prompt
    name = REWARD_TEMPLATE if way.template is None else way.template.id
    return Plan(
        name, way.template, way.mode, [prompt for prompt in built if not isinstance(prompt, ServiceError)], seconds
    )


def _responses(request: AnyRequest) -> list[str]:
    return [request.response] if isinstance(request, ScoreRequest) else request.responses


def _is_short(request: AnyRequest, mode: CompareMode) -> bool:
    """Whether it asks for few prompts with little text of the caller's; the service's own templates do not count."""
    shown, responses = _shown(request, mode), _responses(request)
    own = request.template
    parts = [own.layout, own.instruction, *own.labels.yes, *own.labels.no] if isinstance(own, InlineTemplate) else []
    parts += [request.prompt] if isinstance(request.prompt, str) else [each.content for each in request.prompt]
    repeated = sum(map(len, parts)) * len(shown)
    return len(shown) <= INLINE_PROMPTS and repeated + sum(len(responses[i]) for s in shown for i in s) <= INLINE_CHARS


def _gathered(plan: Plan, outcomes: Sequence[Judged | ServiceError]) -> Answer | ServiceError:
    judged = [outcome for outcome in outcomes if isinstance(outcome, Judged)]
    if len(judged) == len(plan.prompts):
        return Answer(plan, judged)
    return next(outcome for outcome in outcomes if isinstance(outcome, ServiceError))


def _usage(answer: Answer) -> Usage:
    return Usage(
        prompt_tokens=sum(judged.prompt_tokens for judged in answer.judged),
        cached_tokens=sum(judged.cached_tokens for judged in answer.judged),
        completion_tokens=sum(judged.completion_tokens for judged in answer.judged),
    )


def _timing(answer: Answer) -> Timing:
    return Timing(
        tokenize=round(answer.plan.tokenize_seconds * 1e3, 3),
        queue=round(max(judged.queued for judged in answer.judged) * 1e3, 3),
        inference=round(max(judged.inference for judged in answer.judged) * 1e3, 3),
    )

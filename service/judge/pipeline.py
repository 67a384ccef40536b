"""From prompt specs to judgements: build the prompts, have them answered, read the answers. Knows no wire."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeAlias, TypeVar

from client.errors import ErrorCode
from client.schema import Message
from service.engine.contract import Generated, GeneratedText
from service.errors import ServiceError
from service.judge.dispatch import Call, Dispatcher, TokenMeter
from service.judge.readers import Reader
from service.judge.scoring import Cost, Judgement
from service.prompts.text_builder import Prompt, Prompts
from service.questions import Layout, PromptSpec
from service.queue.contract import JobFailure, Reply
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing

# Prompts that one thread renders and tokenizes in one go.
CHUNK = 64
# Characters and prompts of a call up to which handing it to a thread costs more than it gains.
INLINE_CHARS = 2000
INLINE_PROMPTS = 8

Result = TypeVar("Result")
Group: TypeAlias = Sequence[PromptSpec] | ServiceError
"""The prompts of one request, which is judged as a whole or not at all; or why the request has none."""
_Numbered: TypeAlias = tuple[int, PromptSpec]
"""A spec and the number of its group."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The prompts of some specs, in order, and the seconds that it took to build them."""

    specs: Sequence[_Numbered]
    prompts: Sequence[Prompt | ServiceError]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Built:
    """A prompt ready to be asked, the number of its group, and the seconds that its chunk took."""

    group: int
    spec: PromptSpec
    prompt: Prompt
    seconds: float


class Pipeline:
    """Judges what prompt specs describe, with a model behind a queue."""

    def __init__(
        self,
        prompts: Prompts,
        reader: Reader,
        dispatcher: Dispatcher,
        executor: Executor,
        metrics: Metrics,
        tracing: Tracing = OFF,
    ) -> None:
        """`executor` has the threads that tokenize."""
        self._prompts = prompts
        self._reader = reader
        self._dispatcher = dispatcher
        self._executor = executor
        self._metrics = metrics
        self._tracing = tracing
        # When each thread that is at work began with the piece in hand.
        self._begun: dict[int, float] = {}

    async def judge(self, groups: Sequence[Group], call: Call) -> list[list[Judgement] | ServiceError]:
        """For each group its judgements, in order, or the ServiceError that befell it alone.

        Raises ServiceError for what befalls the whole call (a full queue).
        """
        failed = {number: group for number, group in enumerate(groups) if isinstance(group, ServiceError)}
        with self._tracing.span("tokenize", requests=len(groups)) as span:
            prompts = await self._build_groups(groups, failed, call)
            span.set(prompts=len(prompts), tokens=sum(one.prompt.tokens for one in prompts))
        items = [item for one in prompts for item in self._reader.items(one.prompt)]
        replies = iter(await self._dispatcher.ask(items, call))
        judged: list[list[Judgement]] = [[] for _ in groups]
        for one in prompts:
            try:
                judged[one.group].append(self._read(one, list(islice(replies, self._reader.samples))))
            except ServiceError as error:
                failed.setdefault(one.group, _named(error, one.spec))
        self._metrics.judged([judgement.label_mass for group in judged for judgement in group])
        return [failed.get(number) or group for number, group in enumerate(judged)]

    async def refusal(self, group: Group, call: Call) -> ServiceError | None:
        """Why the first prompt of a group cannot be asked; None if it can."""
        if isinstance(group, ServiceError):
            return group
        failed: dict[int, ServiceError] = {}
        await self._build_groups([group[:1]], failed, call)
        return failed.get(0)

    def admit(self, prompts: int) -> None:
        """Raise ServiceError(PAYLOAD_TOO_LARGE) for more prompts than an empty queue holds."""
        self._dispatcher.bounds.check(prompts * self._reader.samples, 0)

    def single_tokens(self, layout: Layout, texts: Iterable[str]) -> Iterator[str]:
        """Those of the texts that can be labels of this layout, in order: one token each, all distinct.

        Raises ServiceError(BAD_TEMPLATE) for a chat layout where the model has no chat template.
        """
        return self._prompts.single_tokens(layout, texts)

    def stuck(self, seconds: float) -> int:
        """How many of the threads that tokenize have been busy with one piece of work for longer than that."""
        return sum(time.monotonic() - begun > seconds for begun in list(self._begun.values()))

    async def close(self) -> None:
        """Let go of the score cache. To be called when nothing is asked any more."""
        await self._dispatcher.close()

    async def _build_groups(self, groups: Sequence[Group], failed: dict[int, ServiceError], call: Call) -> list[_Built]:
        """The prompts of the groups that have all of theirs; the others' errors are added to `failed`."""
        specs = [(n, spec) for n, group in enumerate(groups) if not isinstance(group, ServiceError) for spec in group]
        try:
            chunks = await self._build(specs, call)
        except TimeoutError:
            late = ServiceError(ErrorCode.DEADLINE_EXCEEDED, "not tokenized before the deadline")
            failed.update({number: failed.get(number, late) for number in range(len(groups))})
            return []
        built: list[_Built] = []
        for chunk in chunks:
            for (number, spec), prompt in zip(chunk.specs, chunk.prompts, strict=True):
                if isinstance(prompt, ServiceError):
                    failed.setdefault(number, _named(prompt, spec))
                else:
                    built.append(_Built(number, spec, prompt, chunk.seconds))
        return [one for one in built if one.group not in failed] if failed else built

    async def _build(self, specs: Sequence[_Numbered], call: Call) -> Sequence[_Chunk]:
        """The prompts in chunks, built here where that takes less than handing them to threads.

        Raises TimeoutError at the call's deadline.
        """
        meter = TokenMeter(self._dispatcher.bounds)
        if len(specs) <= INLINE_PROMPTS and sum(spec.size for _, spec in specs) <= INLINE_CHARS:
            return [self._build_chunk(specs, meter)]
        async with asyncio.timeout(call.seconds_left):
            await self._in_thread(partial(self._foresee, specs))
            chunks = [specs[start : start + CHUNK] for start in range(0, len(specs), CHUNK)]
            work = [self._in_thread(partial(self._build_chunk, chunk, meter)) for chunk in chunks]
            return await asyncio.gather(*work)

    def _build_chunk(self, specs: Sequence[_Numbered], meter: TokenMeter) -> _Chunk:
        meter.check()
        started = time.perf_counter()
        prompts = []
        for prompt in self._prompts.build_each([spec for _, spec in specs]):
            if not isinstance(prompt, ServiceError):
                meter.add(self._queued_tokens(prompt.tokens))
            prompts.append(prompt)
        return _Chunk(specs, prompts, time.perf_counter() - started)

    def _queued_tokens(self, tokens: int) -> int:
        """What a prompt of so many tokens takes up in the queue."""
        return (tokens + self._reader.new_tokens) * self._reader.samples

    def _foresee(self, specs: Sequence[_Numbered]) -> None:
        """Raise ServiceError(PAYLOAD_TOO_LARGE) where the texts alone, however they are tokenized, are too much."""
        sizes: dict[int, int] = {}
        hopeless: set[int] = set()
        fewest = _Remembered(self._prompts.fewest_tokens)
        for number, spec in specs:
            # A token may hold the end of one text and the beginning of the next.
            least = fewest.of(spec.prompt) + sum(fewest.of(answer) - 1 for answer in spec.answers)
            if spec.truncation == "error" and least > self._prompts.max_tokens:
                hopeless.add(number)  # its group is refused as too long, and is never queued
            sizes[number] = sizes.get(number, 0) + min(max(0, least), self._prompts.max_tokens)
        tokens = sum(size for number, size in sizes.items() if number not in hopeless)
        self._dispatcher.bounds.check(0, tokens * self._reader.samples)

    def _read(self, one: _Built, replies: Sequence[Reply]) -> Judgement:
        """The judgement of a prompt's replies. Raises ServiceError: one item that failed fails the prompt."""
        answers = []
        for reply in replies:
            if isinstance(reply.outcome, JobFailure):
                raise ServiceError(reply.outcome.code, reply.outcome.message)
            answers.append(reply.outcome)
        question = one.spec.layout.question if one.spec.layout else None
        try:
            judged = self._reader.judgement(question, one.prompt, answers)
        except ServiceError:
            self._metrics.unparseable(len(answers))
            raise
        except (TypeError, ValueError, OverflowError) as exc:
            # From a worker of another version, perhaps: an answer of another kind, or with other labels.
            message = "the worker's answer does not fit the question"
            raise ServiceError(ErrorCode.INFERENCE_FAILED, message) from exc
        if judged.samples:
            self._metrics.unparseable(judged.samples.drawn - judged.samples.parsed)
        cost = Cost(
            tokenize=one.seconds,
            queued=max(reply.queued for reply in replies),
            inference=max(reply.inference for reply in replies),
            prompt_tokens=len(replies) * one.prompt.tokens,
            cached_tokens=sum(answer.cached_tokens for answer in answers),
            completion_tokens=sum(a.new_tokens for a in answers if isinstance(a, Generated | GeneratedText)),
            truncated=one.prompt.truncated,
        )
        return replace(judged, cost=cost)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._watched, work)

    def _watched(self, work: Callable[[], Result]) -> Result:
        self._begun[threading.get_ident()] = time.monotonic()
        try:
            return work()
        finally:
            del self._begun[threading.get_ident()]


class _Remembered:
    """A measure of texts, taken once for each object: a comparison shows the same ones again and again."""

    def __init__(self, measure: Callable[[Sequence[str]], int]) -> None:
        self._measure = measure
        self._known: dict[int, int] = {}

    def of(self, text: str | Sequence[Message]) -> int:
        """The measure of a text that outlives this object."""
        if (known := self._known.get(id(text))) is None:
            texts = [text] if isinstance(text, str) else ["".join(message.content for message in text)]
            known = self._known[id(text)] = self._measure(texts)
        return known


def _named(error: ServiceError, spec: PromptSpec) -> ServiceError:
    """The error in the request's names: of a response, the longest one of the prompt, and of the spec if it has one."""
    if error.param == "response":
        error.param = spec.fields[max(range(len(spec.answers)), key=lambda index: len(spec.answers[index]))]
    if spec.label is not None:
        error.message = f"{spec.label}: {error.message}"
    return error

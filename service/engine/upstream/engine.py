"""The engine that judges through a server with OpenAI's API: vLLM, SGLang, llama.cpp, or a service on the net.

    items ──> one request each, some at a time, retried ──> the probabilities of the next token, or a text

Two ways of asking. `Completions` sends token ids, so the model's tokenizer must be known here, and asks for exactly the
labels' ids where the server can do that (vLLM's `logprob_token_ids`, seen in 0.32), else for the likeliest tokens.
`Chat` sends text, and finds the labels among the likeliest tokens of the reply by their spelling; no tokenizer is
needed.

One request holds one prompt: servers batch across requests by themselves, and a prompt that is refused, or slow, then
costs no other its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, Generic, TypeAlias

import structlog

from client.errors import ErrorCode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    EngineInfo,
    Executor,
    Generated,
    GeneratedText,
    ItemFailure,
    LabelLogprobs,
    ScoreItem,
    Task,
    TextScoreItem,
    items_of,
    prompt_tokens,
    tokens_of,
)
from service.engine.upstream.dialects import Dialect, Generate, Score
from service.engine.upstream.logprobs import UNSEEN, Answer, read, read_text
from service.engine.upstream.openai_client import Access, OpenAIServer, RefusalError, UpstreamError

Asking: TypeAlias = Callable[[float], Awaitable[AnyAnswer]]
"""Asks for one item until a deadline, of `time.monotonic()`."""

log = structlog.get_logger(__name__)

# A call takes at most so many times what one question may take, however many questions wait for their turn.
MAX_TURNS: Final = 3
_BATCH_TOKENS: Final = 1 << 20
# That a label is missing then says nothing of its probability, and asking again may help.
_NO_LIST: Final = "the upstream server returned its chosen token alone, without the likeliest ones that were asked for"
_FIELD_REFUSED: Final = frozenset({400, 422})


class UpstreamEngine(Generic[Score, Generate]):
    """Asks a server for each item. See `Engine` for the contract.

    What befalls one item is its ItemFailure: no answer in time, a label that was not returned, a prompt that the server
    finds too long. `floor` is the log-probability that stands in for a label that was not returned while another one
    was; it is lowered to that of the least likely token returned. Without it such an item fails.
    """

    def __init__(
        self,
        access: Access,
        dialect: Dialect[Score, Generate],
        *,
        max_tokens: int,
        task: Task = "labels",
        concurrency: int = 32,
        floor: float | None = None,
    ) -> None:
        """`max_tokens` is the longest item that is taken, `concurrency` how many requests are under way at most."""
        # Server and model are in the fingerprint. What computes there, nobody here can say.
        self.info = EngineInfo("upstream", task, "remote", max_tokens, _BATCH_TOKENS, Executor("remote", "none", None))
        self._access = access
        self._dialect = dialect
        self._concurrency = concurrency
        self._floor = floor
        self._runner = asyncio.Runner()
        self._server = OpenAIServer(access)

    def probe(self, item: AnyItem) -> None:
        """Ask for an item whose text is no secret, and find out what this server takes. Raises UpstreamError."""
        (ask,) = self._asking([item])
        self._runner.run(self._probe(ask))

    def run(self, items: Sequence[AnyItem]) -> Sequence[AnyAnswer | ItemFailure]:
        """One answer per item, in order. A text's seed goes to the server, which keeps to it or not.

        Raises ValueError for an item outside the contract.
        """
        failures: Counter[str] = Counter()
        answers = self._runner.run(self._gather(self._asking(items), failures))
        for reason, count in failures.items():
            log.warning("upstream failed", items=count, reason=reason)
        return answers

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._server.close())
        self._runner.close()

    def _asking(self, items: Sequence[AnyItem]) -> list[Asking]:
        """What asks for each item; raises ValueError as `run`."""
        most = self.info.max_tokens
        for item in items:
            if not prompt_tokens(item) or tokens_of(item) > most:
                raise ValueError(f"an item needs 1 to {most} tokens, has {tokens_of(item)}")
            match item:
                case ScoreItem(label_ids=()) | TextScoreItem(labels=()):
                    raise ValueError("an item has no labels")
        if self.info.task == "generate":
            return [partial(self._generate, item) for item in items_of(self._dialect.generate_kind, items)]
        return [partial(self._judge, item) for item in items_of(self._dialect.score_kind, items)]

    async def _gather(self, asking: Sequence[Asking], failures: Counter[str]) -> list[AnyAnswer | ItemFailure]:
        places = asyncio.Semaphore(self._concurrency)
        end = time.monotonic() + MAX_TURNS * self._access.timeout

        async def one(ask: Asking) -> AnyAnswer | ItemFailure:
            async with places:
                now = time.monotonic()
                try:
                    if now >= end:
                        raise self._access.too_late
                    return await ask(min(end, now + self._access.timeout))
                except UpstreamError as exc:
                    failures[str(exc)] += 1
                    return ItemFailure(exc.code, exc.message)
                except Exception as exc:  # one answer, however odd, costs no other item its own
                    failures[f"unexpected {type(exc).__name__}"] += 1
                    return ItemFailure(ErrorCode.INFERENCE_FAILED, "the upstream server's answer cannot be used")

        return list(await asyncio.gather(*map(one, asking)))

    async def _generate(self, item: Generate, deadline: float) -> Generated | GeneratedText:
        reply = read_text(await self._server.post(self._dialect.path, self._dialect.text_body(item), deadline))
        cached = min(reply.cached_tokens, prompt_tokens(item))
        return self._dialect.generated(replace(reply, cached_tokens=cached))

    async def _judge(self, item: Score, deadline: float) -> LabelLogprobs:
        answer = read(await self._server.post(self._dialect.path, self._dialect.body(item), deadline))
        found, argmax = self._dialect.find(answer, item)
        if None in found and answer.collapsed:
            raise UpstreamError(ErrorCode.INFERENCE_FAILED, _NO_LIST)
        logprobs, floored = _complete(found, answer, self._floor)
        return LabelLogprobs(logprobs, argmax, min(answer.cached_tokens, prompt_tokens(item)), floored)

    async def _probe(self, ask: Asking) -> None:
        while True:
            try:
                await ask(time.monotonic() + self._access.timeout)
            except RefusalError as refusal:
                if refusal.status in _FIELD_REFUSED and self._dialect.adapt(refusal):
                    continue
                raise _explained(refusal, self._access) from refusal
            except UpstreamError as exc:
                if exc.code is not ErrorCode.LABEL_NOT_RETURNED:
                    raise
                # Its own prompts may do better.
                log.warning("the upstream server did not return the labels of a probe", reason=exc.message)
                return
            log.info("the upstream server answers", url=self._access.url)
            return


def _complete(found: Sequence[float | None], answer: Answer, floor: float | None) -> tuple[tuple[float, ...], bool]:
    """The log-probabilities with the floor for what is missing, and whether anything was."""
    missing = [index for index, value in enumerate(found) if value is None]
    if all(value is None or value <= UNSEEN for value in found):
        missing = list(range(len(found)))
    if not missing:
        return tuple(value for value in found if value is not None), False
    count = len(answer.tokens)
    if len(missing) == len(found):
        problem = f"none of the labels is among the {count} tokens that the upstream server returned"
        raise UpstreamError(ErrorCode.LABEL_NOT_RETURNED, problem)
    if floor is None:
        problem = (
            f"label {missing[0] + 1} of {len(found)} is not among the {count} tokens that the upstream server "
            "returned, so its probability is not known; the service's --floor sets one for such cases"
        )
        raise UpstreamError(ErrorCode.LABEL_NOT_RETURNED, problem)
    return tuple(min(floor, answer.least) if value is None else value for value in found), True


def _explained(refusal: RefusalError, access: Access) -> UpstreamError:
    said = f" and says: {refusal.said}" if refusal.said else ""
    return UpstreamError(refusal.code, f"{access.url}: {refusal.message}{said}")

"""The engine that judges through a server with OpenAI's API: vLLM, SGLang, llama.cpp, or a hosted service.

    items -> one request each, up to `concurrency` at a time, with retries -> label probabilities, or text

There are four dialects. `Completions` sends token ids, so the model's tokenizer is needed here; it asks for exactly the
labels' ids if the server can do that (vLLM's `logprob_token_ids`, seen in 0.32), else for the most likely tokens.
`Chat` sends text and looks for the labels among the most likely first tokens of the reply, by spelling; no tokenizer is
needed. `Decisions` and `SystemOne` send text and have the server choose among the labels: see decisions.py.

A request holds one prompt, because servers batch across requests themselves, and so an item that is refused or times
out fails alone. It is not faster for it: `run` returns when the slowest item of the batch is answered or given up.
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
    check_kind,
    prompt_tokens,
    total_tokens,
)
from service.engine.upstream.dialects import Dialect, GenerateT, ScoreT
from service.engine.upstream.errors import RefusalError, UpstreamError
from service.engine.upstream.logprobs import parse_text
from service.engine.upstream.openai_client import Access, OpenAIServer

AskItem: TypeAlias = Callable[[float], Awaitable[AnyAnswer]]
"""Asks for one item until a deadline, in seconds of `time.monotonic()`."""

log = structlog.get_logger(__name__)

# A batch takes at most this many times one item's timeout, however many items wait for their turn.
MAX_TURNS: Final = 3
# High, because here it is --upstream-concurrency that limits a batch.
_MOST_BATCH_TOKENS: Final = 1 << 20
_FIELD_REFUSED: Final = frozenset({400, 422})


class UpstreamEngine(Generic[ScoreT, GenerateT]):
    """Implements Engine by asking a server for each item.

    An item fails alone if the server refuses it, does not answer in time, or does not return one of its labels.

    `floor` is a log-probability for a label that was not returned although another one of the item's labels was. It is
    lowered to the least likely returned token's, because a missing label cannot be more likely than that. None makes
    such an item fail.
    """

    def __init__(
        self,
        access: Access,
        dialect: Dialect[ScoreT, GenerateT],
        *,
        max_tokens: int,
        task: Task = "labels",
        concurrency: int = 32,
        floor: float | None = None,
    ) -> None:
        """`max_tokens`: the longest item. `concurrency`: most requests in flight."""
        # The executor says nothing: what computes on the server is unknown. The fingerprint has its address and model.
        executor = Executor("remote", "none", None)
        self.info = EngineInfo("upstream", task, "remote", max_tokens, _MOST_BATCH_TOKENS, executor)
        self._access = access
        self._dialect = dialect
        self._concurrency = concurrency
        self._floor = floor
        self._runner = asyncio.Runner()
        self._server = OpenAIServer(access)

    def probe(self, item: AnyItem) -> None:
        """Ask for `item` and adapt to what the server accepts. Raises UpstreamError.

        The error may quote the server's reply, so `item` must not hold a caller's text.
        """
        (ask,) = self._asks([item])
        self._runner.run(self._probe(ask))

    def run(self, items: Sequence[AnyItem]) -> Sequence[AnyAnswer | ItemFailure]:
        """See Engine. A seed is passed on, but a server may ignore it.

        Raises ValueError for an item outside the contract.
        """
        failures: Counter[str] = Counter()
        answers = self._runner.run(self._answer_all(self._asks(items), failures))
        for reason, count in failures.items():
            log.warning("upstream failed", items=count, reason=reason)
        return answers

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._server.close())
        self._runner.close()

    def _asks(self, items: Sequence[AnyItem]) -> list[AskItem]:
        most = self.info.max_tokens
        for item in items:
            if not prompt_tokens(item) or total_tokens(item) > most:
                raise ValueError(f"an item needs 1 to {most} tokens, has {total_tokens(item)}")
            match item:
                case ScoreItem(label_ids=()) | TextScoreItem(labels=()):
                    raise ValueError("an item has no labels")
        if self.info.task == "generate":
            return [partial(self._generate, item) for item in check_kind(self._dialect.generate_kind, items)]
        return [partial(self._score, item) for item in check_kind(self._dialect.score_kind, items)]

    async def _answer_all(self, asks: Sequence[AskItem], failures: Counter[str]) -> list[AnyAnswer | ItemFailure]:
        slots = asyncio.Semaphore(self._concurrency)
        end = time.monotonic() + MAX_TURNS * self._access.timeout

        async def answer(ask: AskItem) -> AnyAnswer | ItemFailure:
            async with slots:
                now = time.monotonic()
                try:
                    if now >= end:
                        raise self._access.timed_out
                    return await ask(min(end, now + self._access.timeout))
                except UpstreamError as exc:
                    failures[str(exc)] += 1
                    return ItemFailure(exc.code, exc.message)
                except Exception as exc:  # an odd answer must not cost the other items theirs
                    failures[f"unexpected {type(exc).__name__}"] += 1
                    return ItemFailure(ErrorCode.INFERENCE_FAILED, "the upstream server's answer cannot be used")

        return list(await asyncio.gather(*map(answer, asks)))

    async def _generate(self, item: GenerateT, deadline: float) -> Generated | GeneratedText:
        body = self._dialect.generate_body(item)
        reply = parse_text(await self._server.post(self._dialect.path, body, deadline))
        cached = min(reply.cached_tokens, prompt_tokens(item))
        return self._dialect.generated(replace(reply, cached_tokens=cached))

    async def _score(self, item: ScoreT, deadline: float) -> LabelLogprobs:
        # One after the other, so that a later part finds the prompt in the server's prefix cache.
        bodies = [self._dialect.score_body(part) for part in self._dialect.parts(item)]
        contents = [await self._server.post(self._dialect.path, body, deadline) for body in bodies]
        return self._dialect.returned(contents, item).answer(self._floor, prompt_tokens(item))

    async def _probe(self, ask: AskItem) -> None:
        while True:
            try:
                await ask(time.monotonic() + self._access.timeout)
            except RefusalError as refusal:
                if refusal.status in _FIELD_REFUSED and self._dialect.adapt(refusal):
                    continue
                raise _with_server_message(refusal, f"{self._access.url}{self._dialect.path}") from refusal
            except UpstreamError as exc:
                if exc.code is not ErrorCode.LABEL_NOT_RETURNED:
                    raise
                # Not fatal: the templates in use may ask for labels that this server does return.
                log.warning("the upstream server did not return the labels of a probe", reason=exc.message)
                return
            log.info("the upstream server answers", url=self._access.url)
            return


def _with_server_message(refusal: RefusalError, asked: str) -> UpstreamError:
    said = f" and says: {refusal.said}" if refusal.said else ""
    return UpstreamError(refusal.code, f"{asked}: {refusal.message}{said}")

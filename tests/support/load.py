"""Thousands of concurrent requests through the real client, and an account of what became of each."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from client import AsyncJudge, JudgeAPIError, JudgeError
from client.errors import RETRYABLE_STATUS, JudgeTimeoutError
from client.schema import ScoreRequest, ScoreResult
from service.engine.fake import FakeEngine, fake_tokenizer
from service.judge.readers import LabelReader
from service.judge.template_files import load_library
from service.prompts.builder import PromptBuilder

PROMPT = "What is 2+2?"
RETRY_PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class Mix:
    """What to send: all batches and `callers` single requests at once, the other singles as those are answered.

    Each call may take `timeout` seconds, including retries. `special` replaces the usual response with that id.
    """

    batches: int = 50
    batch_size: int = 100
    singles: int = 500
    callers: int = 64
    timeout: float = 40.0
    special: dict[int, str] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """The number of judgements; their ids are 0 to `sent - 1`."""
        return self.batches * self.batch_size + self.singles

    def response(self, number: int) -> str:
        """The text with this id; all are different."""
        return self.special.get(number, f"4 {number}")

    def batch_ids(self) -> list[list[int]]:
        """The ids in each batch."""
        return [list(range(n * self.batch_size, (n + 1) * self.batch_size)) for n in range(self.batches)]


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of all ids: `once` were answered exactly once, with the right number; `wrong` got another text's
    number; `failed` counts errors by code; `hung` got no answer in time."""

    sent: int
    once: int = 0
    twice: int = 0
    wrong: int = 0
    hung: int = 0
    failed: dict[str, int] = field(default_factory=dict)


class JudgedAlone:
    """The right numbers: each text judged by itself, in this process, without a service."""

    def __init__(self) -> None:
        self._prompts = PromptBuilder(fake_tokenizer(), 4096)
        self._template = load_library("chat").default("pointwise")
        self._engine = FakeEngine()

    def log_odds(self, response: str) -> float:
        """The log-odds of this response to PROMPT."""
        built = self._prompts.build(self._template, PROMPT, [response], "error")
        return LabelReader().judgement(self._template.question, built, self._engine.run([built])).log_odds


class RunningLoad:
    """A mix sent to services from a thread of its own, while the test does something else.

        with RunningLoad(mix, [api.url]) as load:
            load.wait_for_answers(1000)
            worker.kill()
        assert load.tally() == Tally(sent=mix.sent, once=mix.sent)

    Each caller stays with one of the services. Items of a batch that come back with a retryable error are sent again,
    as a program that wants all of its answers would do.
    """

    def __init__(self, mix: Mix, urls: Sequence[str]) -> None:
        self.mix = mix
        self.answers: dict[int, list[float]] = {}
        self.errors: dict[int, JudgeError] = {}
        self.retried: Counter[str] = Counter()
        self._urls = urls
        self._singles = iter(range(mix.batches * mix.batch_size, mix.sent))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Twice a call's timeout: whatever has no answer by then hangs.
        self._thread.join(2 * self.mix.timeout)

    @property
    def over(self) -> bool:
        """Whether every caller has its answers."""
        return not self._thread.is_alive()

    def wait_for_answers(self, count: int) -> None:
        """Wait for `count` answers; raises RuntimeError if they do not come."""
        deadline = time.monotonic() + self.mix.timeout
        while len(self.answers) < count:
            if self.over or time.monotonic() > deadline:
                raise RuntimeError(f"{len(self.answers)} of {count} answers; errors: {self._codes()}")
            time.sleep(0.01)

    def tally(self) -> Tally:
        """The account at the end: every answer is compared with its text judged alone."""
        alone = JudgedAlone()
        right = {n: alone.log_odds(self.mix.response(n)) for n in self.answers}
        hung = [n for n in range(self.mix.sent) if n not in self.answers and n not in self.errors]
        timed_out = [n for n, error in self.errors.items() if isinstance(error, JudgeTimeoutError)]
        return Tally(
            sent=self.mix.sent,
            once=sum(got == [right[n]] for n, got in self.answers.items() if n not in self.errors),
            twice=sum(len(got) > 1 or n in self.errors for n, got in self.answers.items()),
            wrong=sum(value != right[n] for n, got in self.answers.items() for value in got),
            hung=len(hung) + len(timed_out),
            failed=dict(self._codes()),
        )

    def _codes(self) -> Counter[str]:
        errors = (error for error in self.errors.values() if not isinstance(error, JudgeTimeoutError))
        return Counter(_code(error) for error in errors)

    async def _send(self) -> None:
        judges = [AsyncJudge(url, timeout=self.mix.timeout, max_retries=100) for url in self._urls]
        batches = [self._ask_batch(judges[n % len(judges)], ids) for n, ids in enumerate(self.mix.batch_ids())]
        singles = [self._ask_singles(judges[n % len(judges)]) for n in range(self.mix.callers)]
        try:
            await asyncio.gather(*batches, *singles)
        finally:
            for judge in judges:
                await judge.aclose()

    async def _ask_singles(self, judge: AsyncJudge) -> None:
        for number in self._singles:
            try:
                self._record(number, await judge.score(PROMPT, self.mix.response(number)))
            except JudgeError as error:
                self.errors[number] = error

    async def _ask_batch(self, judge: AsyncJudge, ids: Sequence[int]) -> None:
        until = time.monotonic() + self.mix.timeout
        while ids:
            ids = await self._ask_once(judge, ids, last=time.monotonic() + RETRY_PAUSE > until)
            if ids:
                await asyncio.sleep(RETRY_PAUSE)

    async def _ask_once(self, judge: AsyncJudge, ids: Sequence[int], *, last: bool) -> list[int]:
        """Send these; returns the ids worth sending again."""
        items = [ScoreRequest(prompt=PROMPT, response=self.mix.response(number)) for number in ids]
        again = []
        try:
            outcomes = await judge.score_batch(items)
        except JudgeError as error:
            self.errors.update(dict.fromkeys(ids, error))
            return []
        for number, outcome in zip(ids, outcomes, strict=True):
            if isinstance(outcome, ScoreResult):
                self._record(number, outcome)
            elif outcome.status in RETRYABLE_STATUS and not last:
                self.retried[outcome.code] += 1
                again.append(number)
            else:
                self.errors[number] = outcome
        return again

    def _record(self, number: int, result: ScoreResult) -> None:
        self.answers.setdefault(number, []).append(result.log_odds)


def _code(error: JudgeError) -> str:
    return error.code if isinstance(error, JudgeAPIError) else type(error).__name__

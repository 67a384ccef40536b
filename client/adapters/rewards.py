"""What reward functions of all trainers share: whom they ask, what they ask, and what an answer is worth.

A framework's own module (`trl`, `verl`, `swift`) adds the form of the call. A completion that could not be judged never
gets a score that nobody chose: `RewardOptions.unjudged` says what it counts as.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from pydantic import ValidationError

from client.adapters.dialogues import Dialogue, prompt_of, response_of
from client.bulk import DEFAULT_OPTIONS, BulkOptions
from client.errors import ErrorCode, JudgeAPIError, JudgeError
from client.judge import AsyncJudge, Judge
from client.runtime.cli import default_url
from client.schema import InlineTemplate, ScoreRequest, ScoreResult, Truncation
from client.texts import EMPTY_PROMPT, EMPTY_RESPONSE, is_blank

J = TypeVar("J", Judge, AsyncJudge)

RewardValue: TypeAlias = Literal["log_odds", "score", "calibrated"]
# An error code stands for a completion that the judge is not asked about.
Asked: TypeAlias = ScoreRequest | str
Outcome: TypeAlias = ScoreResult | JudgeAPIError | str

_log = logging.getLogger("client")


class TooManyFailuresError(JudgeError):
    """More completions could not be judged than `RewardOptions` allows."""


@dataclass(kw_only=True)
class RewardOptions:
    """How to ask, and which number of the answer is the reward. Raises ValueError for options that cannot work.

    Args:
        value: "log_odds" (does not saturate), "score" (0 to 1) or "calibrated" (0 to 1; the service needs a
            calibration).
        category_column: The dataset's column with each prompt's category, if it has one. None ignores the column, and
            so does a `template`.
        template: A template's name, or an InlineTemplate of your own, for all prompts.
        truncation: What to do with texts that are too long, as in `ScoreRequest`.
        max_failures: The share of a call's completions, from 0 to 1, that may fail to be judged; more stop the
            training. Empty completions do not count.
        unjudged: The reward of completions that are empty or could not be judged: a number; "raise", which stops the
            training at the first; or None, which leaves them without a reward where the trainer knows what that means
            (see each adapter) and is "raise" elsewhere.
        bulk: Batch size, concurrency and patience.
    """

    value: RewardValue = "log_odds"
    category_column: str | None = "category"
    template: str | InlineTemplate | None = None
    truncation: Truncation = "error"
    max_failures: float = 0.1
    unjudged: float | Literal["raise"] | None = None
    bulk: BulkOptions = field(default=DEFAULT_OPTIONS)

    def __post_init__(self) -> None:
        if self.value not in get_args(RewardValue):
            raise ValueError(f"value must be one of {', '.join(get_args(RewardValue))}, not {self.value!r}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max_failures is a share from 0 to 1, not {self.max_failures}")
        if not _is_policy(self.unjudged):
            raise ValueError(f'unjudged is a finite reward, "raise" or None, not {self.unjudged!r}')


class RewardFunction(Generic[J]):
    """The judge as a reward function; a framework's class says how it is called.

    If the judge returned an error, or the prompt or completion is blank (empty, or nothing visible), the reward is
    `RewardOptions.unjudged`.

    Args:
        judge: The service's address, or a client, which the caller closes. None takes JUDGE_URL from the environment,
            or http://127.0.0.1:8000.
        options: See `RewardOptions`.
        api_key: The key for an address. None takes JUDGE_API_KEY from the environment.
        name: What the trainer logs the reward under; by default `judge_log_odds` or the like.

    Attributes:
        judge: The client that is asked.
        failures: Completions that could not be judged so far in this process, by error code; blank completions count as
            "empty_response", blank prompts as "empty_prompt".

    It pickles and copies with its options, name and counts. An address is sent along and the client made anew on the
    other side, which reads its own JUDGE_API_KEY: the pickle holds a key only if `api_key` or a client was given.

    Raises:
        ValueError: For an address or a key that cannot work, or a key beside a client.
        TypeError: For a client of the other kind: Judge and AsyncJudge do not replace each other.
    """

    client_class: type[J]
    judge: J

    def __init__(
        self,
        judge: J | str | None = None,
        options: RewardOptions | None = None,
        *,
        api_key: str | None = None,
        name: str | None = None,
    ) -> None:
        self.options = options or RewardOptions()
        self.failures: Counter[str] = Counter()
        self.__name__ = name or f"judge_{self.options.value}"
        # Whether the client was made here, from the address and the key that are pickled in its place.
        self._address: tuple[str, str | None] | None = None
        if judge is None or isinstance(judge, str):
            self._address = (judge or default_url(), api_key)
            self._connect()
        elif api_key is not None:
            raise ValueError("api_key goes with an address: a client has a key of its own")
        elif not isinstance(judge, self.client_class):
            raise TypeError(f"{type(self).__name__} needs the class {self.client_class.__name__}, not {judge!r}")
        else:
            self.judge = judge

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "judge" or self._address is None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def _connect(self) -> None:
        """Make the client of an address; it opens no connection yet."""
        if self._address is not None:
            url, api_key = self._address
            self.judge = self.client_class(url, api_key=api_key)

    def _requests(self, dialogues: Iterable[tuple[Dialogue, Dialogue]], columns: Mapping[str, Any]) -> list[Asked]:
        """The requests for pairs of prompt and completion; an error code where there is nothing valid to ask.

        `columns` are the dataset's other columns, of which the options' `category_column` is used.
        """
        pairs = list(dialogues)
        column = self.options.category_column
        known = column is not None and self.options.template is None and column in columns
        categories: Sequence[str | None] = columns[column] if known and column else [None] * len(pairs)
        return [self._request(*pair, category) for pair, category in zip(pairs, categories, strict=True)]

    def _request(self, prompt: Dialogue, completion: Dialogue, category: str | None) -> Asked:
        response, question = response_of(completion), prompt_of(prompt)
        if is_blank(response):
            return EMPTY_RESPONSE
        if isinstance(question, str) and is_blank(question):
            return EMPTY_PROMPT
        try:
            return ScoreRequest.model_validate(
                {
                    "prompt": question,
                    "response": response,
                    "category": category,
                    "template": self.options.template,
                    "truncation": self.options.truncation,
                }
            )
        except ValidationError as exc:
            _log.warning("a prompt does not make a valid request: %s", exc.errors(include_input=False)[0]["msg"])
            return ErrorCode.INVALID_REQUEST.value

    def _rewards(
        self, outcomes: Sequence[Outcome], log_metric: Callable[[str, float], None] | None = None
    ) -> list[float | None]:
        """The rewards of a call's outcomes; failures are counted, logged, and handed to `log_metric` as a share.

        Raises TooManyFailuresError if more failed than the options allow.
        """
        failed = Counter(code for code in map(_error_code, outcomes) if code is not None)
        self.failures.update(failed)
        if log_metric is not None and outcomes:
            log_metric(f"{self.__name__}/unjudged", failed.total() / len(outcomes))
        if failed:
            self._check_failures(failed, outcomes)
        return [self._reward(outcome) for outcome in outcomes]

    def _check_failures(self, failed: Counter[str], outcomes: Sequence[Outcome]) -> None:
        counts = ", ".join(f"{code}: {count}" for code, count in failed.most_common())
        _log.warning("%d of %d completions could not be judged (%s)", failed.total(), len(outcomes), counts)
        bound = self._broken_bound(failed, len(outcomes))
        if bound is None:
            return
        first = next((outcome for outcome in outcomes if isinstance(outcome, JudgeAPIError)), None)
        example = f"; the first: {first}" if first else ""
        raise TooManyFailuresError(
            f"{failed.total()} of {len(outcomes)} completions could not be judged ({counts}){example}. {bound}"
        ) from first

    def _broken_bound(self, failed: Counter[str], total: int) -> str | None:
        """Which of the options so many failures among `total` completions break, in words; None if they break none."""
        if self.options.unjudged == "raise":
            return 'unjudged is "raise"; give the number that such completions count as to go on'
        if failed.total() - failed[EMPTY_RESPONSE] > self.options.max_failures * total:
            return f"max_failures is {self.options.max_failures:g} of {total}"
        return None

    def _reward(self, outcome: Outcome) -> float | None:
        if not isinstance(outcome, ScoreResult):
            assert self.options.unjudged != "raise"
            return self.options.unjudged
        reward: float | None = getattr(outcome, self.options.value)
        if reward is None:
            raise JudgeError(
                f"the service has no calibration for template {outcome.template}: start it with one, or use log_odds"
            )
        return reward


class SyncRewardFunction(RewardFunction[Judge]):
    """A reward function that is called and answers."""

    client_class = Judge

    def _ask(self, requests: Sequence[Asked]) -> list[Outcome]:
        valid = [request for request in requests if isinstance(request, ScoreRequest)]
        return _in_place(requests, self.judge.score_many(valid, options=self.options.bulk))


class AsyncRewardFunction(RewardFunction[AsyncJudge]):
    """A reward function that is awaited."""

    client_class = AsyncJudge

    async def _ask(self, requests: Sequence[Asked]) -> list[Outcome]:
        valid = [request for request in requests if isinstance(request, ScoreRequest)]
        if self._address is None:
            return _in_place(requests, await self.judge.score_many(valid, options=self.options.bulk))
        # A client for each call: trainers end their event loops without a chance to close one.
        async with copy(self.judge) as judge:
            return _in_place(requests, await judge.score_many(valid, options=self.options.bulk))


def raise_unless_given(options: RewardOptions | None) -> RewardOptions:
    """The options for a trainer that would count None as a score: `unjudged` is then "raise"."""
    options = options or RewardOptions()
    return replace(options, unjudged="raise") if options.unjudged is None else options


def _is_policy(unjudged: object) -> bool:
    return unjudged in (None, "raise") or (isinstance(unjudged, (int, float)) and math.isfinite(unjudged))


def _in_place(requests: Sequence[Asked], answers: Iterable[ScoreResult | JudgeAPIError]) -> list[Outcome]:
    """The answers to the valid requests, with the error codes of the others between them."""
    rest = iter(answers)
    return [next(rest) if isinstance(request, ScoreRequest) else request for request in requests]


def _error_code(outcome: Outcome) -> str | None:
    if isinstance(outcome, JudgeAPIError):
        return outcome.code
    return outcome if isinstance(outcome, str) else None

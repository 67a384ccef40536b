"""The judge as a reward function for TRL's GRPOTrainer (TRL 1.16; any trainer that calls reward functions alike).

    with Judge("http://localhost:8000") as judge:
        trainer = GRPOTrainer(model, reward_funcs=JudgeReward(judge), train_dataset=dataset, args=config)
        trainer.train()

GRPOTrainer leaves a completion without a reward (None) out of its group's baseline and learns nothing from it.
Elsewhere a missing reward counts as 0: beside a second reward function, and always in OnlineDPOTrainer. In log-odds, 0
is better than every completion that the judge finds more bad than good: set `RewardOptions.unjudged` there, to -20 for
example.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from pydantic import ValidationError

from client.bulk import DEFAULT_OPTIONS, BulkOptions
from client.errors import ErrorCode, JudgeAPIError, JudgeError
from client.judge import Judge
from client.schema import InlineTemplate, ScoreRequest, ScoreResult, Truncation
from client.texts import is_blank

Value = Literal["log_odds", "score", "calibrated"]
# A text, or messages as TRL has them: mappings with role and content, the content a text or a list of parts.
Dialogue = str | Sequence[Mapping[str, Any]]

EMPTY: Final = "empty_response"
EMPTY_PROMPT: Final = "empty_prompt"

_log = logging.getLogger("client")


class TooManyFailuresError(JudgeError):
    """More of a call's completions could not be judged than the reward function puts up with."""


@dataclass(kw_only=True)
class RewardOptions:
    """What is asked, and what of the answer is the reward.

    `value`: "log_odds" (does not saturate), "score" (0 to 1) or "calibrated" (needs a service with a calibration).
    `category_column` is the dataset's column with each prompt's category, where it has one; None ignores it, and so
    does a `template`. A share of completions over `max_failures` that could not be judged stops the training.
    `unjudged` is the reward of completions that are empty or could not be judged; None tells the trainer so.
    """

    value: Value = "log_odds"
    category_column: str | None = "category"
    template: str | InlineTemplate | None = None
    truncation: Truncation = "error"
    max_failures: float = 0.1
    unjudged: float | None = None
    bulk: BulkOptions = field(default=DEFAULT_OPTIONS)

    def __post_init__(self) -> None:
        if self.value not in get_args(Value):
            raise ValueError(f"value must be one of {', '.join(get_args(Value))}, not {self.value!r}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max_failures is a share from 0 to 1, not {self.max_failures}")
        if self.unjudged is not None and not math.isfinite(self.unjudged):
            raise ValueError(f"unjudged is a finite reward or None, not {self.unjudged}")


class JudgeReward:
    """A reward function: how good an answer the judge finds each completion to its prompt.

    Prompts and completions may be texts or conversations; of a conversation's completion its last assistant message
    is judged. The reward is `RewardOptions.unjudged` where the judge gave an error, and where prompt or completion are
    empty, or hold nothing but white space and other characters that cannot be seen.

    Attributes:
        failures: What could not be judged so far, counted by error code; empty completions as "empty_response", and
            empty prompts as "empty_prompt".

    Raises, when called, TooManyFailuresError (empty completions are the policy's doing and do not count towards it),
    and any JudgeError of the judge as a whole, such as one that stays out of reach.
    """

    def __init__(self, judge: Judge, options: RewardOptions | None = None, *, name: str | None = None) -> None:
        self.options = options or RewardOptions()
        self.failures: Counter[str] = Counter()
        # What TRL logs the reward under.
        self.__name__ = name or f"judge_{self.options.value}"
        self._judge = judge

    def __call__(
        self, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any
    ) -> list[float | None]:
        """The rewards, in order; `columns` are the dataset's other columns and TRL's own extras."""
        categories = self._categories(columns, len(prompts))
        asked = [
            self._request(prompt, completion, category)
            for prompt, completion, category in zip(prompts, completions, categories, strict=True)
        ]
        outcomes = iter(
            self._judge.score_many(
                (request for request in asked if isinstance(request, ScoreRequest)), options=self.options.bulk
            )
        )
        results = [next(outcomes) if isinstance(request, ScoreRequest) else request for request in asked]
        failed = Counter(code for code in map(_failure, results) if code is not None)
        self._account(failed, results, columns.get("log_metric"))
        return [
            self._reward(result) if isinstance(result, ScoreResult) else self.options.unjudged for result in results
        ]

    def _categories(self, columns: Mapping[str, Any], count: int) -> Sequence[str | None]:
        column = self.options.category_column
        if column is None or self.options.template is not None or column not in columns:
            return [None] * count
        categories: Sequence[str | None] = columns[column]
        return categories

    def _request(self, prompt: Dialogue, completion: Dialogue, category: str | None) -> ScoreRequest | str:
        """The request, or the code of the error that makes it none."""
        response = completion if isinstance(completion, str) else _last_answer(completion)
        if is_blank(response):
            return EMPTY
        question = prompt if isinstance(prompt, str) else [turn for turn in map(_message, prompt) if _is_said(turn)]
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
            _log.warning("a prompt cannot be put to the judge: %s", exc.errors(include_input=False)[0]["msg"])
            return ErrorCode.INVALID_REQUEST.value

    def _account(
        self, failed: Counter[str], results: Sequence[object], log_metric: Callable[[str, float], None] | None
    ) -> None:
        """Count, log and, where there are too many, stop."""
        self.failures.update(failed)
        if log_metric is not None and results:
            log_metric(f"{self.__name__}/unjudged", failed.total() / len(results))
        if not failed:
            return
        said = ", ".join(f"{code}: {count}" for code, count in failed.most_common())
        _log.warning("%d of %d completions have no reward (%s)", failed.total(), len(results), said)
        if failed.total() - failed[EMPTY] > self.options.max_failures * len(results):
            first = next((result for result in results if isinstance(result, JudgeAPIError)), None)
            example = f"; the first: {first}" if first else ""
            raise TooManyFailuresError(
                f"{failed.total()} of {len(results)} completions could not be judged ({said}){example}. "
                f"max_failures is {self.options.max_failures:g}"
            ) from first

    def _reward(self, result: ScoreResult) -> float:
        reward: float | None = getattr(result, self.options.value)
        if reward is None:
            raise JudgeError(
                f"the service has no calibration for template {result.template}: start it with one, or use log_odds"
            )
        return reward


def _failure(result: ScoreResult | JudgeAPIError | str) -> str | None:
    """The code under which it is counted; None for a result."""
    if isinstance(result, JudgeAPIError):
        return result.code
    return result if isinstance(result, str) else None


def _last_answer(completion: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last assistant message: with tools, what the model says when it has called them all."""
    answers = [message for message in completion if message.get("role") == "assistant"]
    return _text(answers[-1].get("content")) if answers else ""


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Role and text alone; TRL's messages may carry more."""
    return {"role": message.get("role"), "content": _text(message.get("content"))}


def _is_said(message: Mapping[str, Any]) -> bool:
    """False for an empty message of the system's, as data sets write that there is none."""
    return message["role"] != "system" or not is_blank(message["content"])


def _text(content: object) -> str:
    """A content as one text; of a list of parts, those that are text."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""

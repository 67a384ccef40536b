"""The judge as a reward function for TRL's GRPOTrainer (TRL 1.16), and any trainer with the same reward functions.

    with Judge("http://localhost:8000") as judge:
        trainer = GRPOTrainer(model, reward_funcs=JudgeReward(judge), train_dataset=dataset, args=config)
        trainer.train()

GRPOTrainer leaves a completion without a reward (None) out of its group's baseline and learns nothing from it. But a
missing reward counts as 0 if there is a second reward function, and always in OnlineDPOTrainer. In log-odds, 0 beats
every completion that the judge finds more bad than good, so set `RewardOptions.unjudged` there, e.g. to -20.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from pydantic import ValidationError

from client.bulk import DEFAULT_OPTIONS, BulkOptions
from client.errors import ErrorCode, JudgeAPIError, JudgeError
from client.judge import Judge
from client.schema import InlineTemplate, ScoreRequest, ScoreResult, Truncation
from client.texts import EMPTY_PROMPT, EMPTY_RESPONSE, is_blank

RewardValue: TypeAlias = Literal["log_odds", "score", "calibrated"]
# A text, or TRL's messages: mappings with role and content, the content a text or a list of parts.
Dialogue: TypeAlias = str | Sequence[Mapping[str, Any]]

_log = logging.getLogger("client")


class TooManyFailuresError(JudgeError):
    """More of a call's completions could not be judged than `RewardOptions.max_failures` allows."""


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
        unjudged: The reward of completions that are empty or could not be judged; None leaves them without one.
        bulk: Batch size, concurrency and patience.
    """

    value: RewardValue = "log_odds"
    category_column: str | None = "category"
    template: str | InlineTemplate | None = None
    truncation: Truncation = "error"
    max_failures: float = 0.1
    unjudged: float | None = None
    bulk: BulkOptions = field(default=DEFAULT_OPTIONS)

    def __post_init__(self) -> None:
        if self.value not in get_args(RewardValue):
            raise ValueError(f"value must be one of {', '.join(get_args(RewardValue))}, not {self.value!r}")
        if not 0 <= self.max_failures <= 1:
            raise ValueError(f"max_failures is a share from 0 to 1, not {self.max_failures}")
        if self.unjudged is not None and not math.isfinite(self.unjudged):
            raise ValueError(f"unjudged is a finite reward or None, not {self.unjudged}")


class JudgeReward:
    """A reward function: how good an answer each completion is to its prompt, as the judge sees it.

    Prompts and completions may be texts or conversations; of a conversational completion, the last assistant message is
    judged. If the judge returned an error, or the prompt or completion is blank (empty, or nothing visible), the reward
    is `RewardOptions.unjudged`.

    Args:
        judge: A `Judge`; the caller closes it.
        options: See `RewardOptions`.
        name: What TRL logs the reward under; by default `judge_log_odds` or the like.

    Attributes:
        judge: The client that is asked.
        failures: Completions that could not be judged so far, by error code; blank completions count as
            "empty_response", blank prompts as "empty_prompt".

    Calling it raises TooManyFailuresError, and any JudgeError of the judge as a whole, e.g. if it stays unreachable.
    """

    def __init__(self, judge: Judge, options: RewardOptions | None = None, *, name: str | None = None) -> None:
        self.options = options or RewardOptions()
        self.failures: Counter[str] = Counter()
        self.__name__ = name or f"judge_{self.options.value}"
        self.judge = judge

    def __call__(
        self, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any
    ) -> list[float | None]:
        """The rewards, one per completion; `columns` are the dataset's other columns and TRL's own extras."""
        categories = self._categories(columns, len(prompts))
        requests = [
            self._request(prompt, completion, category)
            for prompt, completion, category in zip(prompts, completions, categories, strict=True)
        ]
        valid = [request for request in requests if isinstance(request, ScoreRequest)]
        outcomes = iter(self.judge.score_many(valid, options=self.options.bulk))
        results = [next(outcomes) if isinstance(request, ScoreRequest) else request for request in requests]
        failed = Counter(code for code in map(_error_code, results) if code is not None)
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
        """The request, or an error code if there is nothing to judge or the request is invalid."""
        response = completion if isinstance(completion, str) else _last_answer(completion)
        if is_blank(response):
            return EMPTY_RESPONSE
        question = prompt if isinstance(prompt, str) else _visible_turns(prompt)
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

    def _account(
        self, failed: Counter[str], results: Sequence[object], log_metric: Callable[[str, float], None] | None
    ) -> None:
        """Count and log failures; raises TooManyFailuresError if there are too many."""
        self.failures.update(failed)
        if log_metric is not None and results:
            log_metric(f"{self.__name__}/unjudged", failed.total() / len(results))
        if not failed:
            return
        counts = ", ".join(f"{code}: {count}" for code, count in failed.most_common())
        _log.warning("%d of %d completions have no reward (%s)", failed.total(), len(results), counts)
        if failed.total() - failed[EMPTY_RESPONSE] > self.options.max_failures * len(results):
            first = next((result for result in results if isinstance(result, JudgeAPIError)), None)
            example = f"; the first: {first}" if first else ""
            raise TooManyFailuresError(
                f"{failed.total()} of {len(results)} completions could not be judged ({counts}){example}. "
                f"max_failures is {self.options.max_failures:g}"
            ) from first

    def _reward(self, result: ScoreResult) -> float:
        reward: float | None = getattr(result, self.options.value)
        if reward is None:
            raise JudgeError(
                f"the service has no calibration for template {result.template}: start it with one, or use log_odds"
            )
        return reward


def _error_code(result: ScoreResult | JudgeAPIError | str) -> str | None:
    if isinstance(result, JudgeAPIError):
        return result.code
    return result if isinstance(result, str) else None


def _last_answer(completion: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last assistant message: with tools, what the model says after the last call."""
    answers = [message for message in completion if message.get("role") == "assistant"]
    return _content_text(answers[-1].get("content")) if answers else ""


def _visible_turns(prompt: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The roles and texts of TRL's messages, without blank system turns, which data sets write for "none"."""
    turns: list[dict[str, Any]] = [
        {"role": message.get("role"), "content": _content_text(message.get("content"))} for message in prompt
    ]
    return [turn for turn in turns if turn["role"] != "system" or not is_blank(turn["content"])]


def _content_text(content: object) -> str:
    """A message's content as one text; parts that are not text are dropped."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""

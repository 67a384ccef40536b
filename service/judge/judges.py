"""The judges: what each asks an engine for, and how it reads the answers. A service runs one of them (`--judge`).

yes-no        P(Yes) against P(No) of a question about one response, or about two (A against B) on request
pairwise      the same about two responses, in both orders; it scores none by itself
self-reward   a grade from 0 to 5: the expected one over the digits' probabilities, or read from a generated text
reward-model  the logit of a classification head that reads the conversation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from client.chat import stop_ids, turn_end
from client.errors import ErrorCode
from client.schema import CompareMode
from service.errors import ServiceError
from service.judge.readers import LabelReader, LogitReader, Reader, Sampling, TextReader
from service.judge.templates import Mode

if TYPE_CHECKING:
    from service.loading.model import Model
    from service.settings import ModelSettings

REWARD_TEMPLATE: Final = "reward-model@1"
"""Stands for the template in results of a reward model, which has none."""

# Which templates a request's mode needs; None for a judge that reads the conversation itself.
Modes: TypeAlias = Mapping[CompareMode, Mode | None]


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge as requests see it. `modes` lists what it can do, the default for requests that name no mode first."""

    name: str
    reader: Reader
    modes: Modes

    @property
    def own_mode(self) -> CompareMode:
        """How /compare is answered when the request does not say."""
        return next(iter(self.modes))

    @property
    def template_modes(self) -> tuple[Mode, ...]:
        """The modes of templates that it can use."""
        return tuple(mode for mode in self.modes.values() if mode is not None)

    def refusal(self, *, compares: bool) -> ServiceError:
        """The error for a request whose mode it does not have, a comparison or not."""
        if self.own_mode == "pairwise":
            advice = "leave mode out" if compares else "send two or more responses to /compare"
            does = "which compares responses two by two and judges none by itself"
        else:
            advice, does = "leave mode out", "which judges responses one by one"
        other = "yes-no" if self.own_mode == "pairwise" else "pairwise"
        return ServiceError(
            ErrorCode.UNSUPPORTED_BY_JUDGE,
            f"this service's judge is {self.name}, {does}: {advice}, or ask a service started with --judge {other}",
            param="mode" if compares else None,
        )


YES_NO: Final = Judge("yes-no", LabelReader(), {"pointwise": "pointwise", "pairwise": "pairwise"})
PAIRWISE: Final = Judge("pairwise", LabelReader(), {"pairwise": "pairwise"})
EXPECTED_GRADE: Final = Judge("self-reward", LabelReader(), {"pointwise": "graded"})
REWARD_MODEL: Final = Judge("reward-model", LogitReader(), {"pointwise": None})


def written_grade(sampling: Sampling, text_of: Callable[[Sequence[int]], str]) -> Judge:
    """The self-rewarding judge that answers in text."""
    return Judge("self-reward", TextReader(sampling, text_of), {"pointwise": "rubric"})


def judge_of(settings: ModelSettings, model: Model, text_of: Callable[[Sequence[int]], str]) -> Judge:
    """The judge that the settings ask for; `text_of` makes text of the model's tokens, for one that answers in text."""
    if settings.task == "generate":
        sampling = Sampling(settings.self_reward_samples, settings.self_reward_tokens)
        if model.tokenizer is not None:  # else the server ends its replies itself
            sampling = replace(
                sampling,
                stop_ids=stop_ids(model.tokenizer, model.folder),
                stop_texts=turn_end(model.tokenizer).texts,
            )
        return written_grade(sampling, text_of)
    by_name = {judge.name: judge for judge in (YES_NO, PAIRWISE, EXPECTED_GRADE, REWARD_MODEL)}
    return by_name[settings.judge]

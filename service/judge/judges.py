"""The judges: what each asks an engine for, and how it reads the answers. A service runs one of them (`--judge`).

yes-no        P(Yes) against P(No) of a question about one response, or about two (A against B) on request
pairwise      the same about two responses, in both orders; it scores none by itself
self-reward   a grade from 0 to 5: the expected one over the digits' probabilities, or read from a written text
reward-model  the logit of a classification head that reads the conversation
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, TypeVar

from client.chat import own_turn, turn_end
from client.errors import ErrorCode
from client.schema import CompareMode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    Classified,
    ClassifyItem,
    Generated,
    GeneratedText,
    GenerateItem,
    LabelLogprobs,
    ScoreItem,
    Task,
    TextGenerateItem,
    TextScoreItem,
)
from service.errors import ServiceError
from service.judge.grades import parse_grade
from service.judge.scoring import Judgement, graded_judgement, logit_judgement, parsed_judgement, weighted_judgement
from service.prompts.templates import Mode
from service.prompts.text_builder import Prompt, TextPrompt
from service.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from service.loading.engines import Model

REWARD_TEMPLATE: Final = "reward-model@1"
"""What results of the reward model, which has no templates, call the way in which it is asked."""
SAMPLE_TEMPERATURE: Final = 0.7
"""Of several texts for one judgement; a single one takes the likeliest token each time."""

_Kind = TypeVar("_Kind", LabelLogprobs, Classified)

# Which templates a request's mode needs; None for a judge that reads the conversation itself.
Modes: TypeAlias = Mapping[CompareMode, Mode | None]


class Reader(Protocol):
    """From a prompt to what an engine is asked, and from its answers to a judgement."""

    @property
    def task(self) -> Task:
        """What the engine must be able to do."""

    @property
    def samples(self) -> int:
        """How many items it asks for, for each prompt."""

    @property
    def settings(self) -> str:
        """All that decides its judgements besides the model and the prompt."""

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """What to ask for: `samples` items."""

    def judgement(self, prompt: Prompt, answers: Sequence[AnyAnswer]) -> Judgement:
        """From the answers to these items. Raises ServiceError(UNPARSEABLE)."""


class LabelReader:
    """Reads the probabilities of labels that have a weight each."""

    task: Final = "labels"
    samples: Final = 1
    settings: Final[str] = "labels"

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """One item."""
        if isinstance(prompt, TextPrompt):
            return (TextScoreItem(prompt.text, prompt.labels),)
        return (ScoreItem(prompt.token_ids, prompt.label_ids, prompt.boundaries),)

    def judgement(self, prompt: Prompt, answers: Sequence[AnyAnswer]) -> Judgement:
        """The scoring rule."""
        return weighted_judgement(_only(answers, LabelLogprobs), prompt.label_ids, prompt.weights)


class GradeReader(LabelReader):
    """Reads the probabilities of the six grades: the mode of its templates tells it from a LabelReader."""

    def judgement(self, prompt: Prompt, answers: Sequence[AnyAnswer]) -> Judgement:
        """The scoring rule, and the expected grade."""
        return graded_judgement(_only(answers, LabelLogprobs), prompt.label_ids)


class LogitReader:
    """Reads the logit of a classification head."""

    task: Final = "classify"
    samples: Final = 1
    settings: Final = "logit"

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """One item. Raises TypeError for a prompt that no classification head can read."""
        if isinstance(prompt, TextPrompt):
            raise TypeError("a classification head reads tokens, not text")
        return (ClassifyItem(prompt.token_ids, prompt.boundaries),)

    def judgement(self, prompt: Prompt, answers: Sequence[AnyAnswer]) -> Judgement:  # noqa: ARG002 see Reader
        """The logit as log-odds."""
        return logit_judgement(_only(answers, Classified).logit)


@dataclass(frozen=True, slots=True)
class Writing:
    """How a judge that answers in text writes: `samples` texts, each ended by one of `stop_ids` or by its length.

    What stands behind one of `stop_texts` is not the judge's any more: it writes the next turn itself.
    """

    samples: int
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Of the draws."""
        return SAMPLE_TEMPERATURE if self.samples > 1 else 0.0


class TextReader:
    """Has texts written that end in a grade; several differ by their seed, and their mean counts.

    The seeds are 0, 1, …: asking again gives the same grades, and responses are graded with the same draws.
    """

    task: Final = "generate"

    def __init__(self, writing: Writing, text_of: Callable[[Sequence[int]], str]) -> None:
        """`text_of` makes text of token ids."""
        self.samples = writing.samples
        self.settings = f"{writing}, temperature {writing.temperature}"
        self._writing = writing
        self._text_of = text_of

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """One item for each sample."""
        how = self._writing
        if isinstance(prompt, TextPrompt):
            return [
                TextGenerateItem(prompt.text, how.max_new_tokens, how.temperature, seed) for seed in range(how.samples)
            ]
        return [
            GenerateItem(prompt.token_ids, how.max_new_tokens, how.stop_ids, how.temperature, seed, prompt.boundaries)
            for seed in range(how.samples)
        ]

    def judgement(self, prompt: Prompt, answers: Sequence[AnyAnswer]) -> Judgement:  # noqa: ARG002 see Reader
        """The mean of the grades that can be read; raises ServiceError(UNPARSEABLE) where there are none."""
        written = [answer for answer in answers if isinstance(answer, Generated | GeneratedText)]
        stops = self._writing.stop_texts
        texts = [own_turn(self._text(answer), answer.ended, stops) for answer in written]
        verdict = parsed_judgement([parse_grade(text, ended) for text, ended in texts])
        if verdict is None:
            cut = sum(not ended for _, ended in texts)
            raise ServiceError(
                ErrorCode.UNPARSEABLE,
                f"the judge stated no grade that can be read in {len(texts)} attempts, of which {cut} were cut off at "
                f"{self._writing.max_new_tokens} tokens",
            )
        return verdict

    def _text(self, answer: Generated | GeneratedText) -> str:
        return answer.text if isinstance(answer, GeneratedText) else self._text_of(answer.token_ids)


@dataclass(frozen=True, slots=True)
class Judge:
    """A judge as requests meet it. `modes` has what it can do; its own way, for requests that ask for none, first."""

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
        """The error for a request whose mode it has not got, a comparison or not."""
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
EXPECTED_GRADE: Final = Judge("self-reward", GradeReader(), {"pointwise": "graded"})
REWARD_MODEL: Final = Judge("reward-model", LogitReader(), {"pointwise": None})


def written_grade(writing: Writing, text_of: Callable[[Sequence[int]], str]) -> Judge:
    """The self-rewarding judge that writes."""
    return Judge("self-reward", TextReader(writing, text_of), {"pointwise": "rubric"})


def judge_of(settings: ModelSettings, model: Model, text_of: Callable[[Sequence[int]], str]) -> Judge:
    """The judge that the settings ask for; `text_of` makes text of the model's tokens, for one that writes."""
    if settings.task == "generate":
        writing = Writing(settings.self_reward_samples, settings.self_reward_tokens)
        if model.tokenizer is not None:  # else the server ends its replies itself
            stop_ids, stop_texts = stop_ids_of(model.tokenizer, model.folder), turn_end(model.tokenizer).texts
            writing = replace(writing, stop_ids=stop_ids, stop_texts=stop_texts)
        return written_grade(writing, text_of)
    by_name = {judge.name: judge for judge in (YES_NO, PAIRWISE, EXPECTED_GRADE, REWARD_MODEL)}
    return by_name[settings.judge]


def stop_ids_of(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> tuple[int, ...]:
    """What ends a text: the tokenizer's end of sequence, the chat template's end of a turn, and what the model's
    generation configuration names.
    """
    found = set(turn_end(tokenizer).ids)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    for name in ("generation_config.json", "config.json"):
        file = folder / name if folder else None
        stated = json.loads(file.read_text("utf-8")).get("eos_token_id") if file and file.is_file() else None
        if stated is not None:
            found.update(stated if isinstance(stated, list) else [stated])
            break
    return tuple(sorted(found))


def _only(answers: Sequence[AnyAnswer], kind: type[_Kind]) -> _Kind:
    (answer,) = answers
    if not isinstance(answer, kind):
        raise TypeError(f"{type(answer).__name__} in place of {kind.__name__}")
    return answer

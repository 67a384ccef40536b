"""How a judge asks and reads: from a prompt to what an engine is asked, and from its answers to a judgement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from client.chat import own_turn
from client.errors import ErrorCode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    Classified,
    ClassifyItem,
    Generated,
    GeneratedText,
    GenerateItem,
    LabelLogprobs,
    Task,
    TextGenerateItem,
)
from service.errors import ServiceError
from service.judge.grades import parse_grade
from service.judge.scoring import Judgement, label_judgement, logit_judgement, parsed_judgement
from service.prompts.text_builder import Prompt, TextPrompt
from service.questions import Question

SAMPLE_TEMPERATURE: Final = 0.7
"""When several texts are sampled for one judgement; a single one takes the likeliest token each time."""

_Kind = TypeVar("_Kind", LabelLogprobs, Classified)


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

    @property
    def new_tokens(self) -> int:
        """How many tokens each item may generate."""

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """What to ask for: `samples` items."""

    def judgement(self, question: Question | None, prompt: Prompt, answers: Sequence[AnyAnswer], /) -> Judgement:
        """From the answers to these items.

        Raises ServiceError(UNPARSEABLE), and TypeError, ValueError or OverflowError for answers that do not fit them.
        """


class LabelReader:
    """Reads the probabilities of a question's labels."""

    task: Final = "labels"
    samples: Final = 1
    new_tokens: Final = 0
    settings: Final[str] = "labels"

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """The prompt itself."""
        return (prompt,)

    def judgement(self, question: Question | None, prompt: Prompt, answers: Sequence[AnyAnswer], /) -> Judgement:
        """The scoring rule."""
        if question is None:
            raise TypeError("a template without labels asks for a text")
        return label_judgement(question, _only(answers, LabelLogprobs), prompt.label_ids, prompt.spellings)


class LogitReader:
    """Reads the logit of a classification head."""

    task: Final = "classify"
    samples: Final = 1
    new_tokens: Final = 0
    settings: Final = "logit"

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """One item. Raises TypeError for a prompt that no classification head can read."""
        if isinstance(prompt, TextPrompt):
            raise TypeError("a classification head reads tokens, not text")
        return (ClassifyItem(prompt.token_ids, prompt.boundaries),)

    def judgement(self, _question: Question | None, _prompt: Prompt, answers: Sequence[AnyAnswer], /) -> Judgement:
        """The logit as log-odds."""
        return logit_judgement(_only(answers, Classified).logit)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a judge answers in text: `samples` texts, each ended by one of `stop_ids` or by its length.

    Whatever follows one of `stop_texts` is not the judge's own turn: it has started to write the next one.
    """

    samples: int
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Of the draws."""
        return SAMPLE_TEMPERATURE if self.samples > 1 else 0.0

    @property
    def settings(self) -> str:
        """What decides the texts. It is part of `asked_with`, which runs and calibrations keep: its form stays."""
        return (
            f"Writing(samples={self.samples}, max_new_tokens={self.max_new_tokens}, stop_ids={self.stop_ids}, "
            f"stop_texts={self.stop_texts}), temperature {self.temperature}"
        )


class TextReader:
    """Has texts generated that end in a grade; several differ by their seed, and their mean counts.

    The seeds are 0, 1, … for every prompt: asking again gives the same grades, and responses that are compared are
    graded with the same draws.
    """

    task: Final = "generate"

    def __init__(self, sampling: Sampling, text_of: Callable[[Sequence[int]], str]) -> None:
        """`text_of` makes text of token ids."""
        self.samples = sampling.samples
        self.new_tokens = sampling.max_new_tokens
        self.settings = sampling.settings
        self._sampling = sampling
        self._text_of = text_of

    def items(self, prompt: Prompt) -> Sequence[AnyItem]:
        """One item for each sample."""
        sampling = self._sampling
        length, temperature, seeds = sampling.max_new_tokens, sampling.temperature, range(sampling.samples)
        if isinstance(prompt, TextPrompt):
            return [TextGenerateItem(prompt.text, length, temperature, seed) for seed in seeds]
        return [
            GenerateItem(prompt.token_ids, length, sampling.stop_ids, temperature, seed, prompt.boundaries)
            for seed in seeds
        ]

    def judgement(self, _question: Question | None, _prompt: Prompt, answers: Sequence[AnyAnswer], /) -> Judgement:
        """The mean of the grades that can be read. Raises ServiceError(UNPARSEABLE) if none can."""
        generated = [answer for answer in answers if isinstance(answer, Generated | GeneratedText)]
        stops = self._sampling.stop_texts
        texts = [own_turn(self._text(answer), answer.ended, stops) for answer in generated]
        judged = parsed_judgement([parse_grade(text, ended) for text, ended in texts])
        if judged is None:
            cut = sum(not ended for _, ended in texts)
            raise ServiceError(
                ErrorCode.UNPARSEABLE,
                f"the judge stated no readable grade in {len(texts)} attempts, of which {cut} were cut off at "
                f"{self._sampling.max_new_tokens} tokens",
            )
        return judged

    def _text(self, answer: Generated | GeneratedText) -> str:
        return answer.text if isinstance(answer, GeneratedText) else self._text_of(answer.token_ids)


def _only(answers: Sequence[AnyAnswer], kind: type[_Kind]) -> _Kind:
    (answer,) = answers
    if not isinstance(answer, kind):
        raise TypeError(f"{type(answer).__name__} in place of {kind.__name__}")
    return answer

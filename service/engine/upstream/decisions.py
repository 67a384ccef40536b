"""The ways of asking that need no log-probabilities: the server is to choose one of the item's labels, and says how
probable each is.

    Decisions   POST /v1/decisions   OpenAI, vLLM from 0.33, LiteLLM, this service
    SystemOne   POST /v1/systemone   TypeSafe, vLLM from 0.32, SGLang, Ollama, this service

The question put to the server is a `choice` among the labels whatever they are, never a predicate: a predicate takes
the statement to be judged, but here the question is the prompt's own, in the template's words. So the prompt goes in as
the text that the question is about, and the question only points to it.

The probabilities are shares of the options in the label mass. A server may say what that is; if it does not, 1 is
assumed, and nothing is known of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, StrictBool, StrictStr

from client.errors import ErrorCode
from service.engine.contract import GeneratedText, TextGenerateItem, TextScoreItem
from service.engine.upstream.bodies import parse_body, unreadable
from service.engine.upstream.dialects import RequestOptions
from service.engine.upstream.errors import RefusalError, UpstreamError
from service.engine.upstream.logprobs import word_of
from service.engine.upstream.returned import ZERO_LOGPROB, Returned

INSTRUCTIONS: Final = "Answer the question that the input ends with."
"""The question's text. Judgements depend on it, so it is part of the fingerprint."""
QUESTION: Final = "answer"
"""The question's name."""

# As many as both protocols allow. Some servers take fewer, and say so.
_OPTIONS: Final = range(2, 256)
_LISTED: Final = "given a probability above 0 by the upstream server"
# Rounding may give a little more than certainty.
_Probability = Annotated[float, Field(strict=True, ge=0, le=1 + 1e-3, allow_inf_nan=False)]


class _Answer(BaseModel):
    type: str
    x_label_mass: _Probability | None = None


class _Share(BaseModel):
    value: StrictStr | StrictBool
    probability: _Probability


class _ListedChoice(_Answer):
    probabilities: list[_Share] = []


class _NamedChoice(_Answer):
    probabilities: dict[str, _Probability] = {}


class _Diagnostics(BaseModel):
    label_mass: _Probability | None = None
    argmax_is_label: bool | None = None


class _Details(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    input_tokens_details: _Details | None = None


class _Body(BaseModel):
    """What both protocols share; `diagnostics`, by question, is vLLM's."""

    diagnostics: dict[str, _Diagnostics] | None = None
    usage: _Usage | None = None

    @property
    def diagnosed(self) -> _Diagnostics:
        return (self.diagnostics or {}).get(QUESTION) or _Diagnostics()

    @property
    def cached_tokens(self) -> int:
        details = self.usage and self.usage.input_tokens_details
        return max(0, (details.cached_tokens if details else None) or 0)


class _DecisionsBody(_Body):
    answers: list[_ListedChoice] = Field(min_length=1, max_length=1)


class _SystemOneBody(_Body):
    answers: dict[str, _NamedChoice]


@dataclass(frozen=True, slots=True)
class _Distribution:
    """The options' probabilities, 0 included, as shares of `mass`. It is None if the server does not say."""

    shares: Mapping[str, float]
    mass: float | None
    argmax_is_label: bool | None

    @property
    def logprobs(self) -> dict[str, float]:
        """Of the options with a probability above 0."""
        if self.mass == 0:
            return {}
        shift = math.log(self.mass or 1.0) - math.log(math.fsum(self.shares.values()))
        return {option: math.log(share) + shift for option, share in self.shares.items() if share > 0}

    @property
    def likeliest(self) -> str | None:
        """The option that is the most likely reply of all; None if it is not, or if that is unknown."""
        best = max(self.shares, key=lambda option: self.shares[option])
        mass = 1.0 if self.mass is None else self.mass
        certain = self.shares[best] * mass >= 1 - mass
        return best if self.argmax_is_label or (self.argmax_is_label is None and certain) else None


class _ChoiceDialect:
    """What both ways of asking share."""

    score_kind = TextScoreItem
    generate_kind = TextGenerateItem

    def __init__(self, options: RequestOptions) -> None:
        self._options = options

    def parts(self, item: TextScoreItem) -> Sequence[TextScoreItem]:
        """See Dialect: shares are of all options, so they are asked for at once."""
        return [item]

    def generate_body(self, item: TextGenerateItem) -> dict[str, Any]:
        """Raises NotImplementedError: these protocols have no text in their answers."""
        raise NotImplementedError(f"no text of {item.max_new_tokens} tokens can be asked for as a decision")

    def generated(self, reply: GeneratedText) -> GeneratedText:
        """Unchanged."""
        return reply

    def adapt(self, refusal: RefusalError) -> bool:  # noqa: ARG002 there are no fields that a server may do without
        """Nothing to change."""
        return False


class Decisions(_ChoiceDialect):
    """Text over `/decisions`, OpenAI's protocol."""

    path = "/decisions"

    def score_body(self, item: TextScoreItem) -> dict[str, Any]:
        """Only fields that the protocol requires, and a name: vLLM refuses others. Raises UpstreamError(BAD_LABEL)."""
        choices = [{"value": option} for option in _options(item)]
        question = {"type": "choice", "name": QUESTION, "instructions": INSTRUCTIONS, "choices": choices}
        return {"model": self._options.model, "input": item.text, "questions": [question], **self._options.extra}

    def returned(self, contents: Sequence[bytes], item: TextScoreItem) -> Returned:
        """See Dialect."""
        (content,) = contents
        body = parse_body(_DecisionsBody, content, "OpenAI's Decisions API")
        (answer,) = body.answers
        return _returned(body, answer, [(share.value, share.probability) for share in answer.probabilities], item)


class SystemOne(_ChoiceDialect):
    """Text over `/systemone`, TypeSafe's protocol."""

    path = "/systemone"

    def score_body(self, item: TextScoreItem) -> dict[str, Any]:
        """The options are names without a description. Raises UpstreamError(BAD_LABEL)."""
        question = {"type": "choice", "instructions": INSTRUCTIONS, "criteria": dict.fromkeys(_options(item))}
        questions = {QUESTION: question}
        return {"model": self._options.model, "state": item.text, "questions": questions, **self._options.extra}

    def returned(self, contents: Sequence[bytes], item: TextScoreItem) -> Returned:
        """See Dialect."""
        (content,) = contents
        body = parse_body(_SystemOneBody, content, "System One")
        answer = body.answers.get(QUESTION)
        if answer is None:
            raise unreadable("lacks the question that was asked")
        return _returned(body, answer, answer.probabilities.items(), item)


def _options(item: TextScoreItem) -> list[str]:
    """The labels in their order, without the white space around them: a server shows each in a line of its own.

    Single characters are sorted, because servers mark options by letters or digits of their own: the answer "A" must
    not be the option that is marked "B".
    """
    options = list(dict.fromkeys(map(word_of, item.labels)))
    if all(len(option) == 1 for option in options):
        options.sort()
    if len(options) not in _OPTIONS:
        problem = f"a choice has {_OPTIONS[0]} to {_OPTIONS[-1]} options; this question has {len(options)} labels"
        raise UpstreamError(ErrorCode.BAD_LABEL, problem)
    return options


def _returned(
    body: _Body, answer: _Answer, shares: Iterable[tuple[str | bool, float]], item: TextScoreItem
) -> Returned:
    """The answer by labels. Of labels that differ in white space only, the first one has the option's probability."""
    distribution = _distribution(body, answer, list(shares), _options(item))
    logprobs, likeliest = distribution.logprobs, distribution.likeliest
    words = [word_of(label) for label in item.labels]
    by_label = [logprobs.get(word) if word not in words[:index] else ZERO_LOGPROB for index, word in enumerate(words)]
    argmax_id = len(words) if likeliest is None else words.index(likeliest)
    return Returned(by_label, argmax_id, body.cached_tokens, min(logprobs.values(), default=0.0), _LISTED)


def _distribution(
    body: _Body, answer: _Answer, shares: Sequence[tuple[str | bool, float]], options: Sequence[str]
) -> _Distribution:
    """The answer, checked. Raises UpstreamError for a refusal and for shares that are no distribution over options."""
    if answer.type == "refusal":
        # No server's fault, and the model would say so again.
        raise UpstreamError(ErrorCode.LABEL_NOT_RETURNED, "the upstream server's model declined to answer")
    if answer.type != "choice":
        raise unreadable("is not a choice, as was asked for")
    by_option = {option: share for option, share in shares if isinstance(option, str) and option in options}
    if len(by_option) != len(shares):
        raise unreadable("names an option twice, or one that was not given")
    total = math.fsum(by_option.values())
    if abs(total - 1) > _tolerance(len(options)):
        raise unreadable(f"holds probabilities that add up to {total:.3g} and not to 1")
    diagnosed = body.diagnosed
    mass = diagnosed.label_mass if answer.x_label_mass is None else answer.x_label_mass
    return _Distribution(by_option, None if mass is None else min(mass, 1.0), diagnosed.argmax_is_label)


def _tolerance(options: int) -> float:
    """How far the shares' sum may be from 1 if a server rounds each to two decimals."""
    return min(0.1, 0.01 + 0.005 * options)

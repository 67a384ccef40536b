"""Rewards for trainers that ask a reward model by URL: OpenRLHF, slime and miles, LLaMA-Factory.

Each sample is a score request. What cannot be judged is an error, never a number; what is judged as prompt and as
response is decided here, and nothing is cut off without being asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from client.errors import SETTLED
from client.schema import MAX_MESSAGES, ErrorResult, Message, Name, Result, ScoreRequest, ScoreResult, Text, Truncation
from client.texts import is_blank
from service.errors import ServiceError
from service.wires.bodies import WireRequest
from service.wires.chat_text import read_chat, without_empty_thought, without_end
from service.wires.names import invalid

UNPROCESSABLE: Final = 422


class RewardOptions(BaseModel):
    """How to judge, in the query of the URL: trainers let one set nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    value: Literal["log_odds", "score"] | None = None
    """Which number the reward is; absent: the log-odds, which do not saturate."""
    category: Name | None = None
    """As in POST /score."""
    template: Name | None = None
    """A template's name, as in POST /score; not together with `category`."""
    truncation: Truncation = "error"
    """As in POST /score."""

    @model_validator(mode="after")
    def _one_source_of_the_template(self) -> Self:
        if self.category is not None and self.template is not None:
            raise ValueError("give category or template, not both")
        return self

    def reward(self, result: ScoreResult) -> float:
        """The number that was asked for."""
        return result.score if self.value == "score" else result.log_odds


class GetRewardRequest(WireRequest):
    """OpenRLHF's samples: texts with control tokens, as its policy read and wrote them."""

    query: list[Text] = Field(min_length=1, fail_fast=True)
    """Each prompt with the response behind it."""
    prompts: list[Text] = Field(min_length=1, fail_fast=True)
    labels: Any = None
    """References; not used."""


class GetRewardResult(Result):
    """Rewards, in the order of the samples."""

    rewards: list[FiniteFloat]
    scores: list[FiniteFloat]
    """Probabilities from 0 to 1, which OpenRLHF's dynamic filtering compares with its range."""
    extra_logs: dict[str, list[FiniteFloat]]


class PolicyMessage(WireRequest):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class RemoteRewardRequest(WireRequest):
    """A sample of slime or miles."""

    prompt: Text | Annotated[list[PolicyMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    """The text that the policy read, or messages."""
    response: Text
    label: Any = None
    """A reference; not used."""


class RemoteRewardResult(Result):
    """One judgement. `--reward-key` picks the number, with `?value=` in the URL the answer is that number alone."""

    reward: FiniteFloat
    score: FiniteFloat
    log_odds: FiniteFloat
    label_mass: FiniteFloat
    truncated: bool
    template: str
    model: str
    fingerprint: str | None


class ScoreEvaluationRequest(WireRequest):
    """LLaMA-Factory's samples: whole conversations with control tokens, as its policy read and wrote them."""

    messages: list[Text] = Field(min_length=1, fail_fast=True)


class ScoreEvaluationResult(Result):
    """Rewards, in the order of the conversations."""

    id: str
    object: Literal["score.evaluation"] = "score.evaluation"
    model: str
    scores: list[FiniteFloat]


def reward_error(error: ServiceError) -> tuple[int, Mapping[str, Any]]:
    """An ErrorResult; 5xx is only for what passes, so what the judge would answer again is a 422."""
    status = UNPROCESSABLE if error.code in SETTLED else error.status
    return status, ErrorResult(error=error.body()).model_dump(mode="json")


def openrlhf_requests(body: GetRewardRequest, options: RewardOptions) -> list[ScoreRequest]:
    """A score request for each sample. Raises ServiceError(INVALID_REQUEST) that names the sample at fault."""
    if len(body.query) != len(body.prompts):
        raise invalid("prompts", f"{len(body.prompts)} prompts for {len(body.query)} queries")
    return [
        _split_at_prompt(query, prompt, index, options)
        for index, (query, prompt) in enumerate(zip(body.query, body.prompts, strict=True))
    ]


def remote_rm_request(body: RemoteRewardRequest, options: RewardOptions) -> ScoreRequest:
    """The score request of a sample. Raises ServiceError(INVALID_REQUEST)."""
    names = {"prompt": "prompt", "response": "response"}
    if isinstance(body.prompt, str):
        return _from_texts(body.prompt, body.response, names, options)
    messages = [Message(role=message.role, content=message.content) for message in body.prompt]
    return _request(messages, without_end(body.response), names, options)


def llama_factory_requests(body: ScoreEvaluationRequest, options: RewardOptions) -> list[ScoreRequest]:
    """A score request for each conversation. Raises ServiceError(INVALID_REQUEST) for one that cannot be split."""
    return [_split_conversation(text, f"messages[{index}]", options) for index, text in enumerate(body.messages)]


def openrlhf_result(results: Sequence[ScoreResult], options: RewardOptions) -> GetRewardResult:
    """The answer for OpenRLHF; its logs show what a reward is worth."""
    return GetRewardResult(
        rewards=[options.reward(result) for result in results],
        scores=[result.score for result in results],
        extra_logs={
            "judge_log_odds": [result.log_odds for result in results],
            "judge_label_mass": [result.label_mass for result in results],
            "judge_truncated": [float(result.truncated) for result in results],
        },
    )


def remote_rm_result(result: ScoreResult, options: RewardOptions) -> RemoteRewardResult:
    """The answer for slime and miles where the URL does not say which number they want."""
    return RemoteRewardResult(
        reward=options.reward(result),
        score=result.score,
        log_odds=result.log_odds,
        label_mass=result.label_mass,
        truncated=result.truncated,
        template=result.template,
        model=result.model,
        fingerprint=result.fingerprint,
    )


def llama_factory_result(results: Sequence[ScoreResult], options: RewardOptions) -> ScoreEvaluationResult:
    """The answer for LLaMA-Factory."""
    return ScoreEvaluationResult(
        id=f"scoreval-{uuid4().hex}",
        model=results[0].model,
        scores=[options.reward(result) for result in results],
    )


def _split_at_prompt(query: str, prompt: str, index: int, options: RewardOptions) -> ScoreRequest:
    if not query.startswith(prompt):
        raise invalid(
            f"query[{index}]",
            "does not begin with its prompt, so the response in it is not known; trainers cut prompts that are too "
            "long, and some tokenizers do not give a text back as it was",
        )
    names = {"prompt": f"prompts[{index}]", "response": f"query[{index}]"}
    return _from_texts(prompt, query.removeprefix(prompt), names, options)


def _split_conversation(text: str, field: str, options: RewardOptions) -> ScoreRequest:
    chat = read_chat(without_end(text))
    if chat is None:
        raise invalid(
            field,
            "is not a conversation in the chat format of ChatML, Llama 3, Gemma or Phi that ends in the assistant's "
            "answer, so prompt and response cannot be told apart",
        )
    return _request(
        chat.messages, without_empty_thought(chat.answer), dict.fromkeys(("prompt", "response"), field), options
    )


def _from_texts(prompt: str, response: str, names: Mapping[str, str], options: RewardOptions) -> ScoreRequest:
    """The request for a prompt as the policy read it, and what the policy wrote behind it."""
    answer, chat = without_end(response), read_chat(prompt)
    if chat is None:
        return _request(prompt, answer, names, options)
    return _request(chat.messages, without_empty_thought(chat.answer + answer), names, options)


def _request(
    prompt: str | Sequence[Message], response: str, names: Mapping[str, str], options: RewardOptions
) -> ScoreRequest:
    if is_blank(response):
        raise invalid(names["response"], "there is no response, or nothing but blanks and tokens that end one")
    try:
        return ScoreRequest.model_validate(
            {
                "prompt": prompt,
                "response": response,
                "category": options.category,
                "template": options.template,
                "truncation": options.truncation,
            }
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        ours = str(first["loc"][0]) if first["loc"] else "prompt"
        raise invalid(names.get(ours, ours), first["msg"]) from None

"""The bodies that the service reads."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MIN_RESPONSES: Final = 2
MAX_RESPONSES: Final = 16
MAX_MESSAGES: Final = 256
MAX_LABELS: Final = 8
MAX_FIELDS: Final = 32
MIN_MEMBERS: Final = 2
MAX_MEMBERS: Final = 16

Text: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Truncation: TypeAlias = Literal["error", "prompt_left", "response_middle"]
Format: TypeAlias = Literal["chat", "raw"]
CompareMode: TypeAlias = Literal["pointwise", "pairwise"]


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("the templates of a panel must be distinct")
    return names


TemplateNames: TypeAlias = Annotated[
    list[Name], Field(min_length=MIN_MEMBERS, max_length=MAX_MEMBERS), AfterValidator(_distinct)
]
"""A panel: every one of these templates is asked, and their log-odds are averaged."""


class Request(BaseModel):
    """A body that the service reads; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, data: Any) -> Any:
        """Each unknown field would be an error of its own, and a body has room for a million of them."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, of which at most {len(cls.model_fields)} are known")
        return data


class Message(Request):
    """One turn of the conversation that the response answers."""

    role: Literal["system", "user", "assistant"]
    """Who says it."""
    content: Text
    """What is said."""


class Labels(Request):
    """The texts whose next-token probabilities are compared; the spellings of one side are summed.

    Each must be exactly one token after the rendered prompt, otherwise the request is refused (`bad_label`).
    """

    yes: list[Text] = Field(min_length=1, max_length=MAX_LABELS)
    """Spellings of the answer that counts for the response."""
    no: list[Text] = Field(min_length=1, max_length=MAX_LABELS)
    """Spellings of the answer that counts against it."""


class InlineTemplate(Request):
    """A judge's prompt sent with the request; its three placeholders are substituted, nothing else is interpreted.

    InlineTemplate(layout="{instruction}\\n\\n{prompt}\\n\\n{response}", instruction="Is this polite? Yes or No.")
    """

    format: Format = "chat"
    """`chat` puts the text into a user's turn of the model's chat template, `raw` shows it as it is."""
    layout: Text = Field(
        description="Text with {prompt} and {response} once each, and {instruction} at most once.",
        examples=["{instruction}\n\nQuestion: {prompt}\n\nAnswer: {response}"],
    )
    instruction: str = ""
    """What {instruction} stands for."""
    labels: Labels = Labels(yes=["Yes"], no=["No"])
    """The answers that count as yes and no."""


class JudgeRequest(Request):
    """What all judging requests have in common: the question, and how to judge."""

    prompt: Text | Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    """The question as plain text, or a conversation whose last message is the user's."""
    category: Name | None = None
    """The kind of question, which selects a built-in template; see GET /templates."""
    template: Name | TemplateNames | InlineTemplate | None = None
    """A template's name (`general` or `general@1`), a list of 2 to 16 names, or a template of your own. With a list
    each template is asked, and their log-odds are averaged: n judgements in place of one. Not together with
    `category`."""
    truncation: Truncation = "error"
    """What to do with a text that is too long for the model: refuse it, cut the prompt from its left, or cut the middle
    of the response. The judge's question itself is never cut."""

    @model_validator(mode="after")
    def _one_source_of_the_template(self) -> Self:
        if self.category is not None and self.template is not None:
            raise ValueError("give category or template, not both")
        return self

    @model_validator(mode="after")
    def _the_user_speaks_last(self) -> Self:
        if not isinstance(self.prompt, str) and self.prompt[-1].role != "user":
            raise ValueError("the last message of prompt must have the role user")
        return self


class ScoreRequest(JudgeRequest):
    """Is this response a good answer to this prompt?"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "What is 2+2?", "response": "4", "category": "math"}]}
    )

    response: Text
    """The answer to judge."""


class CompareRequest(JudgeRequest):
    """Which of these responses is the best answer to this prompt?"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "What is the capital of France?", "responses": ["Paris.", "Lyon.", "Berlin."]}]
        }
    )

    responses: list[Text] = Field(
        min_length=MIN_RESPONSES, max_length=MAX_RESPONSES, description="The answers to rank."
    )
    mode: CompareMode | None = None
    """pointwise: each response is judged by itself. pairwise: every two responses are shown side by side, in both
    orders, and the log-odds of both orders are averaged. Absent or null: whichever the judge is made for, which is
    pairwise for the judge `pairwise` and pointwise for all others; see GET /v1/models."""
    tie_margin: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    """The two best responses tie if their log-odds differ by no more than this."""


class ScoreBatchRequest(Request):
    """Many independent score requests; an item that is refused does not fail the others."""

    items: list[ScoreRequest] = Field(min_length=1)
    """Each is judged by itself, and fails by itself."""


class CompareBatchRequest(Request):
    """Many independent compare requests; an item that is refused does not fail the others."""

    items: list[CompareRequest] = Field(min_length=1)
    """Each is judged by itself, and fails by itself."""

"""From labels to what is trained on: the very prompts of the service, token for token.

The service's own code picks the template, renders, tokenizes and finds the labels' ids; nothing of it is repeated here.
A label becomes an Example: one prompt for each answer, or, pairwise, both answers in one prompt, in both orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from client.errors import ErrorCode
from client.schema import Format
from service.errors import ServiceError
from service.judge.judges import YES_NO
from service.judge.provenance import Provenance, settings_digest
from service.judge.template_files import load_library
from service.judge.templates import GENERAL, Template, TemplateLibrary
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import JudgePrompt, PromptBuilder
from service.questions import PromptSpec
from trainer.errors import InputError, ModelError
from trainer.policy.models import context_length
from trainer.tuning.judge.labels import Label

Asking: TypeAlias = Literal["pointwise", "pairwise"]

# For models that state no limit; the service's number.
_UNLIMITED: Final = 8192


@dataclass(frozen=True, slots=True)
class Example:
    """A label as prompts. The label's margin is `sum(sign * log-odds)` over the prompts.

    `targets[i]` is the probability that prompt i is answered with Yes. Without `signs` the label is about one answer,
    and has no margin. `lengths` are the answers' in characters. `held_at` is the margin that the base gives a pair
    that nobody labelled (replay.py).
    """

    label: Label
    prompts: tuple[JudgePrompt, ...]
    targets: tuple[float, ...]
    signs: tuple[float, ...]
    template: Template
    lengths: tuple[int, ...]
    held_at: float | None = None

    @property
    def tokens(self) -> int:
        """The length of all its prompts."""
        return sum(prompt.tokens for prompt in self.prompts)


class JudgePrompts:
    """Builds examples for one model and one way of asking."""

    def __init__(
        self, folder: Path, asking: Asking, template: str | None, files: Sequence[Path], max_length: int
    ) -> None:
        """`template` is asked of all labels; None: the label's own, or that of its category. `files` have templates.

        Raises ModelError for a model without a fast tokenizer, InputError for templates that cannot be read.
        """
        try:
            tokenizer = load_tokenizer(folder)
            longest = min(max_length, context_length(folder) or _UNLIMITED)
            self._builder = PromptBuilder(tokenizer, longest)
        except ServiceError as error:
            raise ModelError(error.message) from error
        self._asking: Asking = asking
        self.used: dict[str, Template] = {}
        """The templates of the examples built so far, by id."""
        try:
            format_: Format = "chat" if self._builder.has_chat_template else "raw"
            self._library = load_library(format_, files)
            self._fixed = None if template is None else self._usable(self._library.get(template))
        except ServiceError as error:
            raise InputError(error.message) from error

    def examples(self, labels: Sequence[Label]) -> tuple[list[Example], Counter[str]]:
        """The labels as examples, in order, and how many could not be, by the reason.

        Raises InputError for a template that does not work with this model: then no label would.
        """
        examples: list[Example] = []
        left_out: Counter[str] = Counter()
        templates = [self._template(label) for label in labels]
        specs = [spec for label, template in zip(labels, templates, strict=True) for spec in _specs(label, template)]
        built = self._builder.build_each(specs)
        for label, template in zip(labels, templates, strict=True):
            prompts = [next(built) for _ in _specs(label, template)]
            error = next((prompt for prompt in prompts if isinstance(prompt, ServiceError)), None)
            if error is None:
                examples.append(_example(label, template, [p for p in prompts if isinstance(p, JudgePrompt)]))
            else:
                left_out[error.code] += 1
        return examples, left_out

    def asked_with(self) -> dict[str, str]:
        """By template, what the service's results say of how they were asked (`asked_with`)."""
        provenance = Provenance("", "", settings=settings_digest(YES_NO, None))
        return {name: provenance.asked_with(template) for name, template in self.used.items()}

    def _template(self, label: Label) -> Template:
        template = self._fixed or self._usable(self._chosen(label))
        if template.mode != self._asking:
            raise InputError(f"template {template.id} is {template.mode}: give one that is {self._asking}")
        if template.mode == "pairwise" and not label.is_pair:
            raise InputError(f"label {label.id} is about one answer, and pairwise templates compare two")
        return template

    def _chosen(self, label: Label) -> Template:
        """The template that the label names, or that of its category. Raises InputError."""
        try:
            if label.template is not None:
                return self._library.get(label.template)
            return _of_category(self._library, label, self._asking)
        except ServiceError as error:
            if error.code == ErrorCode.TEMPLATE_NOT_FOUND:
                raise InputError(f"label {label.id}: there is no template {label.template}") from error
            raise InputError(f"label {label.id}: {error.message}: give --template, or the labels a template") from error

    def _usable(self, template: Template) -> Template:
        """The template, once it has been tried. Raises InputError."""
        if template.id not in self.used:
            try:
                self._builder.check(template)
            except ServiceError as error:
                raise InputError(f"template {template.id} cannot be used with this model: {error.message}") from error
            self.used[template.id] = template
        return template


def _of_category(library: TemplateLibrary, label: Label, asking: Asking) -> Template:
    """The template that the service uses for this category, or its default for one that it does not have.

    Raises ServiceError if that is a panel of several templates.
    """
    try:
        return library.for_category(label.category or GENERAL, asking)
    except ServiceError as error:
        if error.code != ErrorCode.TEMPLATE_NOT_FOUND:
            raise
        return library.default(asking)


def _specs(label: Label, template: Template) -> Iterator[PromptSpec]:
    if template.mode == "pairwise":
        first, second = label.answers
        yield PromptSpec(template, label.prompt, [first, second])
        yield PromptSpec(template, label.prompt, [second, first])
    else:
        for answer in label.answers:
            yield PromptSpec(template, label.prompt, [answer])


def _example(label: Label, template: Template, prompts: Sequence[JudgePrompt]) -> Example:
    # Pairwise margins are the mean over both orders, as in the service's comparisons.
    size = 0.5 if template.mode == "pairwise" else 1.0
    return Example(
        label=label,
        prompts=tuple(prompts),
        targets=(label.target, 1 - label.target)[: len(prompts)],
        signs=(size, -size) if label.is_pair else (),
        template=template,
        lengths=tuple(map(len, label.answers)),
    )

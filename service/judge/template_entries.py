"""What files of templates hold; template_files.py reads them.

A file (TOML or JSON) holds a list `templates`, a list `panels`, or both. Each template has

    name         "law"; with a version it is asked for as "law@1", without one the newest version is meant
    version      1, 2, …
    mode         "pointwise" (default) or "pairwise"; for self-rewarding judges "graded", answered by a digit from 0 to
                 5, or "rubric", answered by a text that ends in "Score: n"; for typed decisions "choice" or "scale",
                 whose options come with the request
    category     optional: requests for this category get the newest version of this template
    instruction  what to judge by
    question     what is asked after the answer, in the frame "instruction-first" of a pointwise template; default: the
                 frame's
    format       "chat" or "raw"; default: chat where the model has a chat template
    frame        "instruction-first" (default) or, pointwise, "question-last": the built-in layout and labels to use;
                 "input-first" for typed decisions: pointwise for yes or no, choice and scale; "query-document" for
                 reranking, pointwise
    layout       one's own in its place; needs `format` too
    labels       {yes = [...], no = [...]}; default: those of the frame
    grades       graded: the labels of the grades from 0 to 5; default: those of the frame

and each panel, several templates that are all asked for one verdict,

    name, version, category   as a template's, and no template has the same name and version
    members      2 to 16 distinct templates, pointwise or pairwise ones, each with its version: "law@1"; of any file
    weights      a positive number for each, of its log-odds in the panel's mean; default: equal ones

The prompts of Implicit Preference Optimization load from their authors' JSON as it is, in the raw format:
`paper/<group>/<name>@1` for the groups rewardbench, rmbench and self_improve, and `paper/candidates/<name>/<index>@1`
(counted from 0, in the layout of rewardbench; `paper/candidates/<name>@1` where there is one text only). Its
`max_length` is not used: what is too long is the request's to decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

from client.schema import Format, Labels, Name, TemplateNames, Text
from service.judge.templates import DEFAULT_MODES, INLINE, Mode
from service.questions import TOP_GRADE

TemplateName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=120)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Frame = Literal["instruction-first", "question-last", "input-first", "query-document"]
_MODES_OF: Final[dict[Frame, tuple[Mode, ...]]] = {
    "instruction-first": ("pointwise", "pairwise", "graded", "rubric"),
    "question-last": ("pointwise",),
    "input-first": ("pointwise", "choice", "scale"),
    "query-document": ("pointwise",),
}
Grades = Annotated[list[Text], Field(min_length=TOP_GRADE + 1, max_length=TOP_GRADE + 1)]


class FrameLayout(_Part):
    """A built-in layout, the question that is asked in it where a template asks none, and its labels or grades."""

    layout: Text
    question: Text | None = None
    labels: Labels | None = None
    grades: Grades | None = None

    def asking(self, question: str | None) -> str:
        """The layout with a question in its place; other layouts as they are."""
        question = question or self.question
        return self.layout if question is None else self.layout.replace("{question}", question)


class TemplateEntry(_Part):
    """One template of a file, as the module's docstring describes it."""

    name: TemplateName
    version: int = Field(ge=1, strict=True)
    mode: Mode = "pointwise"
    category: Name | None = None
    instruction: str = ""
    question: Text | None = None
    format: Format | None = None
    frame: Frame = "instruction-first"
    layout: Text | None = None
    labels: Labels | None = None
    grades: Grades | None = None

    @model_validator(mode="after")
    def _names_and_formats(self) -> Self:
        if self.mode not in _MODES_OF[self.frame]:  # with a layout of its own, too: labels come from the frame
            raise ValueError(f"frame {self.frame} is for {', '.join(_MODES_OF[self.frame])} templates")
        own_place = self.layout is None and self.frame == "instruction-first" and self.mode == "pointwise"
        if self.question is not None and not own_place:
            raise ValueError("question is for pointwise templates in the frame instruction-first")
        if self.labels is not None and self.mode not in DEFAULT_MODES:
            raise ValueError(f"a {self.mode} template has no yes and no labels")
        if self.grades is not None and self.mode != "graded":
            raise ValueError("grades are for graded templates")
        if self.name == INLINE:
            raise ValueError(f"the name {INLINE} means templates sent with a request")
        if self.layout is not None and self.format is None:
            raise ValueError("give format together with layout: raw and chat layouts end in different places")
        return self


# Far from where sums of weights overflow or lose digits.
_Weight = Annotated[FiniteFloat, Field(ge=1e-6, le=1e6)]


class PanelEntry(_Part):
    """One panel of a file, as the module's docstring describes it."""

    name: TemplateName
    version: int = Field(ge=1, strict=True)
    category: Name | None = None
    members: TemplateNames
    weights: list[_Weight] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.name == INLINE:
            raise ValueError(f"the name {INLINE} means templates sent with a request")
        if self.weights is not None and len(self.weights) != len(self.members):
            raise ValueError(f"{len(self.weights)} weights for {len(self.members)} members")
        return self


class TemplateFile(_Part):
    templates: list[TemplateEntry] = []
    panels: list[PanelEntry] = []

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.templates and not self.panels:
            raise ValueError("holds neither templates nor panels")
        return self


class _PaperLabels(_Part):
    yes: Text
    no: Text


class _PaperGroup(_Part):
    layout: Text
    fallback: str | None = None
    instructions: dict[str, Text]


class PaperFile(_Part):
    """The prompts that the authors of Implicit Preference Optimization published."""

    source: str = ""
    labels: _PaperLabels
    max_length: int | None = None
    rewardbench: _PaperGroup
    rmbench: _PaperGroup | None = None
    self_improve: _PaperGroup | None = None
    candidates: dict[str, Text | list[Text]] = {}

    def file(self) -> TemplateFile:
        """The same as templates of the raw format."""
        return TemplateFile(templates=list(self._entries()))

    def _entries(self) -> Iterator[TemplateEntry]:
        for group in ("rewardbench", "rmbench", "self_improve"):
            prompts: _PaperGroup | None = getattr(self, group)
            for name, instruction in prompts.instructions.items() if prompts else ():
                yield self._entry(f"paper/{group}/{name}", prompts, instruction)
        for name, texts in self.candidates.items():
            if isinstance(texts, str):
                yield self._entry(f"paper/candidates/{name}", self.rewardbench, texts)
                continue
            for index, text in enumerate(texts):
                yield self._entry(f"paper/candidates/{name}/{index}", self.rewardbench, text)

    def _entry(self, name: str, group: _PaperGroup | None, instruction: str) -> TemplateEntry:
        layout = group.layout if group else None
        labels = Labels(yes=[self.labels.yes], no=[self.labels.no])
        return TemplateEntry(name=name, version=1, format="raw", layout=layout, instruction=instruction, labels=labels)

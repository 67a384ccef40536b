"""Files of templates: the built-in ones (builtin/*.toml) and those of users.

A file (TOML or JSON) holds a list `templates`, each with

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

The prompts of Implicit Preference Optimization load from their authors' JSON as it is, in the raw format:
`paper/<group>/<name>@1` for the groups rewardbench, rmbench and self_improve, and `paper/candidates/<name>/<index>@1`
(counted from 0, in the layout of rewardbench; `paper/candidates/<name>@1` where there is one text only). Its
`max_length` is not used: what is too long is the request's to decide.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from client.errors import ErrorCode
from client.schema import Format, Labels, Name, Text
from service.errors import ServiceError
from service.judge.templates import DEFAULT_MODES, INLINE, SLOTS, Mode, Template, TemplateLibrary, question_of
from service.questions import TOP_GRADE


def load_library(
    default_format: Format, files: Sequence[Path] = (), modes: Collection[Mode] = DEFAULT_MODES
) -> TemplateLibrary:
    """The built-in templates in the format that suits the model, and those of the user's files.

    Raises ServiceError(BAD_TEMPLATE) that names the file and the template at fault.
    """
    sources: dict[str, str] = {}
    templates: list[Template] = []
    categories: dict[tuple[str, Mode], str] = {}
    for source, template, category in _all_sources(default_format, files):
        if template.id in sources:
            raise _bad_file(source, template.id, f"is already defined in {sources[template.id]}")
        sources[template.id] = source
        templates.append(template)
        if category and categories.setdefault((category, template.mode), template.name) != template.name:
            taken = categories[category, template.mode]
            raise _bad_file(source, template.id, f"claims category {category}, which belongs to {taken}")
    return TemplateLibrary(templates, categories, modes)


_TemplateName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=120)]


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


class _Layout(_Part):
    """A built-in layout, the question that is asked in it where a template asks none, and its labels or grades."""

    layout: Text
    question: Text | None = None
    labels: Labels | None = None
    grades: Grades | None = None

    def asking(self, question: str | None) -> str:
        """The layout with a question in its place; other layouts as they are."""
        question = question or self.question
        return self.layout if question is None else self.layout.replace("{question}", question)


_FRAMES: Final = TypeAdapter(dict[Frame, dict[Mode, dict[Format, _Layout]]])


class _Entry(_Part):
    """One template of a file, as the module's docstring describes it."""

    name: _TemplateName
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


class _File(_Part):
    templates: list[_Entry] = Field(min_length=1)


class _PaperLabels(_Part):
    yes: Text
    no: Text


class _PaperGroup(_Part):
    layout: Text
    fallback: str | None = None
    instructions: dict[str, Text]


class _PaperFile(_Part):
    """The prompts that the authors of Implicit Preference Optimization published."""

    source: str = ""
    labels: _PaperLabels
    max_length: int | None = None
    rewardbench: _PaperGroup
    rmbench: _PaperGroup | None = None
    self_improve: _PaperGroup | None = None
    candidates: dict[str, Text | list[Text]] = {}

    def entries(self) -> Iterator[_Entry]:
        """The same as templates of the raw format."""
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

    def _entry(self, name: str, group: _PaperGroup | None, instruction: str) -> _Entry:
        layout = group.layout if group else None
        labels = Labels(yes=[self.labels.yes], no=[self.labels.no])
        return _Entry(name=name, version=1, format="raw", layout=layout, instruction=instruction, labels=labels)


@cache
def _frames() -> dict[Frame, dict[Mode, dict[Format, _Layout]]]:
    text = package_files("service.judge").joinpath("builtin", "layouts.toml").read_text(encoding="utf-8")
    return _FRAMES.validate_python(tomllib.loads(text))


def _all_sources(default_format: Format, files: Sequence[Path]) -> Iterator[tuple[str, Template, str | None]]:
    """Each template with where it stands and its category, the built-in ones first."""
    folder = package_files("service.judge").joinpath("builtin")
    shipped = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    for file in shipped:
        if file.name != "layouts.toml":
            yield from _read(f"built-in {file.name}", tomllib.loads(file.read_text(encoding="utf-8")), default_format)
    for path in files:
        yield from _read(str(path), _parse(path), default_format)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ServiceError(ErrorCode.BAD_TEMPLATE, f"{path}: cannot be read as TOML or JSON: {error}") from error


def _read(source: str, data: Any, default_format: Format) -> Iterator[tuple[str, Template, str | None]]:
    paper = isinstance(data, dict) and "templates" not in data and "rewardbench" in data
    try:
        entries = list(_PaperFile.model_validate(data).entries()) if paper else _File.model_validate(data).templates
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise _bad_file(source, _name_at(data, first["loc"]), f"{where}: {first['msg']}") from error
    for entry in entries:
        template = _template(entry, default_format)
        if template.problem:
            raise _bad_file(source, template.id, template.problem)
        yield source, template, entry.category


def _template(entry: _Entry, default_format: Format) -> Template:
    form = entry.format or default_format
    built_in = _frames()[entry.frame][entry.mode][form]
    labels = entry.labels or built_in.labels
    grades = (entry.grades or built_in.grades or ()) if entry.mode == "graded" else ()
    return Template(
        name=entry.name,
        version=entry.version,
        mode=entry.mode,
        format=form,
        text=entry.layout or built_in.asking(entry.question),
        slots=SLOTS[entry.mode],
        instruction=entry.instruction,
        question=question_of(entry.mode, labels.yes if labels else (), labels.no if labels else (), grades),
    )


def _name_at(data: Any, location: Sequence[int | str]) -> str:
    """The name of the template that a validation error is about, as far as the file says it."""
    if len(location) > 1 and location[0] == "templates" and isinstance(location[1], int):
        entry = data["templates"][location[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        return f"number {location[1]}" if name is None else f"{name}"
    return "list"


def _bad_file(source: str, template: str, problem: str) -> ServiceError:
    return ServiceError(ErrorCode.BAD_TEMPLATE, f"{source}: template {template}: {problem}")

"""Judge's prompts: the built-in ones (templates/*.toml), those of user files, and those sent with a request.

A template is data: text with a few named slots. Filling them in is plain substitution, done once, in
service.prompts.builder; nothing else in a template is interpreted. A file (TOML or JSON) holds a list `templates`,
each with

    name         "law"; with a version it is asked for as "law@1", without one the newest version is meant
    version      1, 2, …
    mode         "pointwise" (default) or "pairwise"; for self-rewarding judges "graded", answered by a digit from 0 to
                 5, or "rubric", answered by a text that ends in "Score: n"
    category     optional: requests for this category get the newest version of this template
    instruction  what to judge by
    question     what is asked after the answer, in the frame "instruction-first" of a pointwise template; default: the
                 frame's
    format       "chat" or "raw"; default: chat where the model has a chat template
    frame        "instruction-first" (default) or, pointwise, "question-last": the built-in layout and labels to use
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
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from hashlib import sha256
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from client.errors import ErrorCode
from client.schema import Format, InlineTemplate, Labels, Name, Text
from service.errors import ServiceError

TOP_GRADE: Final = 5
"""Grades are the whole numbers from 0 to this one."""
GRADE_WEIGHTS: Final = tuple(k / TOP_GRADE for k in range(TOP_GRADE + 1))

Mode = Literal["pointwise", "pairwise", "graded", "rubric"]

INLINE: Final = "inline"
GENERAL: Final = "general"
"""The category of requests that name none."""
REQUIRED_SLOTS: Final[dict[Mode, tuple[str, ...]]] = {
    "pointwise": ("prompt", "response"),
    "pairwise": ("prompt", "response_a", "response_b"),
    "graded": ("prompt", "response"),
    "rubric": ("prompt", "response"),
}
DEFAULT_MODES: Final[tuple[Mode, ...]] = ("pointwise", "pairwise")
"""The templates' modes that the judge `yes-no` can use."""
_SLOT: Final = {
    mode: re.compile(r"\{(" + "|".join((*slots, "instruction")) + r")\}") for mode, slots in REQUIRED_SLOTS.items()
}


@dataclass(frozen=True, slots=True)
class Side:
    """Labels that mean the same, with their weight from 0 (No, or the worst) to 1 (Yes, or the best)."""

    name: str
    labels: tuple[str, ...]
    weight: float


@dataclass(frozen=True)  # without slots, for the cached digest
class Template:
    """One judge's prompt. The yes side of a pairwise template means that response A is the better one.

    A graded template has the labels of the six grades and neither yes nor no, one that asks for a text has no labels.
    """

    name: str
    version: int
    mode: Mode
    format: Format
    layout: str
    instruction: str
    yes: tuple[str, ...] = ()
    no: tuple[str, ...] = ()
    grades: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[Side, ...]:
        """All labels by what they mean."""
        if self.grades:
            marks = zip(self.grades, GRADE_WEIGHTS, strict=True)
            return tuple(Side(f"grade {k}", (label,), weight) for k, (label, weight) in enumerate(marks))
        return (Side("yes", self.yes, 1.0), Side("no", self.no, 0.0)) if self.yes else ()

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all that makes it what it is: a file's text may change under one name and version."""
        return sha256(json.dumps(asdict(self)).encode()).hexdigest()

    @property
    def id(self) -> str:
        """What results call it: `general@1`, or `inline`."""
        return self.name if self.name == INLINE else f"{self.name}@{self.version}"


def split_layout(layout: str, mode: Mode) -> list[str]:
    """The layout as text, slot name, text, slot name, …, text."""
    return _SLOT[mode].split(layout)


def from_inline(inline: InlineTemplate) -> Template:
    """The template that came with a request; a layout with {response_a} and {response_b} is a pairwise one.

    Raises ServiceError(BAD_TEMPLATE) where the layout's slots are not right.
    """
    pairwise = "{response}" not in inline.layout and "{response_a}" in inline.layout
    template = Template(
        name=INLINE,
        version=1,
        mode="pairwise" if pairwise else "pointwise",
        format=inline.format,
        layout=inline.layout,
        instruction=inline.instruction,
        yes=tuple(inline.labels.yes),
        no=tuple(inline.labels.no),
    )
    problem = _problem(template)
    if problem:
        raise ServiceError(ErrorCode.BAD_TEMPLATE, f"the template's {problem}", param="template")
    return template


class TemplateLibrary:
    """Every template that requests may name. Immutable once loaded."""

    def __init__(
        self,
        templates: Mapping[str, Template],
        categories: Mapping[tuple[str, Mode], str],
        modes: Collection[Mode] = DEFAULT_MODES,
    ) -> None:
        """`templates` by id, `categories` by category and mode, with the template's name.

        Only what has one of `modes` is listed: those that the service's judge can use.
        """
        self._modes = frozenset(modes)
        self._by_id = dict(templates)
        self._newest: dict[str, Template] = {}
        for template in sorted(templates.values(), key=lambda t: t.version):
            self._newest[template.name] = template
        self._categories = dict(categories)

    @classmethod
    def load(
        cls, default_format: Format, files: Sequence[Path] = (), modes: Collection[Mode] = DEFAULT_MODES
    ) -> TemplateLibrary:
        """The built-in templates in the format that suits the model, and those of the user's files.

        Raises ServiceError(BAD_TEMPLATE) that names the file and the template at fault.
        """
        sources: dict[str, str] = {}
        templates: dict[str, Template] = {}
        categories: dict[tuple[str, Mode], str] = {}
        for source, template, category in _all_sources(default_format, files):
            if template.id in templates:
                raise _bad_file(source, template.id, f"is already defined in {sources[template.id]}")
            sources[template.id] = source
            templates[template.id] = template
            if category and categories.setdefault((category, template.mode), template.name) != template.name:
                taken = categories[category, template.mode]
                raise _bad_file(source, template.id, f"claims category {category}, which belongs to {taken}")
        return cls(templates, categories, modes)

    def get(self, name: str) -> Template:
        """`general` is the newest version, `general@1` that one; else ServiceError(TEMPLATE_NOT_FOUND)."""
        template = self._by_id.get(name) or self._newest.get(name)
        if template is None:
            raise ServiceError(
                ErrorCode.TEMPLATE_NOT_FOUND, "no such template; GET /templates lists them", param="template"
            )
        return template

    def for_category(self, category: str, mode: Mode) -> Template:
        """The newest template of the category; else ServiceError(TEMPLATE_NOT_FOUND) that lists the categories."""
        name = self._categories.get((category, mode))
        if name is None:
            known = ", ".join(sorted(c for c, m in self._categories if m == mode))
            raise ServiceError(
                ErrorCode.TEMPLATE_NOT_FOUND,
                f"no such category for {mode} judgements; there are: {known}",
                param="category",
            )
        return self._newest[name]

    def default(self, mode: Mode) -> Template:
        """The template of requests that name none."""
        return self.for_category(GENERAL, mode)

    def all(self) -> list[Template]:
        """Every version of every template that the judge can use, by name and version."""
        usable = [template for template in self._by_id.values() if template.mode in self._modes]
        return sorted(usable, key=lambda t: (t.name, t.version))

    def categories(self) -> list[str]:
        """What requests may say as `category`."""
        return sorted({category for category, mode in self._categories if mode in self._modes})


_TemplateName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=120)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Frame = Literal["instruction-first", "question-last"]
Grades = Annotated[list[Text], Field(min_length=len(GRADE_WEIGHTS), max_length=len(GRADE_WEIGHTS))]


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
        if self.frame == "question-last" and self.mode != "pointwise":
            raise ValueError("frame question-last is for pointwise templates")
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
    text = package_files("service.prompts").joinpath("templates", "layouts.toml").read_text(encoding="utf-8")
    return _FRAMES.validate_python(tomllib.loads(text))


def _all_sources(default_format: Format, files: Sequence[Path]) -> Iterator[tuple[str, Template, str | None]]:
    """Each template with where it stands and its category, the built-in ones first."""
    folder = package_files("service.prompts").joinpath("templates")
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
        problem = _problem(template)
        if problem:
            raise _bad_file(source, template.id, problem)
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
        layout=entry.layout or built_in.asking(entry.question),
        instruction=entry.instruction,
        yes=tuple(labels.yes) if labels else (),
        no=tuple(labels.no) if labels else (),
        grades=tuple(grades),
    )


def _problem(template: Template) -> str | None:
    """What is wrong with the layout, in words that do not repeat it."""
    slots = Counter(split_layout(template.layout, template.mode)[1::2])
    required = REQUIRED_SLOTS[template.mode]
    if any(slots[name] != 1 for name in required):
        return f"layout must hold {', '.join(f'{{{name}}}' for name in required)} exactly once each"
    if slots["instruction"] > 1:
        return "layout must hold {instruction} at most once"
    if template.instruction and not slots["instruction"]:
        return "instruction would not be read: layout holds no {instruction}"
    return None


def _name_at(data: Any, location: Sequence[int | str]) -> str:
    """The name of the template that a validation error is about, as far as the file says it."""
    if len(location) > 1 and location[0] == "templates" and isinstance(location[1], int):
        entry = data["templates"][location[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        return f"number {location[1]}" if name is None else f"{name}"
    return "list"


def _bad_file(source: str, template: str, problem: str) -> ServiceError:
    return ServiceError(ErrorCode.BAD_TEMPLATE, f"{source}: template {template}: {problem}")

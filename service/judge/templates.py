"""The templates that requests name, and the library of them; template_files.py reads those of files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Final, Literal

from client.errors import ErrorCode
from client.schema import InlineTemplate
from service.errors import ServiceError
from service.questions import Choice, Layout, Predicate, Question, Scale

Mode = Literal["pointwise", "pairwise", "graded", "rubric", "choice", "scale"]

INLINE: Final = "inline"
GENERAL: Final = "general"
"""The category of requests that name none."""
SLOTS: Final[dict[Mode, tuple[str, ...]]] = {
    "pointwise": ("prompt", "response"),
    "pairwise": ("prompt", "response_a", "response_b"),
    "graded": ("prompt", "response"),
    "rubric": ("prompt", "response"),
    "choice": ("prompt", "question", "options"),
    "scale": ("prompt", "question", "options"),
}
DEFAULT_MODES: Final[tuple[Mode, ...]] = ("pointwise", "pairwise")
"""The modes of templates that the judge `yes-no` can use."""


@dataclass(frozen=True, kw_only=True)
class Template(Layout):
    """A layout that requests can name. The yes side of a pairwise template means that response A is the better one."""

    name: str
    version: int
    mode: Mode

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all that the template consists of: a file's text may change under one name and version.

        Benchmark runs and calibration files keep it, so what it is computed from may not change its form.
        """
        parts = {
            "name": self.name,
            "version": self.version,
            "mode": self.mode,
            "format": self.format,
            "layout": self.text,
            "instruction": self.instruction,
            "yes": self.yes,
            "no": self.no,
            "grades": self.grades,
        }
        return sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def id(self) -> str:
        """What results call it: `general@1`, or `inline`."""
        return INLINE if self.inline else f"{self.name}@{self.version}"

    @property
    def yes(self) -> tuple[str, ...]:
        """The labels of a yes-no or pairwise template that mean yes."""
        return () if isinstance(self.question, Scale) or not self.options else self.options[0].spellings

    @property
    def no(self) -> tuple[str, ...]:
        """Those that mean no."""
        return () if isinstance(self.question, Scale) or not self.options else self.options[1].spellings

    @property
    def grades(self) -> tuple[str, ...]:
        """The labels of a graded template, worst first."""
        return tuple(level.spellings[0] for level in self.options) if isinstance(self.question, Scale) else ()


def question_of(mode: Mode, yes: Sequence[str], no: Sequence[str], grades: Sequence[str] = ()) -> Question | None:
    """What a template of this mode asks, by its labels. None where the request says, or the answer is a text."""
    if mode == "graded":
        return Scale.of(grades, "grade")
    if mode in ("rubric", "choice", "scale"):
        return None
    predicate = Predicate.of(yes, no)
    return Choice(predicate.options) if mode == "pairwise" else predicate


def from_inline(inline: InlineTemplate) -> Template:
    """The template that came with a request; a layout with {response_a} and {response_b} is a pairwise one.

    Its slots are checked where prompts are built of it: in a thread, because callers may send megabytes.
    """
    pairwise = "{response}" not in inline.layout and "{response_a}" in inline.layout
    mode: Mode = "pairwise" if pairwise else "pointwise"
    return Template(
        name=INLINE,
        version=1,
        mode=mode,
        format=inline.format,
        text=inline.layout,
        slots=SLOTS[mode],
        instruction=inline.instruction,
        question=question_of(mode, inline.labels.yes, inline.labels.no),
        inline=True,
    )


class TemplateLibrary:
    """Every template that requests may name. Immutable once loaded; template_files.load_library loads it."""

    def __init__(
        self,
        templates: Iterable[Template],
        categories: Mapping[tuple[str, Mode], str],
        modes: Collection[Mode] = DEFAULT_MODES,
    ) -> None:
        """`categories` has the template's name by category and mode.

        Only templates of one of `modes` are listed: those that the service's judge can use.
        """
        self._modes = frozenset(modes)
        self._by_id = {template.id: template for template in templates}
        self._newest = {template.name: template for template in sorted(self._by_id.values(), key=lambda t: t.version)}
        self._categories = dict(categories)

    def get(self, name: str) -> Template:
        """`general` is the newest version, `general@1` that one; raises ServiceError(TEMPLATE_NOT_FOUND)."""
        template = self._by_id.get(name) or self._newest.get(name)
        if template is None:
            raise ServiceError(
                ErrorCode.TEMPLATE_NOT_FOUND, "no such template; GET /templates lists them", param="template"
            )
        return template

    def for_category(self, category: str, mode: Mode) -> Template:
        """The newest template of the category; raises ServiceError(TEMPLATE_NOT_FOUND) that lists the categories."""
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

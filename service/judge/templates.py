"""The templates and panels that requests name, and the library of them; template_files.py reads those of files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Final, Literal

from client.errors import ErrorCode
from client.schema import MAX_MEMBERS, InlineTemplate
from service.errors import ServiceError
from service.questions import Choice, Layout, Predicate, Question, Scale

Mode = Literal["pointwise", "pairwise", "graded", "rubric", "choice", "scale"]

INLINE: Final = "inline"
SEPARATOR: Final = ","
"""Between the templates in the name of a panel that a request put together. No template's own name holds it."""
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


@dataclass(frozen=True)  # without slots, for what is cached
class Panel:
    """What a request is judged by: distinct templates that are all asked, and a positive weight for each.

    The verdict's log-odds are the weighted mean of theirs. Most panels have one member, and are called as it is. A
    panel of several without a name was put together by a request.
    """

    members: tuple[Template, ...]
    weights: tuple[float, ...]
    name: str = ""
    version: int = 1

    @classmethod
    def of(cls, template: Template) -> Panel:
        """This template alone."""
        return cls((template,), (1.0,), template.name, template.version)

    @property
    def single(self) -> Template | None:
        """The only member of a panel that stands for it."""
        return self.members[0] if len(self.members) == 1 else None

    @property
    def id(self) -> str:
        """What results call it."""
        if self.single:
            return self.single.id
        return f"{self.name}@{self.version}" if self.name else SEPARATOR.join(member.id for member in self.members)

    @property
    def mode(self) -> Mode:
        """That of all members."""
        return self.members[0].mode

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of all that it consists of; as Template.digest, its form stays."""
        if self.single:
            return self.single.digest
        parts = {
            "name": self.name,
            "version": self.version,
            "members": [member.digest for member in self.members],
            "weights": self.weights,
        }
        return sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def problem(self) -> str | None:
        """Why its members cannot be averaged; None if they can."""
        if len(self.members) > MAX_MEMBERS:
            return f"a panel has at most {MAX_MEMBERS} templates"
        if len({member.id for member in self.members}) < len(self.members):
            return "two names of the panel mean one template, and each may be asked once"
        modes = {member.mode for member in self.members}
        if len(modes) > 1:
            return f"the templates of a panel must be of one mode, and these are {' and '.join(sorted(modes))}"
        if not modes <= set(DEFAULT_MODES):
            return f"the templates of a panel must be {' or '.join(DEFAULT_MODES)}, and these are {self.mode}"
        return None


class TemplateLibrary:
    """Every template and panel that requests may name. Immutable once loaded.

    `panel`, `panel_for` and `default_panel` are for what may be a panel; `get`, `for_category` and `default` are the
    same where one template is needed, and raise ServiceError(BAD_TEMPLATE) for a panel of several.
    """

    def __init__(
        self,
        panels: Iterable[Panel],
        categories: Mapping[tuple[str, Mode], str],
        modes: Collection[Mode] = DEFAULT_MODES,
    ) -> None:
        """`panels` holds each template as a panel of its own; `categories` has the name by category and mode.

        Only those of one of `modes` are listed: those that the service's judge can use.
        """
        self._modes = frozenset(modes)
        self._by_id = {panel.id: panel for panel in panels}
        self._newest = {panel.name: panel for panel in sorted(self._by_id.values(), key=lambda p: p.version)}
        self._categories = dict(categories)

    def panel(self, names: str | Sequence[str]) -> Panel:
        """`general` is the newest version, `general@1` that one, a list or `general@1,math@2` a panel of them.

        Raises ServiceError: TEMPLATE_NOT_FOUND, BAD_TEMPLATE for templates that make no panel.
        """
        if isinstance(names, str):
            names = names.split(SEPARATOR)
        if len(names) == 1:
            return self._find(names[0])
        members = tuple(self._member(name, place) for place, name in enumerate(names[: MAX_MEMBERS + 1]))
        panel = Panel(members, (1.0,) * len(members))
        if panel.problem:
            raise ServiceError(ErrorCode.BAD_TEMPLATE, panel.problem, param="template")
        return panel

    def panel_for(self, category: str, mode: Mode) -> Panel:
        """The newest of the category; raises ServiceError(TEMPLATE_NOT_FOUND) that lists the categories."""
        name = self._categories.get((category, mode))
        if name is None:
            known = ", ".join(sorted(c for c, m in self._categories if m == mode))
            raise ServiceError(
                ErrorCode.TEMPLATE_NOT_FOUND,
                f"no such category for {mode} judgements; there are: {known}",
                param="category",
            )
        return self._newest[name]

    def default_panel(self, mode: Mode) -> Panel:
        """What requests that name nothing are judged by."""
        return self.panel_for(GENERAL, mode)

    def get(self, name: str) -> Template:
        """The template of this name, as `panel` finds it."""
        return _only(self.panel(name))

    def for_category(self, category: str, mode: Mode) -> Template:
        """The newest template of the category, as `panel_for` finds it."""
        return _only(self.panel_for(category, mode))

    def default(self, mode: Mode) -> Template:
        """The template of requests that name none."""
        return self.for_category(GENERAL, mode)

    def all(self) -> list[Template]:
        """Every version of every template that the judge can use, by name and version."""
        usable = [panel.single for panel in self._usable() if panel.single]
        return sorted(usable, key=lambda t: (t.name, t.version))

    def panels(self) -> list[Panel]:
        """Every version of every panel of several templates that the judge can use, by name and version."""
        return sorted((panel for panel in self._usable() if not panel.single), key=lambda p: (p.name, p.version))

    def categories(self) -> list[str]:
        """What requests may say as `category`."""
        return sorted({category for category, mode in self._categories if mode in self._modes})

    def _usable(self) -> Iterable[Panel]:
        return (panel for panel in self._by_id.values() if panel.mode in self._modes)

    def _find(self, name: str, field: str = "template") -> Panel:
        panel = self._by_id.get(name) or self._newest.get(name)
        if panel is None:
            raise ServiceError(ErrorCode.TEMPLATE_NOT_FOUND, "no such template; GET /templates lists them", param=field)
        return panel

    def _member(self, name: str, place: int) -> Template:
        field = f"template[{place}]"
        member = self._find(name, field).single
        if member is None:
            message = "a panel cannot be a member of another: name its templates"
            raise ServiceError(ErrorCode.BAD_TEMPLATE, message, param=field)
        return member


def _only(panel: Panel) -> Template:
    if panel.single is None:
        raise ServiceError(
            ErrorCode.BAD_TEMPLATE, f"{panel.id} is a panel, and one template is needed here", param="template"
        )
    return panel.single

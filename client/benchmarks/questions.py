"""Which question is asked of which subset: its category's, one for all, or a map of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import ValidationError

from client.runtime.validation import first_problem
from client.schema import InlineTemplate

PANEL_SEPARATOR: Final = ","
"""Between the templates in the name of a panel, as results have it."""


class PlanError(ValueError):
    """The questions asked for cannot be planned; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Question:
    """One way of asking the judge: a category, a template's name, or an inline template, which needs a `name`.

    Several names with commas between them are a panel. With none of these the judge asks in its own way, which is the
    only one that some judges have.
    """

    category: str | None = None
    template: str | InlineTemplate | None = None
    name: str | None = None

    def __str__(self) -> str:
        """Its name in rows and summaries."""
        if self.name is not None:
            return self.name
        if self.category is None and self.template is None:
            return "the judge's own"
        return f"category {self.category}" if self.category is not None else str(self.template)

    @property
    def asked(self) -> str | list[str] | InlineTemplate | None:
        """The template as requests say it."""
        if isinstance(self.template, str) and PANEL_SEPARATOR in self.template:
            return self.template.split(PANEL_SEPARATOR)
        return self.template

    def described(self) -> dict[str, object]:
        """Everything that identifies the question, as JSON: a run is resumed only with the same."""
        inline = isinstance(self.template, InlineTemplate)
        template = self.template.model_dump() if isinstance(self.template, InlineTemplate) else self.template
        kept = {"name": self.name if inline else None, "category": self.category, "template": template}
        return {key: value for key, value in kept.items() if value is not None}


Plan: TypeAlias = Mapping[str, Question]


def by_category(subsets: Iterable[str], category_of: Callable[[str], str]) -> Plan:
    """Each subset by the built-in template of its category, as a user of the service would ask."""
    return {subset: Question(category=category_of(subset)) for subset in subsets}


def one_for_all(subsets: Iterable[str], question: Question) -> Plan:
    """The same question everywhere."""
    return dict.fromkeys(subsets, question)


def from_map(subsets: Iterable[str], path: Path) -> Plan:
    """Questions from a JSON file {"subset or pattern": question}; the first matching pattern counts, "*" is the rest.

    A question is {"category": name}, {"template": name}, {"template": [names]} or {"template": {inline template}}.
    Raises PlanError.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise PlanError(f"{path}: must hold an object of subsets or patterns and their questions")
    questions = {pattern: _question(value, f"{path}: {pattern}") for pattern, value in data.items()}
    plan: dict[str, Question] = {}
    for subset in subsets:
        matching = [question for pattern, question in questions.items() if fnmatchcase(subset, pattern)]
        if not matching:
            raise PlanError(f'{path}: no question for subset {subset}; add it, or "*" for all others')
        plan[subset] = matching[0]
    return plan


def load_candidates(path: Path) -> dict[str, list[Question]]:
    """Candidate questions by category from a JSON file {"category": [question, …]}.

    A question is {"name": …, "template": {inline template}, a template's name or a list of names}, or a bare template's
    name. Raises PlanError.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not all(isinstance(value, list) and value for value in data.values()):
        raise PlanError(f"{path}: must hold an object of categories, each with a list of candidate questions")
    return {
        category: [_question(value, f"{path}: {category}, number {i}") for i, value in enumerate(values)]
        for category, values in data.items()
    }


def read_json(path: Path) -> Any:
    """The file's JSON value. Raises PlanError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read as JSON: {error}") from error


def _question(value: Any, where: str) -> Question:
    if isinstance(value, str):
        return Question(template=value)
    unknown = set(value) - {"name", "category", "template"} if isinstance(value, dict) else {"not an object"}
    if unknown or ("category" in value) == ("template" in value):
        raise PlanError(f"{where}: a question holds either category or template, and a name for an inline template")
    template = value.get("template")
    if isinstance(template, dict):
        try:
            inline = InlineTemplate.model_validate(template)
        except ValidationError as error:
            raise PlanError(f"{where}: {first_problem(error)}") from error
        return Question(template=inline, name=value.get("name") or "inline")
    if isinstance(template, list) and all(isinstance(name, str) for name in template):
        template = PANEL_SEPARATOR.join(template)
    if template is not None and not isinstance(template, str):
        raise PlanError(f"{where}: template must be a name, a list of names or an inline template")
    return Question(category=value.get("category"), template=template)

"""Which question is asked of which subset: by category, one for all, a map of one's own, or the paper's prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from client.schema import Format, InlineTemplate, Labels

PaperStudy: TypeAlias = Literal["own", "shuffled", "same"]
PaperGroup: TypeAlias = Literal["rewardbench", "rmbench"]


class PlanError(ValueError):
    """What was asked for makes no plan; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Question:
    """One way of asking the judge: a category, a template's name, or a template of one's own, which needs a `name`.

    With none of these it is the judge's own way, which is the only one that some judges have.
    """

    category: str | None = None
    template: str | InlineTemplate | None = None
    name: str | None = None

    def __str__(self) -> str:
        """What records and summaries call it."""
        if self.name is not None:
            return self.name
        if self.category is None and self.template is None:
            return "the judge's own"
        return f"category {self.category}" if self.category is not None else str(self.template)

    def described(self) -> dict[str, object]:
        """All that makes the question what it is, as JSON: a run is resumed only with the same."""
        inline = isinstance(self.template, InlineTemplate)
        template = self.template.model_dump() if isinstance(self.template, InlineTemplate) else self.template
        kept = {"name": self.name if inline else None, "category": self.category, "template": template}
        return {key: value for key, value in kept.items() if value is not None}


Plan: TypeAlias = Mapping[str, Question]


def by_category(subsets: Iterable[str], category_of: Callable[[str], str]) -> Plan:
    """Each subset by the built-in template of its category: what a user of such requests would ask for."""
    return {subset: Question(category=category_of(subset)) for subset in subsets}


def one_for_all(subsets: Iterable[str], question: Question) -> Plan:
    """The same question everywhere."""
    return dict.fromkeys(subsets, question)


def from_map(subsets: Iterable[str], path: Path) -> Plan:
    """Questions of a JSON file {"subset or pattern": question}, the first pattern that fits, "*" for the rest.

    A question is {"category": name}, {"template": name} or {"template": {inline template}}. Raises PlanError.
    """
    data = _json(path)
    if not isinstance(data, dict):
        raise PlanError(f"{path}: must hold an object of subsets or patterns and their questions")
    questions = {pattern: _question(value, f"{path}: {pattern}") for pattern, value in data.items()}
    plan: dict[str, Question] = {}
    for subset in subsets:
        found = [question for pattern, question in questions.items() if fnmatchcase(subset, pattern)]
        if not found:
            raise PlanError(f'{path}: no question for subset {subset}; add it, or "*" for all others')
        plan[subset] = found[0]
    return plan


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _PaperLabels(_Part):
    yes: str
    no: str


class _PaperGroup(_Part):
    layout: str
    instructions: dict[str, str]


class PaperPrompts(_Part):
    """The prompts that the authors of Implicit Preference Optimization published, from their JSON file.

    One instruction for each subset, with `candidates` among which each was chosen; raw text, labels " Yes" and " No".
    """

    labels: _PaperLabels
    rewardbench: _PaperGroup
    rmbench: _PaperGroup
    candidates: dict[str, str | list[str]] = {}

    @classmethod
    def load(cls, path: Path) -> PaperPrompts:
        """Raises PlanError where the file is not theirs."""
        try:
            return cls.model_validate(_json(path))
        except ValidationError as error:
            raise PlanError(f"{path}: not the file of the paper's prompts: {_first(error)}") from error

    def question(self, group: PaperGroup, name: str, instruction: str, form: Format) -> Question:
        """An instruction in the group's layout. As chat, the layout's trailing space and the labels' go: there, the
        answer starts a new turn."""
        layout = (self.rewardbench if group == "rewardbench" else self.rmbench).layout
        yes, no = self.labels.yes, self.labels.no
        if form == "chat":
            layout, yes, no = layout.rstrip(), yes.strip(), no.strip()
        template = InlineTemplate(
            format=form, layout=layout, instruction=instruction, labels=Labels(yes=[yes], no=[no])
        )
        return Question(template=template, name=f"paper/{name} ({form})")

    def plan(self, subsets: Iterable[str], group: PaperGroup, form: Format, study: PaperStudy, seed: int) -> Plan:
        """The authors' instruction for each subset (`own`); theirs dealt out to other subsets at random (`shuffled`);
        or their one generic instruction for all (`same`). Raises PlanError for a subset that they have none for."""
        names = list(dict.fromkeys(subsets))
        if study == "same":
            return one_for_all(names, self.question(group, "default", self._default(), form))
        texts = {name: self._instruction(group, name) for name in names}
        source = _permuted(names, seed) if study == "shuffled" else dict(zip(names, names, strict=True))
        return {name: self.question(group, f"{group}/{source[name]}", texts[source[name]], form) for name in names}

    def candidates_for(self, subsets: Sequence[str], form: Format) -> list[Question]:
        """The published candidates of these RewardBench subsets, each text once."""
        found: dict[str, Question] = {}
        for subset in subsets:
            texts = self.candidates.get(subset, [])
            for index, text in enumerate([texts] if isinstance(texts, str) else texts):
                found.setdefault(text, self.question("rewardbench", f"candidates/{subset}/{index}", text, form))
        return list(found.values())

    def _default(self) -> str:
        text = self.candidates.get("default")
        if not isinstance(text, str):
            raise PlanError("the file of the paper's prompts holds no candidate `default`")
        return text

    def _instruction(self, group: PaperGroup, subset: str) -> str:
        key = subset if group == "rewardbench" else f"RM-Bench-{subset}"
        instructions = (self.rewardbench if group == "rewardbench" else self.rmbench).instructions
        if key not in instructions:
            raise PlanError(f"the paper has no instruction for subset {subset}; choose others with --subsets")
        return instructions[key]


def load_candidates(path: Path) -> dict[str, list[Question]]:
    """Candidate questions by category from a JSON file {"category": [question, …]}.

    A question is {"name": …, "template": {inline template} or a template's name}, or a bare template's name. Raises
    PlanError.
    """
    data = _json(path)
    if not isinstance(data, dict) or not all(isinstance(value, list) and value for value in data.values()):
        raise PlanError(f"{path}: must hold an object of categories, each with a list of candidate questions")
    return {
        category: [_question(value, f"{path}: {category}, number {i}") for i, value in enumerate(values)]
        for category, values in data.items()
    }


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
            raise PlanError(f"{where}: {_first(error)}") from error
        return Question(template=inline, name=value.get("name") or "inline")
    return Question(category=value.get("category"), template=template)


def _permuted(names: Sequence[str], seed: int) -> dict[str, str]:
    mixed = list(names)
    random.Random(seed).shuffle(mixed)
    return dict(zip(names, mixed, strict=True))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot be read as JSON: {error}") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"

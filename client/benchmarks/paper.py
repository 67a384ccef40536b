"""The prompts published by the authors of Implicit Preference Optimization (arXiv 2502.16182), in a JSON file."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, ValidationError

from client.benchmarks.questions import Plan, PlanError, Question, one_for_all, read_json
from client.benchmarks.rows import FrozenModel
from client.runtime.validation import first_problem
from client.schema import Format, InlineTemplate, Labels

PaperStudy: TypeAlias = Literal["own", "shuffled", "same"]
PaperGroup: TypeAlias = Literal["rewardbench", "rmbench"]


class PaperLabels(FrozenModel):
    """The texts whose probabilities are read."""

    yes: str
    no: str


class GroupPrompts(FrozenModel):
    """One benchmark's layout, and its instructions by the authors' names of the subsets."""

    layout: str
    instructions: dict[str, str]


class PaperPrompts(FrozenModel):
    """The authors' file: an instruction for each subset, and the `candidates` each was chosen from.

    The prompts are raw text with the labels " Yes" and " No".
    """

    labels: PaperLabels
    rewardbench: GroupPrompts
    rmbench: GroupPrompts
    candidates: dict[str, str | list[str]] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> PaperPrompts:
        """Raises PlanError if the file is not theirs."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise PlanError(f"{path}: not the file of the paper's prompts: {first_problem(error)}") from error

    def plan(self, subsets: Iterable[str], group: PaperGroup, form: Format, study: PaperStudy, seed: int) -> Plan:
        """The question of each subset; raises PlanError for a subset without an instruction.

        `own` is the authors' instruction for the subset, `shuffled` another subset's at random, and `same` their one
        generic instruction for all.
        """
        names = list(dict.fromkeys(subsets))
        if study == "same":
            return one_for_all(names, self._question(group, "default", self._default(), form))
        texts = {name: self._instruction(group, name) for name in names}
        source = _permuted(names, seed) if study == "shuffled" else dict(zip(names, names, strict=True))
        return {name: self._question(group, f"{group}/{source[name]}", texts[source[name]], form) for name in names}

    def candidates_for(self, subsets: Sequence[str], form: Format) -> list[Question]:
        """The published candidates for these RewardBench subsets, each text once."""
        questions: dict[str, Question] = {}
        for subset in subsets:
            texts = self.candidates.get(subset, [])
            for index, text in enumerate([texts] if isinstance(texts, str) else texts):
                questions.setdefault(text, self._question("rewardbench", f"candidates/{subset}/{index}", text, form))
        return list(questions.values())

    def _question(self, group: PaperGroup, name: str, instruction: str, form: Format) -> Question:
        layout, yes, no = self._group(group).layout, self.labels.yes, self.labels.no
        if form == "chat":
            # In a chat template the answer starts a new turn: the layout's trailing space and the labels' leading one
            # would come on top of that.
            layout, yes, no = layout.rstrip(), yes.strip(), no.strip()
        template = InlineTemplate(
            format=form, layout=layout, instruction=instruction, labels=Labels(yes=[yes], no=[no])
        )
        return Question(template=template, name=f"paper/{name} ({form})")

    def _group(self, group: PaperGroup) -> GroupPrompts:
        return self.rewardbench if group == "rewardbench" else self.rmbench

    def _default(self) -> str:
        text = self.candidates.get("default")
        if not isinstance(text, str):
            raise PlanError("the file of the paper's prompts holds no candidate `default`")
        return text

    def _instruction(self, group: PaperGroup, subset: str) -> str:
        key = subset if group == "rewardbench" else f"RM-Bench-{subset}"
        instructions = self._group(group).instructions
        if key not in instructions:
            raise PlanError(f"the paper has no instruction for subset {subset}; choose others with --subsets")
        return instructions[key]


def _permuted(names: Sequence[str], seed: int) -> dict[str, str]:
    mixed = list(names)
    random.Random(seed).shuffle(mixed)
    return dict(zip(names, mixed, strict=True))

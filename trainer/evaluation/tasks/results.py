"""The results of tasks (tasks/metrics.json, and `tasks` in an evaluation's metrics.json), and what they say."""

from __future__ import annotations

from pydantic import Field

from trainer.evaluation.tasks.contrasts import Contrast
from trainer.evaluation.tasks.divergence import Side
from trainer.evaluation.tasks.scores import Mean, TaskScores
from trainer.run.records import Record


class Distance(Record):
    """KL(arm ‖ base) per token, in nats, on the base's answers and on the arm's own; `count` is of answers.

    `problem` says why there is none.
    """

    by_side: dict[Side, Mean] = Field(default_factory=dict)
    problem: str | None = None


class TaskMetrics(Record):
    """All arms on all tasks. `arms` maps their names to the models' titles, `main` each task to its main measure.

    `same_weights` lists the arms that have the base's weights: whatever tells them from it is not training.
    """

    arms: dict[str, str]
    main: dict[str, str]
    max_new_tokens: int
    scores: dict[str, dict[str, TaskScores]]
    contrasts: list[Contrast]
    distances: dict[str, Distance]
    same_weights: list[str] = Field(default_factory=list)

    @property
    def sentences(self) -> list[str]:
        """What the main measures support, in plain words."""
        same = [f"{arm} has the weights of base: training changed nothing" for arm in self.same_weights]
        shown = [one for one in self.contrasts if one.measure == self.main[one.task]]
        return [*same, *(one.sentence for one in shown if not {one.arm, one.against} & {*self.same_weights})]


class TasksOnly(Record):
    """metrics.json of an evaluation without a judge."""

    tasks: TaskMetrics

"""Asking a judge what shows its reliability: pairs in both orders, and samples under a second wording of the question.

scores.jsonl ── the pairs they make ──> a seeded choice ── both orders ─────> orders/items.jsonl ──┐
                                             └─ their prompts' samples, reworded ──> reworded.jsonl ┴─> reliability.json
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client.benchmarks.questions import Question
from client.benchmarks.rows import Row
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.data.samples import Sample as Entry
from client.errors import JudgeError
from client.judge import AsyncJudge
from client.labels.candidates import CandidatePair
from client.labels.labelling import LabelJob, label_texts
from client.labels.pairs import PairOptions, choose_pairs
from client.labels.records import GENERAL, SampleKey, Score
from client.labels.service import JudgeLabeler, LabelQuestion
from client.runs.config import TEMPLATES, judge_identity, template_digests
from client.runs.progress import OnProgress
from client.runs.resumable import RunError
from client.schema import ModelInfo, TemplatesResult
from trainer.errors import StageError
from trainer.labels.labelers import IPO, LabelOptions, connected, lost, offered_by
from trainer.labels.labeling import START_OVER, Labelling, texts_of
from trainer.labels.reliability import (
    RELIABILITY_FILE,
    Reliability,
    label_mass_of,
    lengths_of,
    orders_of,
    wording_of,
)
from trainer.run.files import read_records, write_record, write_records
from trainer.run.records import Instruction, Sample

REWORDED_FILE: Final = "reworded.jsonl"
ORDERS_FOLDER: Final = "orders"


@dataclass(frozen=True, slots=True)
class ReliabilityOptions:
    """How the judge's reliability is measured, and whether pairs are left out by it.

    With `reliable_pairs` a pair needs a second wording that prefers the same response by more than `reliable_margin`
    log-odds. Raises ValueError for numbers below 0.
    """

    reliability_pairs: int = field(
        default=200,
        metadata={"help": "pairs on which the judge's reliability is measured before training; 0: not at all"},
    )
    second_template: str | None = field(
        default=None, metadata={"help": "template of the second wording; none: another version of each category's"}
    )
    reliable_pairs: bool = field(
        default=False,
        metadata={"help": "train only on pairs that a second wording of the question orders the same way"},
    )
    reliable_margin: float = field(
        default=0.0, metadata={"help": "with --reliable-pairs: least margin of that wording, in log-odds"}
    )
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reliability_pairs < 0 or not 0 <= self.reliable_margin < float("inf"):
            raise ValueError("--reliability-pairs and --reliable-margin must be 0 or more")
        if self.reliable_margin and not self.reliable_pairs:
            raise ValueError("--reliable-margin goes with --reliable-pairs")

    @property
    def measures(self) -> bool:
        """Whether the stage has anything to do."""
        return self.reliable_pairs or self.reliability_pairs > 0

    def described(self) -> dict[str, object]:
        """What decides reliability.json, for the stage's inputs."""
        return {
            "measured_pairs": self.reliability_pairs,
            "second_template": self.second_template,
            "all_reworded": self.reliable_pairs,
            "measured_seed": self.seed,
        }

    def filter_described(self) -> dict[str, object]:
        """What decides which pairs are left out; nothing if none are."""
        return {"reliable_margin": self.reliable_margin} if self.reliable_pairs else {}


@dataclass(frozen=True, slots=True)
class Labelled:
    """A round's samples with their labels."""

    instructions: Sequence[Instruction]
    samples: Sequence[Sample]
    scores: Sequence[Score]

    @property
    def by_key(self) -> dict[SampleKey, Score]:
        """The last score of each sample."""
        return {score.key: score for score in self.scores}


def reliability_outputs(labels: LabelOptions) -> tuple[str, ...]:
    """The files and folders that `measure_reliability` writes."""
    return (RELIABILITY_FILE, REWORDED_FILE, ORDERS_FOLDER) if labels.labeler == IPO else (RELIABILITY_FILE,)


def measure_reliability(
    labelled: Labelled,
    folder: Path,
    labels: LabelOptions,
    pairs: PairOptions,
    options: ReliabilityOptions,
    on_progress: OnProgress | None = None,
) -> Reliability:
    """Write `reliability_outputs` into `folder`; what a killed process has asked is not asked again.

    Only the judge yes-no has an order and a wording to change; for other labelers there are lengths and label mass.
    Raises StageError if the judge stays out of reach, has changed, or fails on too many.
    """
    chosen = _measured_pairs(labelled, pairs, options)
    samples = _samples_of(chosen, labelled.samples)
    scores = labelled.by_key
    orders = wording = None
    if labels.labeler == IPO:
        assert labels.judge is not None
        task = _Asking(labelled, folder, labels, options, chosen, on_progress)
        try:
            rows, templates, second = asyncio.run(task.ask())
        except JudgeError as error:
            raise lost(labels.judge, error) from error
        except RunError as error:
            raise StageError(str(error)) from error
        orders = orders_of(rows)
        wording = wording_of(templates, list(chosen.values()), samples, scores, second) if templates else None
    found = Reliability(
        labeler=labels.labeler,
        pairs=len(chosen),
        orders=orders,
        wording=wording,
        length=lengths_of(samples, scores),
        label_mass=label_mass_of(scores),
    )
    write_record(folder / RELIABILITY_FILE, found)
    return found


def second_templates(
    categories: Mapping[str, str], offered: TemplatesResult, second: str | None = None
) -> dict[str, str]:
    """A second wording for each category, given the template that each was asked with, such as chat@1.

    That is `second`, or another version of the same template, else general's; a category for which there is none is
    left out. Raises StageError if the service has no `second`.
    """
    known = [f"{one.name}@{one.version}" for one in offered.templates if one.mode == "pointwise"]
    if second is not None:
        name = next((one for one in known if second in (one, one.partition("@")[0])), None)
        if name is None:
            raise StageError(f"--second-template: the service has no {second}, only {', '.join(known)}")
        return dict.fromkeys(categories, name)
    found: dict[str, str] = {}
    for category, first in categories.items():
        own = first.partition("@")[0]
        others = [one for name in (own, GENERAL) for one in known if one.partition("@")[0] == name and one != first]
        if others:
            found[category] = others[0]
    return found


def _measured_pairs(labelled: Labelled, pairs: PairOptions, options: ReliabilityOptions) -> dict[str, CandidatePair]:
    """A seeded choice of the pairs that the labels make, one a prompt, by the prompt's id."""
    found, _ = choose_pairs(labelled.instructions, labelled.samples, labelled.by_key, pairs)
    names = sorted(found)
    kept = random.Random(options.seed).sample(names, min(options.reliability_pairs, len(names)))
    return {name: found[name][0] for name in sorted(kept)}


def _samples_of(prompts: Mapping[str, CandidatePair], samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    grouped: dict[str, list[Sample]] = {name: [] for name in prompts}
    for sample in samples:
        if sample.id in grouped:
            grouped[sample.id].append(sample)
    return grouped


@dataclass(frozen=True, slots=True)
class _Asking:
    """What the judge yes-no is asked about a round's `pairs`, and who is told how far it is."""

    labelled: Labelled
    folder: Path
    labels: LabelOptions
    options: ReliabilityOptions
    pairs: Mapping[str, CandidatePair]
    on_progress: OnProgress | None

    async def ask(self) -> tuple[list[Row], dict[str, str], dict[SampleKey, Score]]:
        """The pairs in both orders; the second template of each category, and the scores that it gave."""
        assert self.labels.judge is not None
        async with connected(self.labels.judge) as (judge, info):
            offered = await offered_by(judge, self.labels.judge)
            templates = second_templates(self._first_templates(), offered, self.options.second_template)
            second = await self._reworded(judge, info, offered, templates)
            return await self._both_orders(judge, info, offered), templates, second

    async def _both_orders(self, judge: AsyncJudge, info: ModelInfo, offered: TemplatesResult) -> list[Row]:
        assert self.labels.judge is not None
        prompts = {one.id: one for one in self.labelled.instructions}
        entries = [
            Entry(
                name,
                prompts[name].category,
                prompts[name].prompt,
                chosen=(pair.chosen.sample.response,),
                rejected=(pair.rejected.sample.response,),
            )
            for name, pair in self.pairs.items()
        ]
        plan = {
            one.subset: Question(category=one.subset if one.subset in offered.categories else GENERAL)
            for one in entries
        }
        # The share of failures is counted, not limited: nothing is trained on these verdicts.
        asking = Asking(plan, "pairwise", self.labels.truncation, 1.0, self.labels.judge.bulk)
        config = {
            "judge": judge_identity(info),
            TEMPLATES: template_digests(offered.templates),
            **asking.described(),
        }
        folder = RunFolder(self.folder / ORDERS_FOLDER, config)
        return await judge_samples(judge, entries, asking, folder, self.on_progress)

    async def _reworded(
        self, judge: AsyncJudge, info: ModelInfo, offered: TemplatesResult, templates: Mapping[str, str]
    ) -> dict[SampleKey, Score]:
        assert self.labels.judge is not None
        path = self.folder / REWORDED_FILE
        known = read_records(path, Score) if path.exists() else []
        texts = texts_of(Labelling(self.labelled.instructions, self._asked_again(), path))
        scores: dict[SampleKey, Score] = {}
        for category, template in templates.items():
            own = {key: text for key, text in texts.items() if text.category == category}
            question = LabelQuestion(template, self.labels.truncation, self.labels.judge.bulk)
            labeler = JudgeLabeler(judge, info, offered, question)
            scores |= await label_texts(labeler, LabelJob(own, path, 1.0, START_OVER), known, self.on_progress)
        # Answers come in any order: the finished file is in that of the samples.
        write_records(path, (scores[key] for key in texts if key in scores))
        return scores

    def _asked_again(self) -> list[Sample]:
        """All samples if pairs are left out by the second wording, else those of the measured prompts."""
        every = self.options.reliable_pairs
        return [sample for sample in self.labelled.samples if every or sample.id in self.pairs]

    def _first_templates(self) -> dict[str, str]:
        """The template that each category was asked with."""
        category_of = {one.id: one.category for one in self.labelled.instructions}
        return {category_of[score.id]: score.template for score in self.labelled.scores if score.template is not None}

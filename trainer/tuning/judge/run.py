"""All that decides a run: model, labels, settings; and which labels it can use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.runtime.memory import available_bytes
from trainer.errors import InputError
from trainer.policy.model_ref import ModelRef
from trainer.policy.models import DType, choose_device, choose_dtype, resolve_model
from trainer.run.progress import echo
from trainer.tuning.judge.labels import Label, LabelSplit, clean, read_labels, split_labels
from trainer.tuning.judge.leaks import leaking
from trainer.tuning.judge.memory import needed_bytes
from trainer.tuning.judge.prompts import Example, JudgePrompts
from trainer.tuning.judge.replay import read_replay, split_replay
from trainer.tuning.judge.rubric import read_rubric, rubric_labels
from trainer.tuning.judge.settings import JudgeSettings
from trainer.tuning.judge.teacher import TeacherLine, TeacherOptions, taught
from trainer.tuning.judge.unlabelled import read_questions
from trainer.tuning.preferences import held_out_indices


@dataclass(frozen=True, slots=True)
class LabelSource:
    """Where labels come from, a file or a rubric that makes them or both, and which of them are used. `leaks` says what
    happens to labels that one of the evaluation files `not_in` knows: refuse, drop or keep. `replay` has pairs on which
    the judge is held to the base.
    """

    source: str | None
    category: str = "category"
    limit: int | None = None
    held_out: float = 0.2
    not_in: tuple[Path, ...] = ()
    leaks: str = "refuse"
    rubric: Path | None = None
    replay: str | None = None


@dataclass(frozen=True, slots=True)
class JudgeRun:
    """All that decides a run."""

    model: ModelRef
    labels: LabelSource
    settings: JudgeSettings
    template: str | None
    template_files: tuple[Path, ...]
    merge_dtype: DType
    curve: tuple[int, ...]
    teacher: TeacherOptions | None = None

    @property
    def holds(self) -> bool:
        """Whether the pairs of --replay are trained on, and not only measured."""
        return self.labels.replay is not None and self.settings.replay_weight > 0

    def prompts(self) -> JudgePrompts:
        """What makes prompts of labels. Raises ModelError, InputError."""
        settings = self.settings
        folder = resolve_model(self.model.name)
        return JudgePrompts(folder, settings.asking, self.template, self.template_files, settings.max_length)

    def usable(self, answers: Mapping[str, TeacherLine] | None = None) -> tuple[LabelSplit, Counter[str]]:
        """The labels that can be trained on, split by prompt, and how many were left out, by reason.

        With `answers` of the teacher, by label, it decides those to train on; labels held out stay as they were given,
        if they were. Raises DataError, and InputError if too few are left or nothing can be learnt from them.
        """
        labels, left_out = self.fitting()
        split = split_labels(
            labels, held_out_indices([label.prompt_key for label in labels], self.labels.held_out, self.settings.seed)
        )
        if self.teacher is not None and answers is not None:
            train = self._taught(split.train, answers, self.teacher.weight, left_out)
            split = LabelSplit(train, self._taught(split.held_out, answers, 0.0, left_out))
            _check(split, left_out)
        elif self.teacher is None:
            _check(split, left_out)
        return split, left_out

    def replayed(self, held_out: Sequence[Label]) -> tuple[LabelSplit, Counter[str]]:
        """The pairs of --replay, split by prompt as the labels held out allow, and how many were left out, by reason.

        Raises DataError, InputError.
        """
        options = self.labels
        assert options.replay is not None
        pairs, left_out = read_replay(options.replay, options.category)
        pairs = self._fitting(_without_leaks(pairs, options, left_out), left_out)
        return split_replay(pairs, held_out, options.held_out, self.settings.seed), left_out

    def fitting(self) -> tuple[list[Label], Counter[str]]:
        """The labels that may be used and whose prompts fit, and how many were left out, by reason.

        Those of data without labels are undecided. Raises DataError, InputError.
        """
        options = self.labels
        labels, left_out = self._read()
        return self._fitting(_without_leaks(labels[: options.limit], options, left_out), left_out), left_out

    def _fitting(self, labels: Sequence[Label], left_out: Counter[str]) -> list[Label]:
        examples, unfit = self.prompts().examples(labels)
        left_out.update(unfit)
        return [example.label for example in examples]

    def _taught(
        self, labels: Sequence[Label], answers: Mapping[str, TeacherLine], weight: float, left_out: Counter[str]
    ) -> list[Label]:
        decided = taught(labels, answers, weight)
        kept = [label for label in decided if label.is_decided]
        left_out.update({"unanswered by the teacher": len(labels) - len(decided), "ties": len(decided) - len(kept)})
        for reason in [reason for reason, count in left_out.items() if not count]:
            del left_out[reason]
        return kept

    def _read(self) -> tuple[list[Label], Counter[str]]:
        """The labels that the file has, and those that the rubric makes."""
        options, left_out = self.labels, Counter[str]()
        labels: list[Label] = []
        if options.source is not None:
            read = read_labels if self.teacher is None else read_questions
            labels, left_out = read(options.source, options.category)
        if options.rubric is not None:
            made, notes = rubric_labels(read_rubric(options.rubric), options.category, self.settings.seed)
            for note in notes:
                echo(note)
            made, repeated = clean(made)
            labels += made
            left_out.update(repeated)
        return labels, left_out


def memory_line(run: JudgeRun, examples: Sequence[Example]) -> str:
    """How much memory training on these examples needs, and whether it is there."""
    settings = run.settings
    dtype = choose_dtype(settings.dtype, choose_device(settings.device))
    longest = max((example.tokens for example in examples), default=0)
    needed, free = needed_bytes(resolve_model(run.model.name), settings, longest, dtype.itemsize), available_bytes()
    if needed is None:
        return "memory: unknown, as the model's files do not tell its size"
    line = f"memory: about {needed / 1e9:.1f} GB" + (f", {free / 1e9:.1f} GB are free" if free else "")
    if free is not None and needed > free:
        line += ": too little. Lower --pass-tokens or --max-length, or give --gradient-checkpointing"
    return line


def counts_line(train: int, held_out: int, left_out: Mapping[str, int], what: str = "labels") -> str:
    """How many labels there are."""
    reasons = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in left_out.items())
    return f"{train} {what} to train on, {held_out} held out; left out: {reasons or 'none'}"


def _without_leaks(labels: Sequence[Label], options: LabelSource, left_out: Counter[str]) -> list[Label]:
    """The labels that no evaluation file has, or all of them. Raises InputError where some leak and may not."""
    found = leaking(labels, options.not_in)
    if not found or options.leaks == "keep":
        return list(labels)
    if options.leaks == "refuse":
        index, file = next(iter(found.items()))
        raise InputError(
            f"{len(found)} labels have a prompt, or eight words in a row, of an evaluation file (label "
            f"{labels[index].id} of {file}): a judge trained on them cannot be evaluated there. Give --leaks drop to "
            "leave them out, or --leaks keep"
        )
    left_out["in an evaluation file"] += len(found)
    return [label for index, label in enumerate(labels) if index not in found]


def _check(split: LabelSplit, left_out: Mapping[str, int]) -> None:
    """Raise InputError unless there is something to learn and something to measure on."""
    if not split.train or not split.held_out:
        line = counts_line(len(split.train), len(split.held_out), left_out)
        raise InputError(f"too few labels: {line}. Give more labels, or another --held-out")
    if not any(label.is_pair for label in split.train) and len({label.favours for label in split.train}) == 1:
        raise InputError("every label says the same, so there is nothing to learn: give good and bad answers, or pairs")

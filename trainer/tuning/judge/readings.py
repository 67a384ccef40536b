"""What a judge says of labels held out, by the service's own engine and rule: the numbers that it will serve."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Final

from client.runs.progress import OnProgress, Progress
from service.engine.contract import LabelLogprobs
from service.engine.torch.engine import TorchEngine
from service.engine.torch.loading import EngineLoadError
from service.judge.scoring import label_judgement
from trainer.errors import ModelError
from trainer.run.files import appending, read_records
from trainer.run.records import Record
from trainer.tuning.judge.prompts import Asking, Example
from trainer.tuning.judge.settings import JudgeSettings

# Examples in one call of the engine; each call's rows are written before the next.
_AT_ONCE: Final = 16
# Answers whose lengths differ by a smaller share than this are of like length.
_LIKE_LENGTH: Final = 0.1


class Reading(Record):
    """What a judge says of one label: log-odds and label mass of each of its prompts; `margin` is the label's, if it
    is a pair's. `target` and `kind` are as in Label, `lengths` as in Example; `asking` says what each of its prompts is
    about.
    """

    id: str
    category: str | None = None
    kind: str | None = None
    template: str
    asking: Asking
    target: float
    log_odds: tuple[float, ...]
    label_mass: tuple[float, ...]
    margin: float | None = None
    lengths: tuple[int, ...]
    prompt: str = ""
    """A digest of its prompt: labels of one prompt are not independent of each other."""

    @property
    def group(self) -> str:
        """What it shares with other labels of its prompt."""
        return self.prompt or self.id

    @property
    def credit(self) -> float:
        """1 for a right verdict, 0 for a wrong one, one half for a tie."""
        if self.wrongness == 0:
            return 0.5
        return float(self.wrongness < 0)

    @property
    def wrongness(self) -> float:
        """By how many log-odds the judge is on the wrong side; below 0 where it is right."""
        value = self.log_odds[0] if self.margin is None else self.margin
        return -value if self.target > 0.5 else value

    @property
    def length_class(self) -> str:
        """How long the better answer of a pair is beside the other."""
        first, second = self.lengths if self.target > 0.5 else self.lengths[::-1]
        if abs(first - second) <= _LIKE_LENGTH * max(first, second):
            return "like length"
        return "better is longer" if first > second else "better is shorter"


def read_held_out(
    folder: Path, examples: Sequence[Example], settings: JudgeSettings, output: Path, on_progress: OnProgress
) -> list[Reading]:
    """Have the model in `folder` judge the examples, into `output`; rows that are there already are kept.

    The engine gives a prompt the same bits in any company, so an interrupted reading ends like another. Raises
    ModelError, RecordError.
    """
    rows = read_records(output, Reading) if output.exists() else []
    known = {row.id for row in rows}
    left = [example for example in examples if example.label.id not in known]
    progress = Progress(len(examples), known=len(known), done=len(known))
    on_progress(progress)
    if left:
        longest = max(prompt.tokens for example in left for prompt in example.prompts)
        with closing(_engine(folder, longest, settings)) as engine, appending(output) as append:
            for start in range(0, len(left), _AT_ONCE):
                some = left[start : start + _AT_ONCE]
                for reading in _read(engine, some):
                    append(reading)
                    rows.append(reading)
                progress.done += len(some)
                on_progress(progress)
    by_id = {row.id: row for row in rows}
    return [by_id[example.label.id] for example in examples]


def _engine(folder: Path, longest: int, settings: JudgeSettings) -> TorchEngine:
    try:
        return TorchEngine.load(folder, dtype=settings.dtype, device=settings.device, max_tokens=longest)
    except EngineLoadError as error:
        raise ModelError(str(error)) from error


def _read(engine: TorchEngine, examples: Sequence[Example]) -> list[Reading]:
    answers = iter(engine.run([prompt for example in examples for prompt in example.prompts]))
    return [_reading(example, [next(answers) for _ in example.prompts]) for example in examples]


def _reading(example: Example, answers: Sequence[object]) -> Reading:
    question = example.template.question
    assert question is not None  # templates that ask in text are neither pointwise nor pairwise
    judged = [
        label_judgement(question, answer, prompt.label_ids, prompt.spellings)
        for prompt, answer in zip(example.prompts, answers, strict=True)
        if isinstance(answer, LabelLogprobs)
    ]
    log_odds = tuple(one.log_odds for one in judged)
    margin = sum(sign * value for sign, value in zip(example.signs, log_odds, strict=True)) if example.signs else None
    return Reading(
        id=example.label.id,
        category=example.label.category,
        kind=example.label.kind,
        template=example.template.id,
        asking="pairwise" if example.template.mode == "pairwise" else "pointwise",
        target=example.label.target,
        log_odds=log_odds,
        label_mass=tuple(one.label_mass for one in judged),
        margin=margin,
        lengths=example.lengths,
        prompt=sha256(example.label.prompt_key.encode()).hexdigest()[:16],
    )

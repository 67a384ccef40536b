"""The training loop: a plain one in torch, as only each prompt's last position is needed.

FOLDER/checkpoints/    while it trains: adapter, optimizer, step and random numbers; a rerun resumes the newest
FOLDER/training.jsonl  a line for each step: loss and its terms, margin, gradient norm, learning rate, tokens
FOLDER/adapter/        LoRA's weights as PEFT saves them, with the tokenizer; model/ after full fine-tuning
FOLDER/training.json   the JudgeTraining

The base is in bf16. Trained weights are fp32; a bf16 copy of them is what the forward multiplies by, written once a
step. (autocast would copy every weight in every forward.)
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from client.runs.progress import OnProgress, Progress
from client.runtime.files import write_whole
from trainer.errors import InputError
from trainer.policy.models import (
    quiet_libraries,
    resolve_model,
)
from trainer.run.files import put_in_place, write_json
from trainer.run.model_files import model_digest
from trainer.tuning.checkpoints import TrainingError, discard_unusable, disk_full_as_error, newest_checkpoint
from trainer.tuning.judge.loss import LossTerms, LossWeights, length_effect, loss_of
from trainer.tuning.judge.memory import return_blocks
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.reader import LogitReader, choose_reader, passes, read_prompts
from trainer.tuning.judge.settings import JudgeSettings
from trainer.tuning.judge.steplog import StepLog
from trainer.tuning.judge.trainable import Trainable
from trainer.tuning.settings import CHECKPOINTS, rate_factor
from trainer.tuning.training import is_changed

LOG_FILE: Final = "training.jsonl"
RESULT_FILE: Final = "training.json"
_STATE_FILE: Final = "state.pt"


def outputs_of(settings: JudgeSettings) -> tuple[str, ...]:
    """The names of what a training leaves in its folder."""
    return settings.output, LOG_FILE, RESULT_FILE


@dataclass(frozen=True, slots=True)
class JudgeTraining:
    """What was trained, on `labels` and on `replayed` pairs without. `tokens` were trained on, `seconds` and
    `tokens_per_second` are this process's own; `packed`: see reader.py. `length_effect` is what --length-control took
    out. `changed` is False if no weight has changed.
    """

    base: str
    labels: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    packed: bool
    changed: bool
    length_effect: float
    settings: dict[str, Any] = field(default_factory=dict)
    replayed: int = 0


def train_judge(
    model: str, examples: Sequence[Example], folder: Path, settings: JudgeSettings, on_progress: OnProgress
) -> JudgeTraining:
    """Train on the examples and write the files listed above; progress is in tokens.

    A rerun with the same arguments resumes the last checkpoint, with the same result. Raises InputError without
    examples, ModelError, TrainingError, ImportError.
    """
    if not examples:
        raise InputError("no label to train on is left")
    source = resolve_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    made_from = {
        **settings.described(),
        "model": [model, model_digest(source)],
        "data": _digest(examples),
        # What `discard_unusable` asks of checkpoints: they have no micro-batch, and one process.
        "micro_batch": None,
        "processes": 1,
    }
    return_blocks()
    with quiet_libraries():
        longest = max(prompt.tokens for example in examples for prompt in example.prompts)
        trainable = Trainable.load(source, settings, longest)
        probes = [prompt for example in examples[:8] for prompt in example.prompts]
        reader = choose_reader(trainable.base, probes, trainable.packing_problem)
        loop = _Loop(trainable, reader, examples, folder, settings, on_progress)
        loop.resume(made_from)
        loop.run()
        trainable.save(folder / settings.output, model, source)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    result = loop.result(model, changed=is_changed(source, folder / settings.output))
    write_json(folder / RESULT_FILE, asdict(result))
    return result


def _digest(examples: Sequence[Example]) -> str:
    digest = sha256()
    for example in examples:
        ids = [list(prompt.token_ids) for prompt in example.prompts]
        parts: list[object] = [example.label.model_dump_json(), example.template.id, ids]
        parts += [] if example.held_at is None else [example.held_at]
        digest.update(repr(parts).encode())
    return digest.hexdigest()


class _Loop:
    """Steps of the optimizer, from a checkpoint or from the start."""

    def __init__(
        self,
        model: Trainable,
        reader: LogitReader,
        examples: Sequence[Example],
        folder: Path,
        settings: JudgeSettings,
        on_progress: OnProgress,
    ) -> None:
        self._model, self._reader, self._examples = model, reader, examples
        self._folder, self._settings, self._report = folder, settings, on_progress
        self._steps = settings.steps(len(examples))
        effect = length_effect(examples) if settings.length_control else 0.0
        self._weights = LossWeights(
            settings.pair_weight, settings.single_weight, settings.mass_weight, settings.replay_weight, effect
        )
        self._optimizer = torch.optim.AdamW(model.weights, lr=settings.lr, weight_decay=settings.weight_decay)
        self._log = StepLog(folder / LOG_FILE)
        self._step = 0
        self._updating = False
        self._seconds = 0.0
        total = sum(example.tokens for step in range(self._steps) for example in self._batch(step))
        self._progress = Progress(total)

    def resume(self, made_from: Mapping[str, Any]) -> None:
        """Take up the newest checkpoint, if there is one. Raises TrainingError for one that cannot be continued."""
        checkpoints = self._folder / CHECKPOINTS
        checkpoints.mkdir(exist_ok=True)
        discard_unusable(checkpoints, made_from)
        newest = newest_checkpoint(checkpoints)
        if newest is None:
            self._log.start([])
            return
        state = torch.load(newest / _STATE_FILE, weights_only=True)
        with torch.no_grad():
            for weight, saved in zip(self._model.weights, state["weights"], strict=True):
                weight.copy_(saved)
        self._model.refresh()
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self._step = state["step"]
        self._log.start(state["log"])
        known = sum(example.tokens for step in range(self._step) for example in self._batch(step))
        self._progress.known = self._progress.done = known

    def run(self) -> None:
        """All steps that are left. Raises TrainingError for a loss or weights that are not finite."""
        self._report(self._progress)
        every = self._settings.save_steps
        save_every = max(1, round(every if every >= 1 else every * self._steps))
        started = time.monotonic()
        with disk_full_as_error(self._folder):
            while self._step < self._steps:
                with self._saving_when_interrupted():
                    self._do_step()
                if self._step % save_every == 0 and self._step < self._steps:
                    self._save(torch.get_rng_state())
        self._seconds = time.monotonic() - started

    def result(self, model: str, *, changed: bool) -> JudgeTraining:
        """What came of it."""
        tokens = self._progress.done - self._progress.known
        replayed = sum(example.held_at is not None for example in self._examples)
        return JudgeTraining(
            base=model,
            labels=len(self._examples) - replayed,
            steps=self._steps,
            tokens=self._progress.total,
            seconds=self._seconds,
            tokens_per_second=tokens / self._seconds if self._seconds else 0.0,
            packed=self._reader.packs,
            changed=changed,
            length_effect=self._weights.length,
            settings=asdict(self._settings),
            replayed=replayed,
        )

    def _do_step(self) -> None:
        batch = self._batch(self._step)
        terms = [self._backward(group, len(batch)) for group in passes(batch, self._settings.pass_tokens)]
        norm = float(nn.utils.clip_grad_norm_(self._model.weights, self._settings.clip))
        numbers = _numbers(terms, norm)
        broken = [name for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise _not_finite(f"{', '.join(broken)} of step {self._step + 1}")
        rate = self._settings.lr * self._factor()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._updating = True
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._model.refresh()
        self._step += 1
        self._progress.done += sum(example.tokens for example in batch)
        self._log.add({"step": self._step, **numbers, "lr": rate, "tokens": self._progress.done})
        self._updating = False
        self._progress.note = f"loss {numbers['loss']:.3f}, step {self._step} of {self._steps}"
        self._report(self._progress)

    def _backward(self, group: Sequence[Example], batch: int) -> LossTerms:
        prompts = [prompt for example in group for prompt in example.prompts]
        terms = loss_of(group, read_prompts(self._reader, prompts), self._weights)
        if not terms.loss.isfinite():
            raise _not_finite(f"the loss of step {self._step + 1}")
        (terms.loss / batch).backward()  # type: ignore[no-untyped-call]
        self._model.collect_gradients()
        return terms

    def _batch(self, step: int) -> list[Example]:
        """The examples of a step. Each epoch has an order of its own, which the seed decides."""
        size, count = self._settings.batch, len(self._examples)
        epoch, place = divmod(step, math.ceil(count / size))
        generator = torch.Generator().manual_seed(self._settings.seed + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        return [self._examples[index] for index in order[place * size : (place + 1) * size]]

    def _factor(self) -> float:
        settings = self._settings
        return rate_factor(self._step, steps=self._steps, warmup=settings.warmup, schedule=settings.schedule)

    @contextmanager
    def _saving_when_interrupted(self) -> Iterator[None]:
        """Ctrl-C within a step: keep all steps before it. Amid an update the weights are neither: nothing is saved."""
        random, before = torch.get_rng_state(), self._step
        try:
            yield
        except KeyboardInterrupt:
            if self._step and not self._updating:
                self._save(random if self._step == before else torch.get_rng_state())
            raise

    def _save(self, random: Tensor) -> None:
        """Write a checkpoint, complete or not at all, and remove the one before it."""
        checkpoints = self._folder / CHECKPOINTS
        target = checkpoints / f"checkpoint-{self._step}"
        part = checkpoints / "part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        state = {
            "weights": [weight.detach() for weight in self._model.weights],
            "optimizer": self._optimizer.state_dict(),
            "random": random,
            "step": self._step,
            "log": self._log.lines,
        }
        torch.save(state, part / _STATE_FILE)
        write_whole(part / "trainer_state.json", f'{{"global_step": {self._step}}}')
        put_in_place(part, target)
        for old in checkpoints.glob("checkpoint-*"):
            if old != target:
                shutil.rmtree(old)


def _numbers(terms: Sequence[LossTerms], norm: float) -> dict[str, float]:
    """What the log says of a step: means over its examples, labels, labelled pairs and pairs held to the base."""
    labels, pairs, held = (sum(getattr(part, name) for part in terms) for name in ("labels", "pairs", "held"))
    numbers = {
        "loss": sum(float(part.loss.detach()) for part in terms) / (labels + held),
        "pair": sum(part.pair for part in terms) / max(1, pairs),
        "single": sum(part.single for part in terms) / max(1, labels),
        "mass": sum(part.mass for part in terms) / (labels + held),
        "grad_norm": norm,
    }
    if pairs:
        numbers["margin"] = sum(part.margin for part in terms) / pairs
        numbers["accuracy"] = sum(part.right for part in terms) / pairs
    if held:
        numbers["replay"] = sum(part.replay for part in terms) / held
    return numbers


def _not_finite(what: str) -> TrainingError:
    return TrainingError(
        f"{what} is NaN or infinite: training stopped, and its last good checkpoint is kept. Lower --lr or --clip, or "
        "use --dtype float32, with another --output or --overwrite"
    )

"""What we add to TRL's trainers: our learning rates, our log and progress bar, and a stop at the first NaN.

Import it only where torch, transformers and TRL are needed anyway.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from client.runs.progress import OnProgress, Progress
from client.runtime.files import write_whole
from trainer.tuning.checkpoints import TrainingError
from trainer.tuning.settings import rate_factor

# Other logged numbers may be undefined, such as an accuracy over no tokens.
_MUST_BE_FINITE: Final = ("loss", "grad_norm", "eval_loss", "train_loss")
_NOTED: Final = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


def trainer_class(name: str) -> Any:
    """TRL's trainer of that name with our schedule and loss check."""
    return type(name, (_TrainerMixin, getattr(import_module("trl"), name)), {})


class _TrainerMixin:
    # Tokens that this process has trained on, both sides of a pair.
    trained_tokens = 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Use `rate_factor`. transformers' schedules begin at 0, so a training of one step would change nothing."""
        own: Any = self
        if own.lr_scheduler is None:
            args = own.args
            schedule, warmup = args.lr_scheduler_type.value, args.warmup_steps
            factor = partial(rate_factor, steps=num_training_steps, warmup=warmup, schedule=schedule)
            own.lr_scheduler = LambdaLR(own.optimizer if optimizer is None else optimizer, factor)
            own._created_lr_scheduler = True
        return own.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raise TrainingError if the loss is NaN or infinite, before it reaches the weights."""
        own: Any = self
        parent: Any = super()
        loss: Tensor = parent.training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise _not_finite(f"the loss of step {own.state.global_step + 1} is {loss.item()}")
        inputs = args[1] if len(args) > 1 else kwargs["inputs"]
        own.trained_tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else 0
        return loss


# ARG002: transformers passes all of its arguments to every method.
class LogCallback(TrainerCallback):
    """Writes the log and reports progress, in examples (pairs): a step of the optimizer can take minutes on a CPU.

    The log is rewritten at each start, because steps after the resumed checkpoint are computed again. `examples` are
    those of an epoch, `tokens` tells how many tokens this process has trained on so far.
    """

    def __init__(self, log: Path, on_progress: OnProgress, examples: int, tokens: Callable[[], int]) -> None:
        self._log = log
        self._report = on_progress
        self._examples = examples
        self._tokens = tokens
        self._progress = Progress(0)
        self._numbers = ""
        self._micro_batches = self._evaluated = 0
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the log from what the checkpoint holds."""
        if state.is_world_process_zero:
            write_whole(self._log, "".join(map(_line, state.log_history)).encode())
            done = self._done(state)
            self._progress = Progress(round(args.num_train_epochs * self._examples), done, done)
            self._started = time.monotonic()
            self._report(self._progress)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Append the latest entry, with null for NaN and infinity. Raises TrainingError if the loss is one of them."""
        numbers = state.log_history[-1]
        bad = [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
        broken = [f"{name} is {numbers[name]} at step {state.global_step}" for name in bad if name in _MUST_BE_FINITE]
        # In place: checkpoints store log_history as JSON, which has no NaN.
        numbers.update(dict.fromkeys(bad))
        if state.is_world_process_zero:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(_line(numbers))
            self._numbers = _note(numbers) or self._numbers
        if broken:
            raise _not_finite(", ".join(broken))

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Count a micro-batch that does not end a step."""
        self._micro_batches += 1
        self._show(state, self._done(state) + self._micro_batches * args.per_device_train_batch_size * args.world_size)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002
        """Count the step. Raises TrainingError if it broke the weights, before a checkpoint would save them."""
        if not all(weights.isfinite().all() for weights in more["model"].parameters() if weights.requires_grad):
            raise _not_finite(f"step {state.global_step} made weights NaN or infinite")
        self._micro_batches = self._evaluated = 0
        self._show(state, self._done(state))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002
        """Say that an evaluation is under way: nothing is counted meanwhile."""
        self._evaluated += 1
        of = len(more["eval_dataloader"]) if more.get("eval_dataloader") is not None else "?"
        self._show(state, self._done(state), f"evaluating {self._evaluated}/{of}")

    def _done(self, state: Any) -> int:
        return round((state.epoch or 0.0) * self._examples)

    def _show(self, state: Any, done: int, doing: str = "") -> None:
        if not state.is_world_process_zero:
            return
        progress, seconds = self._progress, time.monotonic() - self._started
        # The last batch of an epoch is smaller, and an evaluation has fewer examples than its batches have room for.
        progress.done = min(done, progress.total)
        pace = f"{self._tokens() / seconds:.0f} tokens/s" if seconds > 0 else ""
        step = f"step {state.global_step}/{state.max_steps}"
        progress.note = ", ".join(filter(None, (pace, step, self._numbers, doing)))
        self._report(progress)


def _not_finite(what: str) -> TrainingError:
    return TrainingError(
        f"{what}: training stopped, and its last good checkpoint is kept. Lower --lr or --clip, or use --dtype "
        "float32, with another --output or --overwrite; if it is the first step, the model itself may hold NaN"
    )


def _line(numbers: Mapping[str, Any]) -> str:
    return json.dumps(numbers, allow_nan=False) + "\n"


def _note(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {numbers[key]:.3f}" for key, name in _NOTED.items() if numbers.get(key) is not None)

"""TRL's trainers with our learning rates, and their callback with our log and bar: both stop at the first NaN.

Imported where torch, transformers and TRL are needed anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from client.runtime.files import write_whole
from trainer.run.progress import ReportProgress, StageProgress
from trainer.tuning.settings import rate_factor
from trainer.tuning.training import TrainingError

# Others, such as an accuracy over no tokens, may have no value.
_MUST_BE_NUMBERS: Final = ("loss", "grad_norm", "eval_loss", "train_loss")


def trainer_class(name: str) -> Any:
    """TRL's trainer of that name with the methods of `_Careful`."""
    return type(name, (_Careful, getattr(import_module("trl"), name)), {})


class _Careful:
    """Mixed into a trainer of transformers'."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The rates of `rate_factor`: the library's own begin at 0, where a training of one step ends as well."""
        own: Any = self
        if own.lr_scheduler is None:
            args = own.args
            schedule, warmup = args.lr_scheduler_type.value, args.warmup_steps
            factor = partial(rate_factor, steps=num_training_steps, warmup=warmup, schedule=schedule)
            own.lr_scheduler = LambdaLR(own.optimizer if optimizer is None else optimizer, factor)
            own._created_lr_scheduler = True
        return own.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Raises TrainingError where the loss is NaN or infinite, before it reaches the weights."""
        own: Any = self
        parent: Any = super()
        loss: Tensor = parent.training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise _not_a_number(f"the loss of step {own.state.global_step + 1} is {loss.item()}")
        return loss


def _not_a_number(what: str) -> TrainingError:
    return TrainingError(
        f"{what}: training stopped, and its last good checkpoint is kept. Lower --lr or --clip, or take --dtype "
        "float32, with another --output or --overwrite; where it is the first step, the model itself may hold NaN"
    )


# ARG002: the library passes all of it to each of the methods.
class Watcher(TrainerCallback):
    """Writes the log anew at each start: what the checkpoint does not know of is computed again."""

    def __init__(self, log: Path, tell: ReportProgress) -> None:
        self._log = log
        self._tell = tell
        self._advance = StageProgress(0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start from what the checkpoint holds."""
        if state.is_world_process_zero:
            write_whole(self._log, "".join(map(_line, state.log_history)).encode())
            self._advance = StageProgress(state.max_steps, state.global_step, state.global_step)
            self._tell(self._advance)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Append what was logged just now, with null for NaN and infinity. Raises TrainingError."""
        numbers = state.log_history[-1]
        bad = [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
        broken = [f"{name} is {numbers[name]} at step {state.global_step}" for name in bad if name in _MUST_BE_NUMBERS]
        # In the trainer's own state, which checkpoints hold as JSON.
        numbers.update(dict.fromkeys(bad))
        if state.is_world_process_zero:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))
            self._advance.note = _note(state.log_history[-1]) or self._advance.note
        if broken:
            raise _not_a_number(", ".join(broken))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: ARG002
        """Count the step. Raises TrainingError where it broke the weights, before a checkpoint would hold them."""
        if not all(weights.isfinite().all() for weights in more["model"].parameters() if weights.requires_grad):
            raise _not_a_number(f"step {state.global_step} made weights NaN or infinite")
        if state.is_world_process_zero:
            self._advance.done = state.global_step
            self._tell(self._advance)


def _line(numbers: Mapping[str, Any]) -> str:
    return json.dumps(numbers, allow_nan=False) + "\n"


def _note(numbers: Mapping[str, Any]) -> str:
    shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    return ", ".join(f"{name} {numbers[key]:.3f}" for key, name in shown.items() if numbers.get(key) is not None)

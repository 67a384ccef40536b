"""How much of what training changed survives rounding in a merged model.

A base's weights already lie on the grid of their 16-bit format, and a LoRA at a small learning rate often changes them
by less than half a step. Rounding to bfloat16 keeps such changes (stochastic.py), unless they are so small that hardly
a weight of a matrix moves; rounding to float16 does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.policy.models import DType, resolve_model
from trainer.run.files import write_json
from trainer.run.model_files import TensorFiles, same_weights
from trainer.tuning.merging import is_whole_model, merge

if TYPE_CHECKING:
    from torch import Tensor

MERGE_FILE: Final = "merge.json"
# Matrices to measure on, evenly spaced: a large model has hundreds, and they round alike.
MATRICES: Final = 8
# A smaller share of the update is worth a warning; DPO of SmolLM2-135M at --lr 2e-4 kept 72 to 74% of it.
ENOUGH: Final = 0.9
_ADVICE: Final = "raise --lr, or give --merge-dtype float32 --dtype float32, and serve it in float32"
_PREFIX: Final = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def merge_and_measure(trained: Path, output: Path, base: str, dtype: DType, tokenizer: Any = None) -> str | None:
    """Merge, write merge.json beside `output`, and return a warning if rounding undid much or all of the training.

    `tokenizer`: see `merge`.
    """
    merge(trained, output, base=base, dtype=dtype, tokenizer=tokenizer)
    source = resolve_model(base)
    kept, changed = kept_update(source, trained, output), not same_weights(source, output)
    write_json(output.with_name(MERGE_FILE), {"dtype": dtype, "kept_update": kept, "changed": changed})
    if not changed:
        return f"rounded to {dtype}, the merged model is its base: nothing of the training is left: {_ADVICE}"
    if kept is None or kept >= ENOUGH:
        return None
    return f"rounded to {dtype}, the merged model keeps {100 * kept:.0f}% of what was trained: {_ADVICE}"


def kept_update(base: Path, trained: Path, merged: Path) -> float | None:
    """<merged - base, update> / <update, update> over MATRICES of the trained matrices; 1 means that all of it is kept.

    `trained` is a LoRA adapter or a whole model; all three are folders. None if the files name their tensors
    differently, the adapter's update is not a plain product (DoRA), or nothing was changed.
    """
    try:
        with TensorFiles(base) as before, TensorFiles(trained) as tuned, TensorFiles(merged) as after:
            whole = is_whole_model(trained)
            updates = _updates_of_model(before, tuned) if whole else _updates_of_lora(trained, tuned)
            dot = square = 0.0
            for name, update in updates.items():
                rounded = after[name]
                # A base stored in a finer format is rounded as well wherever it is used in this one.
                kept = rounded.float() - before[name].to(rounded.dtype).float()
                dot += float((kept * update).sum())
                square += float((update * update).sum())
    except (OSError, ValueError, KeyError, RuntimeError):
        return None
    return dot / square if square else None


def _updates_of_lora(folder: Path, adapter: TensorFiles) -> Mapping[str, Tensor]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_bytes())
    if config.get("use_dora"):
        return {}
    layers = [name.removesuffix(_A) for name in sorted(adapter.names) if name.endswith(_A)]
    return {f"{layer.removeprefix(_PREFIX)}.weight": _product(layer, adapter, config) for layer in _spread(layers)}


def _product(layer: str, adapter: TensorFiles, config: Mapping[str, Any]) -> Tensor:
    """What LoRA adds to a layer: B A alpha / r, or alpha / sqrt(r) if the adapter is rank-stabilised."""
    a, b = adapter[layer + _A].float(), adapter[layer + _B].float()
    patterns = config.get("alpha_pattern") or {}
    alphas = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha, rank = next(alphas, config["lora_alpha"]), len(a)
    product: Tensor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * (b @ a)
    return product


def _updates_of_model(base: TensorFiles, model: TensorFiles) -> Mapping[str, Tensor]:
    names = sorted(name for name in model.names if ".layers." in name and "norm" not in name)
    return {name: model[name].float() - base[name].float() for name in _spread(names)}


def _spread(names: list[str]) -> list[str]:
    """MATRICES of the names, evenly spaced."""
    step = max(1, len(names) // MATRICES)
    return names[step // 2 :: step][:MATRICES]

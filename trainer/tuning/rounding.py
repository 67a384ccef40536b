"""How much of what training changed is left in a merged model after its weights were rounded.

bfloat16 has 8 significant bits, and a base's weights already lie on its grid: a change of less than half a step in a
weight is lost whole, while the change of a LoRA at a small learning rate is often no larger. For weights of standard
deviation 0.05, random changes of 1e-4 keep 80% of their length in their own direction, those of 3e-5 a third.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.merge import merge
from trainer.policy.models import DType, resolve_model
from trainer.policy.weights import TensorFiles, same_weights
from trainer.run.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

MERGE_FILE: Final = "merge.json"
MATRICES: Final = 8
# Below this share of the update, rounding has undone too much of the training to be silent about it.
ENOUGH: Final = 0.9
_ADVICE: Final = "raise --lr, or give --merge-dtype float32 --dtype float32, and serve it in float32"
_PREFIX: Final = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


def merge_and_weigh(trained: Path, output: Path, base: str, dtype: DType) -> str | None:
    """Merge, and write merge.json beside `output`; a warning where rounding took much of the training, or all of it."""
    merge(trained, output, base=base, dtype=dtype)
    source = resolve_model(base)
    kept, changed = kept_update(source, trained, output), not same_weights(source, output)
    write_json(output.with_name(MERGE_FILE), {"dtype": dtype, "kept_update": kept, "changed": changed})
    if not changed:
        return f"rounded to {dtype}, the merged model is its base: nothing of the training is left: {_ADVICE}"
    if kept is None or kept >= ENOUGH:
        return None
    return f"rounded to {dtype}, the merged model keeps {100 * kept:.0f}% of what was trained: {_ADVICE}"


def kept_update(base: Path, trained: Path, merged: Path) -> float | None:
    """<merged - base, update> / <update, update>, over MATRICES of the trained matrices, evenly spaced; 1 is all of it.

    `trained` is a LoRA adapter or a whole model; all are folders. None where the files do not name their tensors alike,
    the adapter is of a kind whose update is no plain product (DoRA), or nothing was changed.
    """
    try:
        with TensorFiles(base) as first, TensorFiles(trained) as other, TensorFiles(merged) as last:
            whole = (trained / "config.json").is_file()
            updates = _updates_of_model(first, other) if whole else _updates_of_lora(trained, other)
            dot = square = 0.0
            for name, update in updates.items():
                left = last[name]
                # A base that is kept in a finer format is rounded too wherever it is used in this one.
                kept = left.float() - first[name].to(left.dtype).float()
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
    """What LoRA adds to a layer: B A alpha / r, or by the root of r where the adapter is rank-stabilised."""
    first, second = adapter[layer + _A].float(), adapter[layer + _B].float()
    patterns = config.get("alpha_pattern") or {}
    own = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), None)
    rank = len(first)
    scale = (config["lora_alpha"] if own is None else own) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    product: Tensor = scale * (second @ first)
    return product


def _updates_of_model(base: TensorFiles, model: TensorFiles) -> Mapping[str, Tensor]:
    names = sorted(name for name in model.names if ".layers." in name and "norm" not in name)
    return {name: model[name].float() - base[name].float() for name in _spread(names)}


def _spread(names: list[str]) -> list[str]:
    step = max(1, len(names) // MATRICES)
    return names[step // 2 :: step][:MATRICES]

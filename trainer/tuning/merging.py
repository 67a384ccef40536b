"""Merging an adapter into its base: one folder with weights, tokenizer, chat template, generation config, model card.

The sum is computed in fp32 and rounded once, to the dtype asked for: to bfloat16 by chance, which keeps small updates
(stochastic.py). An adapter trained on an NF4 base (QLoRA) is merged into the base as it was before quantisation.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from client.chat import turn_end
from trainer.errors import ModelError, StageError
from trainer.policy.models import DType, load_model, needs_trainer, quiet_libraries, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.files import put_in_place
from trainer.run.model_files import TensorFiles
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.checkpoints import disk_full_as_error
from trainer.tuning.stochastic import round_to_bfloat16

# How far logits may be off after merging in fp32: a share of what the adapter does to them, plus a share of their size.
_TOLERANCE_OF_EFFECT: Final = 0.01
_TOLERANCE_OF_SCALE: Final = 1e-4
_PROBE_TEXTS: Final = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 2))",
)
_PROBE_IDS: Final = 32


class MergeError(StageError):
    """The merged model does not say what base and adapter say together; nothing of it is kept."""


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: DType = "bfloat16",
    numbers: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write the merged model to the folder `output`, replacing it only once the new one is complete.

    `adapter` may also be a fully fine-tuned model, which is only rounded. `base` is a folder or hub id; by default the
    one that the adapter names. `dtype` auto is the base's own. `numbers` go into the model card (see `model_card`).
    `tokenizer` is saved with the model; None: the adapter's, or the base's, always with a chat template.
    Layers that are tied in the base but changed apart by the adapter are saved as two. On a few prompts the sum's
    logits are compared with those of base and adapter, and the saved files' logits with those of the rounded sum.

    Needs memory for the model in fp32. Raises ModelError, MergeError for NaN weights or deviating logits,
    TrainingError for a full disk, ImportError.
    """
    with needs_trainer():
        import torch
    full = is_whole_model(adapter)
    base_name = base or (str(adapter) if full else base_of(adapter))
    source = adapter if full else resolve_model(base_name)
    if tokenizer is None:
        tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else source)
    part = output.with_name(f"{output.name}.part")
    config = _config(source)
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{source} is quantised, so no adapter can be added to its weights. Give --base the model it was made from"
        )
    with quiet_libraries():
        model = load_model(source, torch.float32)
        probes = _probes(tokenizer, model)
        if not full:
            model = _with_adapter(model, adapter, source, probes)
        target = getattr(torch, _stored_dtype(config) if dtype == "auto" else dtype)
        _round(model, target)
        _require_finite(model, adapter)
        _save(model, tokenizer, part, model_card(output.name, base_name, numbers or {}))
        expected = _logits(model.float(), probes)
        del model
        _check(_logits(load_model(part, torch.float32), probes), expected, expected, part)
    put_in_place(part, output)
    return output


def is_whole_model(folder: Path) -> bool:
    """Whether the folder holds a model rather than an adapter."""
    return (folder / "config.json").is_file()


def base_of(adapter: Path) -> str:
    """The folder or hub id of the base that an adapter names. Raises ModelError."""
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{adapter} has no adapter_config.json: give an adapter's folder, as trainer.dpo writes it")
    base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{file} names no base: give it with --base")
    return str(base)


def _with_adapter(model: Any, adapter: Path, source: Path, probes: Sequence[Any]) -> Any:
    """The sum of model and adapter in fp32. Raises MergeError unless it gives the logits of both together."""
    from peft import PeftModel

    without = _logits(model, probes)
    _resize_embeddings(model, adapter)
    try:
        with warnings.catch_warnings():
            # PEFT warns about tied layers; `_untie_adapted` takes care of them.
            warnings.filterwarnings("ignore", message="Model with `tie_word|Input and output embeddings are no longer")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            tuned: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
            together = _logits(tuned, probes)
            _untie_adapted(tuned)
            merged = tuned.merge_and_unload()
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, UserWarning) as error:
        raise ModelError(f"the adapter in {adapter} does not fit {source}, or cannot be merged: {error}") from error
    _require_finite(merged, adapter)
    _check(_logits(merged, probes), together, without, adapter)
    return merged


def _probes(tokenizer: Any, model: Any) -> list[Any]:
    """Token ids to compare logits on, [1, tokens] each: a few texts, and ids from the whole vocabulary."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in _PROBE_TEXTS]
    return [*texts, torch.linspace(0, vocabulary - 1, _PROBE_IDS).long()[None]]


def _logits(model: Any, probes: Sequence[Any]) -> Any:
    """[tokens of all probes, vocabulary], in fp32."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=ids).logits[0].float() for ids in probes])


def _check(logits: Any, expected: Any, without: Any, where: Path) -> None:
    """Raise MergeError if logits deviate from `expected` by more than fp32 explains; `without`: no adapter."""
    columns = min(logits.shape[1], expected.shape[1], without.shape[1])
    logits, expected, without = (each[:, :columns] for each in (logits, expected, without))
    off = float((logits - expected).abs().max())
    effect, scale = float((expected - without).abs().max()), float(expected.abs().max())
    allowed = _TOLERANCE_OF_EFFECT * effect + _TOLERANCE_OF_SCALE * scale
    if not off <= allowed:  # not `off > allowed`, which NaN would pass
        raise MergeError(
            f"{where}: merged, the logits are off by {off:.3g}, but rounding explains only {allowed:.3g}: nothing is "
            "kept. Serve base and adapter unmerged, or train other layers (target_modules)"
        )


def _resize_embeddings(model: Any, adapter: Path) -> None:
    """Give the embeddings as many rows as the adapter's own, which has more if tokens were added in training."""
    with TensorFiles(adapter) as files:
        sizes = {files[name].shape[0] for name in files.names if name.endswith(("embed_tokens.weight", "wte.weight"))}
    if len(sizes) == 1 and (size := sizes.pop()) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)


def _untie_adapted(tuned: Any) -> None:
    """Give each adapted layer its own copy of tied weights, so that the update does not reach the layer tied to it."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(weight) for module in tuned.modules() for weight in module.parameters(recurse=False))
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module.get_base_layer()
            for name, weight in layer.named_parameters(recurse=False):
                if owners[id(weight)] > 1:
                    setattr(layer, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))


def _round(model: Any, target: Any) -> None:
    """Round the parameters in place; buffers, such as rotary frequencies, stay in fp32.

    By chance only matrices, and not the embeddings: adapters leave those alone, and some bases store them in fp32.
    """
    import torch

    embeddings = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        by_chance = target == torch.bfloat16 and weight.dim() > 1 and weight is not embeddings
        weight.data = round_to_bfloat16(weight.data, name) if by_chance else weight.data.to(target)


def _require_finite(model: Any, trained: Path) -> None:
    """Raise MergeError if a weight is NaN or infinite."""
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise MergeError(
            f"{trained}: merged, {broken} holds NaN or infinity: train again with a lower --lr, or from a model "
            "without them. float16 ends at 65504: use --dtype bfloat16"
        )


def _stored_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a model's configuration says it is stored in, or float32."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return config


def _save(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    """Write a model with all that belongs to it. Raises TrainingError."""
    shutil.rmtree(folder, ignore_errors=True)
    _declare_untied(model)
    with disk_full_as_error(folder.parent):
        folder.mkdir(parents=True)
        model.config.use_cache = True
        _add_end_of_turn(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _add_end_of_turn(model: Any, tokenizer: Any) -> None:
    """Make whatever serves the model also stop where its chat template ends a turn."""
    stated = model.generation_config.eos_token_id
    known = stated if isinstance(stated, list) else [] if stated is None else [stated]
    missing = sorted(turn_end(tokenizer).ids.difference([*known, tokenizer.eos_token_id]))
    if missing:
        model.generation_config.eos_token_id = [*(known or [tokenizer.eos_token_id]), *missing]


def _declare_untied(model: Any) -> None:
    """Have transformers save both layers if an adapter on one of two tied layers has made them differ."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False

"""An adapter and its base become one folder: weights, tokenizer, chat template, generation settings, model card.

The product is added in fp32 and rounded once, to the dtype asked for. An adapter of a base in NF4 (QLoRA) is merged
into the base as it was before quantisation. Nothing is pushed anywhere unless --push-to-hub says where.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m trainer.merge", "trainer")

import argparse
import json
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from client.chat import turn_end
from trainer.errors import InputError, ModelError, StageError
from trainer.policy.models import DTYPES, DType, load_model, needs_trainer, quiet_libraries, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.policy.weights import TensorFiles, same_weights
from trainer.programs import run_program, stderr_console
from trainer.run.files import put_in_place
from trainer.run.progress import echo
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.training import disk_full_said


class MergeError(StageError):
    """What came of a merge is not what base and adapter say together; nothing of it is kept."""


# Of what an adapter does to the logits, and of the logits themselves: what merging in fp32 may be off by.
_OFF_BY_EFFECT: Final = 0.01
_OFF_BY_SCALE: Final = 1e-4
_PROBES: Final = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 2))",
)
_PROBE_IDS: Final = 32


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: DType = "bfloat16",
    numbers: Mapping[str, Any] | None = None,
) -> Path:
    """Write the merged model to the folder `output`, which is there only when it is complete; what was there goes.

    A fully fine-tuned model in the place of the adapter is only rounded. `base` is a folder or a hub id, by default
    what the adapter itself names. `numbers` go into the model card: see `model_card`. dtype `auto` is the base's own.
    Layers that are tied in the base and that the adapter tells apart are saved as two. On a few prompts the logits of
    the sum are checked against those of base and adapter, and those of the saved files against the rounded sum.

    Needs memory for the model in fp32. Raises ModelError, MergeError for weights that are NaN and for logits that are
    off, TrainingError where there is no room to write, ImportError.
    """
    with needs_trainer():
        import torch
    full = (adapter / "config.json").is_file()
    first = base or (str(adapter) if full else _base_of(adapter))
    source = adapter if full else resolve_model(first)
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else source)
    part = output.with_name(f"{output.name}.part")
    if _config(source).get("quantization_config") is not None:
        raise ModelError(
            f"{source} is quantised: its weights take no adapter. Give --base the model that it was made of"
        )
    with quiet_libraries():
        model = load_model(source, torch.float32)
        probes = _probes(tokenizer, model)
        if not full:
            model = _with_adapter(model, adapter, source, probes)
        own = getattr(torch, _stored_dtype(source) if dtype == "auto" else dtype)
        for weight in model.parameters():  # buffers, such as rotary frequencies, stay in fp32
            weight.data = weight.data.to(own)
        _require_numbers(model, adapter)
        _save(model, tokenizer, part, model_card(output.name, first, numbers or {}))
        expected = _logits(model.float(), probes)
        del model
        _check(_logits(load_model(part, torch.float32), probes), expected, expected, part)
    put_in_place(part, output)
    return output


def _with_adapter(model: Any, adapter: Path, source: Path, probes: Any) -> Any:
    """The sum of model and adapter in fp32, which gives the logits of both together."""
    from peft import PeftModel

    without = _logits(model, probes)
    _make_room(model, adapter)
    try:
        with warnings.catch_warnings():
            # What they warn of is what is seen to here.
            warnings.filterwarnings("ignore", message="Model with `tie_word|Input and output embeddings are no longer")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            tuned: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
            together = _logits(tuned, probes)
            _untie_adapted(tuned)
            merged = tuned.merge_and_unload()
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, UserWarning) as error:
        raise ModelError(f"the adapter in {adapter} does not fit {source}, or cannot be merged: {error}") from error
    _require_numbers(merged, adapter)
    _check(_logits(merged, probes), together, without, adapter)
    return merged


def _probes(tokenizer: Any, model: Any) -> list[Any]:
    """Token ids to compare logits on, [1, tokens] each: a few texts, and ids from the whole vocabulary."""
    import torch

    rows = model.get_input_embeddings().weight.shape[0]
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in _PROBES]
    return [*texts, torch.linspace(0, rows - 1, _PROBE_IDS).long()[None]]


def _logits(model: Any, probes: Sequence[Any]) -> Any:
    """[tokens of all probes, vocabulary], in fp32."""
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=ids).logits[0].float() for ids in probes])


def _check(found: Any, expected: Any, without: Any, where: Path) -> None:
    """Raise MergeError where logits differ from the expected by more than fp32 explains; `without` the adapter."""
    columns = min(found.shape[1], expected.shape[1], without.shape[1])
    found, expected, without = (logits[:, :columns] for logits in (found, expected, without))
    off = float((found - expected).abs().max())
    allowed = _OFF_BY_EFFECT * float((expected - without).abs().max()) + _OFF_BY_SCALE * float(expected.abs().max())
    if not off <= allowed:
        raise MergeError(
            f"{where}: merged, the logits are off by {off:.3g}, and rounding explains {allowed:.3g}: nothing is kept. "
            "Serve base and adapter unmerged, or train on other layers (target_modules)"
        )


def _make_room(model: Any, adapter: Path) -> None:
    """Give the embeddings as many rows as the adapter's own, for tokens that were added in training."""
    with TensorFiles(adapter) as files:
        rows = {files[name].shape[0] for name in files.names if name.endswith(("embed_tokens.weight", "wte.weight"))}
    if len(rows) == 1 and (count := rows.pop()) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(count, mean_resizing=False)


def _untie_adapted(tuned: Any) -> None:
    """Give each layer that the adapter changes weights of its own: what is added must not reach a layer tied to it."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(weight) for module in tuned.modules() for weight in module.parameters(recurse=False))
    for layer in tuned.modules():
        if isinstance(layer, BaseTunerLayer):
            own: Any = layer.get_base_layer()
            for name, weight in own.named_parameters(recurse=False):
                if owners[id(weight)] > 1:
                    setattr(own, name, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))


def _require_numbers(model: Any, trained: Path) -> None:
    """Raise MergeError where a weight is NaN or infinite."""
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise MergeError(
            f"{trained}: merged, {broken} holds NaN or infinity: train it again with a lower --lr, or from a model "
            "without (in float16, which ends at 65504: take --dtype bfloat16)"
        )


def _stored_dtype(folder: Path) -> str:
    """The dtype that a model's configuration says it is stored in; float32 where it says none."""
    config = _config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _config(folder: Path) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return known


def _base_of(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ModelError(
            f"{adapter} has no adapter_config.json: give the folder of an adapter, as trainer.dpo writes it"
        )
    named = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{file} names no base: give it with --base")
    return str(named)


def _save(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    """Write a model with all that belongs to it. Raises TrainingError."""
    shutil.rmtree(folder, ignore_errors=True)
    _untie_where_apart(model)
    with disk_full_said(folder.parent):
        folder.mkdir(parents=True)
        model.config.use_cache = True
        _name_ends(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _name_ends(model: Any, tokenizer: Any) -> None:
    """Have whoever serves the model stop where its chat template ends a turn, too."""
    stated = model.generation_config.eos_token_id
    known = stated if isinstance(stated, list) else [] if stated is None else [stated]
    missing = sorted(turn_end(tokenizer).ids.difference([*known, tokenizer.eos_token_id]))
    if missing:
        model.generation_config.eos_token_id = [*(known or [tokenizer.eos_token_id]), *missing]


def _untie_where_apart(model: Any) -> None:
    """An adapter on only one of two tied layers takes them apart; then both must be saved and stay two."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False


def push_to_hub(folder: Path, repo: str, *, private: bool = True) -> str:
    """Upload an adapter or a model to a repository of the hub, which is made where it is missing; its address.

    The token is HF_TOKEN's, or the one that `hf auth login` stored. Raises ModelError.
    """
    with needs_trainer():
        from huggingface_hub import HfApi
    hub = HfApi()
    try:
        made = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by judge-as-api")
    except Exception as error:  # of several libraries' making, as when downloading
        raise ModelError(
            f"{folder} could not be pushed to {repo} ({type(error).__name__}: {error}); it is complete here. Set "
            "HF_TOKEN to a token with write access, and push again"
        ) from error
    return str(made)


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; see trainer.programs.run_program for the exit codes."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    console = stderr_console()
    output = args.output or args.adapter.with_name("merged")
    if output.exists() and not args.overwrite:
        raise InputError(f"{output} exists: give another --output, or --overwrite")
    numbers = {path.stem: _json(path) for path in args.numbers or _numbers_beside(args.adapter)}
    with console.status(f"merging {args.adapter}"):
        merge(args.adapter, output, base=args.base, dtype=args.dtype, numbers=numbers)
    base = args.base or (None if (args.adapter / "config.json").is_file() else _base_of(args.adapter))
    if base is not None and same_weights(resolve_model(base), output):
        echo(f"warning: {output} has the weights of {base}: nothing of the training is left in {args.dtype}")
    sys.stdout.write(f"{output}\n")
    if args.push_to_hub:
        folder = args.adapter if args.push == "adapter" else output
        sys.stdout.write(f"{push_to_hub(folder, args.push_to_hub, private=not args.public)}\n")


def _numbers_beside(adapter: Path) -> list[Path]:
    """What the stages before left next to the adapter."""
    names = ("pairs_stats.json", "dpo.json", "sft.json", "metrics.json")
    return [adapter.parent / name for name in names if (adapter.parent / name).is_file()]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.merge",
        description="Merge an adapter into its base: a folder that transformers, vLLM and the service load. A fully "
        "fine-tuned model is taken too, and only rounded.",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the folder of an adapter, or of a whole model")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="the model's folder (default: merged, beside ADAPTER)"
    )
    parser.add_argument("--base", help="a folder or hub id (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the saved weights; auto is the base's (default: bfloat16)",
    )
    parser.add_argument(
        "--numbers",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="what the model card shows (default: pairs_stats.json, dpo.json, sft.json, metrics.json beside ADAPTER)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    group = parser.add_argument_group("hub", "Nothing is pushed without --push-to-hub.")
    group.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload there (default: no)")
    group.add_argument("--push", choices=("model", "adapter"), default="model", help="what of it (default: model)")
    group.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    return parser


if __name__ == "__main__":
    program.finish(main)

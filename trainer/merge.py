"""An adapter and its base become one folder: weights, tokenizer, chat template, generation settings, model card.

The product is added in fp32 and rounded once, to the dtype asked for. An adapter of a base in NF4 (QLoRA) is merged
into the base as it was before quantisation. Nothing is pushed anywhere unless --push-to-hub says where.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client import program

    program.begin("python -m trainer.merge", "trainer")

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.card import CARD_FILE, model_card
from trainer.models import (
    DTYPES,
    DType,
    ModelError,
    load_model,
    load_tokenizer,
    needs_trainer,
    put_in_place,
    quiet_libraries,
    resolve_model,
)
from trainer.programs import InputError, run_program, stderr_console
from trainer.training import disk_full_said


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
    Needs memory for the model in fp32. Raises ModelError, TrainingError where there is no room to write, ImportError.
    """
    with needs_trainer():
        import torch
        from peft import PeftModel
    full = (adapter / "config.json").is_file()
    first = base or (str(adapter) if full else _base_of(adapter))
    source = adapter if full else resolve_model(first)
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else source)
    with quiet_libraries():
        model = load_model(source, torch.float32)
        if not full:
            try:
                tuned: Any = PeftModel.from_pretrained(model, str(adapter))
            except (OSError, ValueError, RuntimeError) as error:
                raise ModelError(f"the adapter in {adapter} does not fit {source}: {error}") from error
            model = tuned.merge_and_unload(safe_merge=True)
    own = _stored_dtype(source) if dtype == "auto" else dtype
    return save_model(model.to(getattr(torch, own)), tokenizer, output, model_card(output.name, first, numbers or {}))


def _stored_dtype(folder: Path) -> str:
    """The dtype that a model's configuration says it is stored in; float32 where it says none."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _base_of(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    if not file.is_file():
        raise ModelError(
            f"{adapter} has no adapter_config.json: give the folder of an adapter, as trainer.dpo writes it"
        )
    return str(json.loads(file.read_text("utf-8"))["base_model_name_or_path"])


def save_model(model: Any, tokenizer: Any, output: Path, card: str) -> Path:
    """Write a model with all that belongs to it, complete or not at all. Raises TrainingError."""
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _untie_where_apart(model)
    with disk_full_said(output.parent), quiet_libraries():
        part.mkdir(parents=True)
        model.config.use_cache = True
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / CARD_FILE).write_text(card, encoding="utf-8")
    put_in_place(part, output)
    return output


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

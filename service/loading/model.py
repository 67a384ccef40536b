"""A model before its weights are loaded: its tokenizer, its fingerprint, its longest prompt. Local files only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from service.engine.fake import fake_tokenizer
from service.models import resolve as models
from service.models.manifest import ModelError
from service.models.tokenizers import load_tokenizer
from service.settings import CommonSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = structlog.get_logger(__name__)

FAKE_MODEL: Final = "fake"
FAKE_MAX_TOKENS: Final = 4096
# For models that state no limit (recurrent ones).
UNLIMITED_MAX_TOKENS: Final = 8192
_UNSERVED: Final = (
    "modules_to_save",
    "use_dora",
    "alpha_pattern",
    "rank_pattern",
    "lora_bias",
    "trainable_token_indices",
)


@dataclass(frozen=True, slots=True)
class Model:
    """What the HTTP side needs to know of a model; no weights.

    `tokenizer` is None for an upstream server that tokenizes itself: prompts are then sent as text, and `max_tokens`,
    the longest prompt, is an estimate. `folder` holds the local files, if there are any; `note` is a remark for users.
    """

    id: str
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase | None
    max_tokens: int
    folder: Path | None = None
    note: str | None = None


def find_local_model(settings: CommonSettings) -> Model:
    """The model whose files are on this machine, or are fetched to it now. Raises ModelError."""
    if settings.model is None and settings.engine == "fake":
        return Model(FAKE_MODEL, FAKE_MODEL, fake_tokenizer(), settings.max_tokens or FAKE_MAX_TOKENS)
    files = models.resolve(settings.model or models.DEFAULT_MODEL)
    limit = context_length(files.path)
    if settings.engine == "vllm" and settings.task != "classify":
        limit -= 1  # vLLM counts the label as a generated token
    max_tokens = min(settings.max_tokens or limit, limit)
    log.info("model found", folder=str(files.path))
    model = Model(files.id, files.fingerprint, load_tokenizer(files.path), max_tokens, files.path, files.note)
    return model if settings.lora is None else _with_adapter(model, *settings.lora.split("=", 1))


def context_length(folder: Path) -> int:
    """The longest prompt, in tokens, according to the model's config.json."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    return int(config.get("max_position_embeddings") or UNLIMITED_MAX_TOKENS)


def _with_adapter(model: Model, name: str, folder: str) -> Model:
    """The model with a LoRA adapter, which gives it a name and a fingerprint of its own.

    Raises ModelError if `folder` holds no adapter, or one that vLLM would serve only in part or fail on at the first
    request.
    """
    path = Path(folder).expanduser()
    config = path / "adapter_config.json"
    if not config.is_file():
        raise ModelError(f"{path} has no adapter_config.json: --lora needs the folder of an adapter that PEFT saved")
    if unserved := _unserved(json.loads(config.read_bytes())):
        raise ModelError(
            f"{path}: vLLM does not serve an adapter with {', '.join(unserved)} beside its base: merge the two with "
            f"`python -m trainer.merge {path}` and serve the result"
        )
    parts = [model.fingerprint.encode(), config.read_bytes(), models.fingerprint(path).encode()]
    fingerprint = sha256(b"\0".join(parts)).hexdigest()[: len(model.fingerprint)]
    return replace(model, id=name, fingerprint=fingerprint)


def _unserved(config: Mapping[str, Any]) -> list[str]:
    """The parts of an adapter that vLLM does not apply. It ignores some silently, such as per-layer scales."""
    targets = config.get("target_modules") or ()
    unserved = [name for name in _UNSERVED if config.get(name)]
    unserved += [name for name in ("lm_head", "embed_tokens") if not isinstance(targets, str) and name in targets]
    return unserved + (["bias"] if config.get("bias", "none") != "none" else [])

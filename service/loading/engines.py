"""From settings to a model: its files and tokenizer at once, its engine and scheduler when a worker wants them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from service.engine.contract import Engine
from service.engine.fake import FakeEngine, fake_tokenizer
from service.models import resolve as models
from service.models.manifest import ModelError
from service.models.tokenizers import load_tokenizer
from service.settings import CommonSettings, FakeSettings, ModelSettings, TorchSettings, VllmSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = structlog.get_logger(__name__)

FAKE_MODEL = "fake"
FAKE_MAX_TOKENS = 4096
# For models that state no limit (recurrent ones).
UNLIMITED_MAX_TOKENS = 8192
_UNSERVED = ("modules_to_save", "use_dora", "alpha_pattern", "rank_pattern", "lora_bias", "trainable_token_indices")


@dataclass(frozen=True, slots=True)
class Model:
    """A model before its weights are loaded: what the HTTP side has to know of it.

    `tokenizer` is None where a server tokenizes: its prompts are text.
    """

    id: str
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase | None
    max_tokens: int
    folder: Path | None = None
    note: str | None = None


def check_engine(settings: ModelSettings) -> None:
    """Raises ValueError where the package that runs the model is missing: before the model is fetched."""
    if settings.engine in ("torch", "vllm") and find_spec(settings.engine) is None:
        raise ValueError(
            f"--engine {settings.engine} needs {settings.engine}, which is not installed: "
            f"pip install 'judge-as-api[{settings.engine}]', or take another --engine"
        )


def find_model(settings: CommonSettings) -> Model:
    """Resolve the model, fetching it where need be, and load its tokenizer."""
    model = _find_model(settings)
    if settings.task == "classify":
        # The same files read as something else are another judge, whose numbers must not be taken for the first one's.
        return replace(model, fingerprint=f"{model.fingerprint}-classify")
    return model


def _find_model(settings: CommonSettings) -> Model:
    if settings.lora is not None and settings.engine != "vllm":
        raise ValueError(f"--lora needs --engine vllm: the engine {settings.engine} runs no adapters")
    if settings.engine == "upstream":
        from service.loading.upstream import find_upstream  # here: it builds on this module

        return find_upstream(settings)
    if settings.model is None and settings.engine == "fake":
        return Model(FAKE_MODEL, FAKE_MODEL, fake_tokenizer(), settings.max_tokens or FAKE_MAX_TOKENS)
    files = models.resolve(settings.model or models.DEFAULT_MODEL)
    longest = context_length(files.path)
    if settings.engine == "vllm" and settings.task != "classify":
        longest -= 1  # it counts the label as a token that is written
    max_tokens = min(settings.max_tokens or longest, longest)
    model = Model(files.id, files.fingerprint, load_tokenizer(files.path), max_tokens, files.path, files.note)
    return model if settings.lora is None else _with_adapter(model, *settings.lora.split("=", 1))


def _with_adapter(model: Model, name: str, folder: str) -> Model:
    """The model as the adapter changes it: another judge.

    Raises ModelError where there is no adapter, and for one of which vLLM would pass over a part, or fail at the first
    request.
    """
    path = Path(folder).expanduser()
    config = path / "adapter_config.json"
    if not config.is_file():
        raise ModelError(f"{path} has no adapter_config.json: --lora needs the folder of an adapter that PEFT saved")
    if unserved := _unserved(json.loads(config.read_bytes())):
        raise ModelError(
            f"{path}: vLLM does not serve an adapter with {', '.join(unserved)} beside its base: make a model of both, "
            f"python -m trainer.merge {path}, and serve that"
        )
    parts = [model.fingerprint.encode(), config.read_bytes(), models.fingerprint(path).encode()]
    fingerprint = sha256(b"\0".join(parts)).hexdigest()[: len(model.fingerprint)]
    return replace(model, id=name, fingerprint=fingerprint)


def _unserved(config: Mapping[str, Any]) -> list[str]:
    """What of an adapter vLLM knows no place for; scales of single layers are among what it ignores without a word."""
    targets = config.get("target_modules") or ()
    found = [name for name in _UNSERVED if config.get(name)]
    found += [name for name in ("lm_head", "embed_tokens") if not isinstance(targets, str) and name in targets]
    return found + (["bias"] if config.get("bias", "none") != "none" else [])


def load_engine(settings: CommonSettings, model: Model) -> Engine:
    """Load the model's weights into the engine that the settings name, for the judge's task.

    Raises ValueError for an engine that cannot do what the judge needs.
    """
    started = time.monotonic()
    engine = _load_engine(settings, model)
    info = engine.info
    log.info(
        "model loaded",
        model=model.id,
        engine=info.engine,
        dtype=info.dtype,
        rung=info.executor.rung,
        digest=info.executor.digest,
        stable="not checked" if info.executor.stable is None else info.executor.stable,
        seconds=round(time.monotonic() - started, 1),
    )
    return engine


def _load_engine(settings: CommonSettings, model: Model) -> Engine:
    if settings.engine == "upstream":
        from service.loading.upstream import load_upstream

        return load_upstream(settings, model)
    if settings.engine == "fake" or model.folder is None:
        return _load_fake(settings, model)
    if settings.engine == "vllm":
        if settings.device != "auto":
            raise ValueError("--device is the torch engine's: vLLM takes the GPUs that CUDA_VISIBLE_DEVICES names")
        return _load_vllm(settings, model.folder, model.max_tokens)
    return _load_torch(settings, model.folder, model.max_tokens)


def _load_fake(settings: FakeSettings, model: Model) -> Engine:
    tokenizer = model.tokenizer or fake_tokenizer()
    return FakeEngine(
        task=settings.task,
        max_tokens=model.max_tokens,
        delay=settings.fake_delay,
        unparseable=settings.fake_unparseable,
        encode=lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        crash_token=settings.fake_crash_token,
        hang_token=settings.fake_hang_token,
    )


def _load_torch(settings: TorchSettings, folder: Path, max_tokens: int) -> Engine:
    # Imported only now: a process whose workers are elsewhere has no torch.
    from service.engine.torch.engine import TorchEngine
    from service.engine.torch.generate import TorchGenerator
    from service.engine.torch.loading import LoadOptions

    options = LoadOptions(
        dtype=settings.dtype,
        device=settings.device,
        max_tokens=max_tokens,
        batch_tokens=settings.batch_tokens,
        threads=settings.threads,
        native_kernels=settings.native_kernels,
    )
    if settings.task == "generate":
        return TorchGenerator.load(folder, **options)
    return TorchEngine.load(folder, settings.task, **options)


def _load_vllm(settings: VllmSettings, folder: Path, max_tokens: int) -> Engine:
    from service.engine.vllm.config import Lora, VllmOptions
    from service.engine.vllm.engine import VllmEngine

    name, _, adapter = (settings.lora or "").partition("=")
    options = VllmOptions(
        task=settings.task,
        max_tokens=max_tokens,
        dtype=settings.dtype,
        threads=settings.threads,
        batch_tokens=settings.batch_tokens,
        tensor_parallel_size=settings.tensor_parallel_size,
        data_parallel_size=settings.data_parallel_size,
        quantization=settings.quantization,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        deterministic=settings.deterministic,
        lora=Lora(name, Path(adapter).expanduser().resolve()) if settings.lora else None,
        extra=settings.vllm_args,
    )
    return VllmEngine.load(folder, options)


def context_length(folder: Path) -> int:
    """The longest prompt, in tokens, that the model's configuration states."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    return int(config.get("max_position_embeddings") or UNLIMITED_MAX_TOKENS)

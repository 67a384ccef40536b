"""From settings to a model and its engine, whichever kind of engine runs it.

The HTTP side calls `find_model`, which loads no weights; a worker also calls `load_engine`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import structlog

from client.runtime.extras import install_command
from service.engine.contract import Engine
from service.engine.fake import FakeEngine, fake_tokenizer
from service.loading.model import Model, find_local_model
from service.loading.upstream import find_upstream, load_upstream
from service.settings import CommonSettings, FakeSettings, LogSettings, ModelSettings, TorchSettings, VllmSettings

log = structlog.get_logger(__name__)


def check_engine(settings: ModelSettings) -> None:
    """Raise ValueError if the package that runs the model is not installed, before the model is fetched."""
    if settings.engine in ("torch", "vllm") and find_spec(settings.engine) is None:
        raise ValueError(
            f"--engine {settings.engine} needs {settings.engine}, which is not installed: "
            f"{install_command(settings.engine)}, or take another --engine"
        )


def find_model(settings: CommonSettings) -> Model:
    """Find the model, fetching its files if necessary, and load its tokenizer.

    Raises ValueError for settings that contradict each other, ModelError if the files cannot be obtained, UpstreamError
    if an upstream server does not answer or has no such model.
    """
    if settings.lora is not None and settings.engine != "vllm":
        raise ValueError(f"--lora needs --engine vllm: the engine {settings.engine} runs no adapters")
    model = find_upstream(settings) if settings.engine == "upstream" else find_local_model(settings)
    if settings.task == "classify":
        # A causal model's files can also be read as a classifier: scores of the two must not share caches or queues.
        return replace(model, fingerprint=f"{model.fingerprint}-classify")
    return model


def load_engine(settings: CommonSettings, model: Model) -> Engine:
    """Load the model's weights into the engine that the settings name, for the judge's task.

    Raises ValueError if that engine cannot do what the judge needs.
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
        return load_upstream(settings, model)
    if settings.engine == "fake" or model.folder is None:
        return _load_fake(settings, model)
    if settings.engine == "vllm":
        if settings.device != "auto":
            raise ValueError("--device is for the torch engine: vLLM takes the GPUs listed in CUDA_VISIBLE_DEVICES")
        return _load_vllm(settings, model.folder, model.max_tokens)
    _quiet_transformers(settings)
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


def _quiet_transformers(settings: LogSettings) -> None:
    """Leave out its bars in a file, where each step would be a line, and where only warnings are wanted."""
    if settings.log_level in ("warning", "error") or not sys.stderr.isatty():
        import_module("transformers.utils.logging").disable_progress_bar()  # by name, as it is untyped


def _load_torch(settings: TorchSettings, folder: Path, max_tokens: int) -> Engine:
    # Imported here because an API process whose workers run elsewhere has no torch.
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

"""The policy's model: from a name to a folder, from a folder to a model in memory.

torch and transformers are imported inside the functions, so that `--help` and stages without a model work without them.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, get_args

from client.runtime.extras import install_command
from service.engine.contract import DType as DType  # the same names for the judge and the policy
from trainer.errors import ModelError
from trainer.run.model_files import model_digest

DTYPES: Final = get_args(DType)

_HUB_ID: Final = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# No pickles, which run code when they are loaded, and no sub-folders, which hold other formats.
_DOWNLOADED: Final = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_NOT_DOWNLOADED: Final = ["*/*", "consolidated*"]


@contextmanager
def needs_trainer() -> Iterator[None]:
    """Around imports: a missing package becomes an ImportError that says what to install."""
    try:
        yield
    except ImportError as error:
        missing = error.name or "a package"
        raise ImportError(f"{missing} is missing: {install_command('trainer')}", name=error.name) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, PEFT, TRL and, once it is imported, `datasets`.

    What they warn about, such as a prompt that a chat template renders in two ways, is checked and reported here.
    """
    import transformers.utils.logging

    library: Any = transformers.utils.logging
    bars: list[Any] = [library, *([sys.modules["datasets"]] if "datasets" in sys.modules else [])]
    shown = [one for one in bars if one.is_progress_bar_enabled()]
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "peft", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    for one in shown:
        one.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        for one in shown:
            one.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def resolve_model(name: str) -> Path:
    """The folder of a model given as a folder, a hub id (`org/name` or `org/name@revision`) or a name that the service
    knows.

    Downloads go to the cache that HF_HOME names, models that the service knows to the service's own. Raises ModelError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter: make a model of it first, python -m trainer.merge {folder}")
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: give the folder of a model in the format of transformers")
        return folder
    match = _HUB_ID.fullmatch(name)
    return _known_to_the_service(name) if match is None else _download(match[1], match[2])


def local_folder(name: str) -> Path | None:
    """What `resolve_model` would return if it need not download, else None. Raises ModelError for what is no model."""
    from service.models import resolve as known

    if Path(name).expanduser().is_dir():
        return resolve_model(name)
    try:
        return known.find_local(name, None)
    except known.ModelError:
        return resolve_model(name)  # raises what is wrong with the name


def _known_to_the_service(name: str) -> Path:
    from service.models import resolve as known

    try:
        return known.resolve(name).path
    except known.ModelError as error:
        raise ModelError(str(error)) from error


def model_identity(name: str) -> list[str]:
    """How a run's files record a model: the name the user gave, and the digest of its files, which identifies it.

    Raises ModelError, and RecordError if a file cannot be read.
    """
    return [name, model_digest(resolve_model(name))]


def name_and_revision(base: str) -> tuple[str, str | None]:
    """How an adapter names its base: a folder by its absolute path, a hub id with its revision apart.

    A name that only this project knows becomes its folder, so that PEFT finds it. Raises ModelError.
    """
    folder = Path(base).expanduser()
    if folder.is_dir() or _HUB_ID.fullmatch(base) is None:
        return str(resolve_model(base).resolve()), None
    name, _, revision = base.partition("@")
    return name, revision or None


def _download(repo: str, revision: str | None) -> Path:
    with needs_trainer():
        from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED)
    except Exception as error:  # the hub's, its HTTP client's and the file system's errors have no common base
        raise ModelError(
            f"{repo}: no folder of that name here, and the hub does not give it ({type(error).__name__}: {error}). "
            "Give a folder, set HF_ENDPOINT to a mirror, or HF_TOKEN for a gated model"
        ) from error
    return Path(folder)


@contextmanager
def _judge_loading() -> Iterator[Any]:
    """Yield service.engine.torch.loading, which imports torch; its errors become ModelErrors.

    The policy is loaded by the same code as the judge, so that both refuse the same broken folders.
    """
    with needs_trainer():
        from service.engine.torch import loading
    try:
        yield loading
    except loading.EngineLoadError as error:
        raise ModelError(str(error)) from error


def choose_device(name: str = "auto") -> Any:
    """The torch.device of that name; `auto` is the first available of cuda, mps and cpu. Raises ModelError."""
    with _judge_loading() as loading:
        return loading.choose_device(name)


def choose_dtype(name: DType, device: Any) -> Any:
    """The torch.dtype of that name; `auto` is bfloat16 if the device multiplies it natively, else float32."""
    with _judge_loading() as loading:
        return loading.choose_dtype(name, device)


def load_model(folder: Path, dtype: Any, device: Any = None, **options: Any) -> Any:
    """The causal model in `folder`, in evaluation mode, on `device` or where the options for from_pretrained put it.

    Raises ModelError.
    """
    with _judge_loading() as loading:
        from transformers import AutoModelForCausalLM

        return loading.read_weights(AutoModelForCausalLM, folder, dtype, device, **options)


def context_length(folder: Path) -> int | None:
    """The longest sequence the model reads, in tokens; None if its configuration does not say."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    length = config.get("text_config", config).get("max_position_embeddings")
    return int(length) if length else None


def release_memory() -> None:
    """Return the memory of models that are no longer referenced; without torch there are none."""
    if "torch" in sys.modules:
        with _judge_loading() as loading:
            loading.free_memory()

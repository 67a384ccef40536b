"""From settings to a model: its files and tokenizer at once, its engine and batcher when a worker wants them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from service import models
from service.batcher import Batcher
from service.codec import load_tokenizer
from service.engine.contract import Engine
from service.engine.fake import FakeEngine, fake_tokenizer
from service.settings import CommonSettings, EngineSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = structlog.get_logger(__name__)

FAKE_MODEL = "fake"
FAKE_MAX_TOKENS = 4096
# For models that state no limit (recurrent ones).
UNLIMITED_MAX_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Model:
    """A model before its weights are loaded: what the HTTP side has to know of it."""

    id: str
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    folder: Path | None = None
    note: str | None = None


def find_model(settings: CommonSettings) -> Model:
    """Resolve the model, fetching it where need be, and load its tokenizer."""
    if settings.model is None and settings.engine == "fake":
        return Model(FAKE_MODEL, FAKE_MODEL, fake_tokenizer(), settings.max_tokens or FAKE_MAX_TOKENS)
    files = models.resolve(settings.model or models.DEFAULT_MODEL)
    longest = _context_length(files.path)
    max_tokens = min(settings.max_tokens or longest, longest)
    return Model(files.id, files.fingerprint, load_tokenizer(files.path), max_tokens, files.path, files.note)


def load_engine(settings: EngineSettings, model: Model) -> Engine:
    """Load the model's weights into the engine that the settings name."""
    if settings.engine == "fake" or model.folder is None:
        return FakeEngine(
            max_tokens=model.max_tokens,
            delay=settings.fake_delay,
            crash_token=settings.fake_crash_token,
            hang_token=settings.fake_hang_token,
        )
    # Imported only now: a process whose workers are elsewhere has no torch.
    from service.engine.torch_engine import TorchEngine

    started = time.monotonic()
    engine = TorchEngine.load(
        model.folder,
        dtype=settings.dtype,
        device=settings.device,
        max_tokens=model.max_tokens,
        batch_tokens=settings.batch_tokens,
        threads=settings.threads,
    )
    log.info("model loaded", model=model.id, dtype=engine.dtype, seconds=round(time.monotonic() - started, 1))
    return engine


def make_batcher(settings: EngineSettings, engine: Engine) -> Batcher:
    """The batching policy that the settings ask for, else what suits the engine."""
    return Batcher(settings.batch_tokens or engine.batch_tokens, settings.batch_jobs, settings.linger_ms / 1e3)


def _context_length(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    return int(config.get("max_position_embeddings") or UNLIMITED_MAX_TOKENS)

"""Every setting of both programs: each is a flag, an environment variable and a line of --help.

Each class is a group of --help with the `title` it is given, and each engine is loaded from the class named after it:

    ModelSettings <- EngineSettings <- LocalSettings <- TorchSettings, VllmSettings
                                    <- UpstreamSettings, FakeSettings
    CommonSettings = those of the four engines + QueueSettings + LogSettings
    WorkerSettings = CommonSettings + its own
    Settings       = CommonSettings + HttpSettings + LimitSettings + PromptSettings

Pydantic collects the fields of the last base class first, so bases are listed in reverse order of --help.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from service.settings.engines import (
    EngineSettings,
    FakeSettings,
    LocalSettings,
    ModelSettings,
    TorchSettings,
    UpstreamKey,
    UpstreamSettings,
    VllmSettings,
)
from service.settings.groups import (
    MEMORY_URL,
    HttpSettings,
    LimitSettings,
    LogSettings,
    PromptSettings,
    QueueSettings,
    SettingsGroup,
)

__all__ = [
    "MEMORY_URL",
    "CommonSettings",
    "EngineSettings",
    "FakeSettings",
    "LocalSettings",
    "LogSettings",
    "ModelSettings",
    "Settings",
    "SettingsGroup",
    "TorchSettings",
    "UpstreamKey",
    "UpstreamSettings",
    "VllmSettings",
    "WorkerSettings",
]

# How long a batch may take. The second is for generated texts, and for vLLM, whose requests end by their own deadlines.
STALL_SECONDS = 120.0
SLOW_STALL_SECONDS = 600.0


class CommonSettings(LogSettings, QueueSettings, FakeSettings, UpstreamSettings, VllmSettings, TorchSettings):
    """The settings of both programs: an API process runs an engine of its own unless its queue is on Redis."""

    @property
    def stall_seconds(self) -> float:
        """How long a batch may take before it counts as hung."""
        if self.stall_timeout is not None:
            return self.stall_timeout
        if self.engine == "upstream":
            # Its calls end by themselves, after at most three times the timeout of one judgement.
            return max(STALL_SECONDS, 4 * self.upstream_timeout)
        return SLOW_STALL_SECONDS if self.engine == "vllm" or self.task == "generate" else STALL_SECONDS


class WorkerSettings(CommonSettings, title="worker"):
    """Run the model for API processes that share a queue on Redis.

    Every flag can also be given as an environment variable: --queue-url as JUDGE_QUEUE_URL, and so on.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m service.worker")

    lease_seconds: float = Field(
        10.0, gt=0, description="hand a worker's jobs to another after this many seconds without a sign of life"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port to serve Prometheus metrics on; unset: no metrics"
    )
    metrics_host: str = Field("127.0.0.1", description="address to serve Prometheus metrics on")


class Settings(PromptSettings, LimitSettings, HttpSettings, CommonSettings):
    """Serve a language model as a preference judge over HTTP.

    With --queue-url redis://… this process only answers HTTP, and `python -m service.worker` runs the model.
    Every flag can also be given as an environment variable: --max-tokens as JUDGE_MAX_TOKENS, and so on.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m service")

    @model_validator(mode="after")
    def _one_judgement_fits(self) -> Self:
        if self.task == "generate" and self.self_reward_samples > self.max_queue_jobs:
            raise ValueError("max-queue-jobs must be at least self-reward-samples: each sample is a job of its own")
        return self

"""Every setting of the service: each is a flag, an environment variable and a line of --help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Serve a language model as a preference judge over HTTP.

    Every flag can also be given as an environment variable: --max-tokens as JUDGE_MAX_TOKENS, and so on.
    """

    model_config = SettingsConfigDict(
        env_prefix="JUDGE_",
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        frozen=True,
    )

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model: str | None = Field(
        None,
        description="folder, hub id, or known name (`python -m service.models list`); "
        "unset: qwen2.5-coder-1.5b-instruct, or for the fake engine no model at all",
    )
    engine: Literal["torch", "fake"] = Field("torch", description="what runs the model; fake: made-up scores, no model")
    judge: Literal["yes-no"] = Field("yes-no", description="how the model is asked: P(Yes) against P(No)")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 where the hardware has it, else float32"
    )
    device: str = Field("auto", description="torch device; auto: cuda, else mps, else cpu")
    threads: int | None = Field(None, ge=1, description="CPU threads of the torch engine; unset: one for each core")
    queue_url: str = Field(
        "memory://", description="where jobs wait for a worker; memory:// keeps them in this process"
    )
    api_key: Annotated[list[SecretStr], NoDecode] = Field(
        [], description="keys that callers must send as `Authorization: Bearer KEY`, comma-separated; unset: no auth"
    )
    template_file: Annotated[list[Path], NoDecode] = Field(
        [], description="TOML or JSON files with more templates, comma-separated"
    )
    max_tokens: int | None = Field(
        None, ge=16, description="longest prompt in tokens; unset: as long as the model reads"
    )
    batch_tokens: int | None = Field(None, ge=1, description="tokens in a batch; unset: what suits the engine")
    batch_jobs: int = Field(256, ge=1, description="judgements in a batch at most")
    linger_ms: float = Field(2.0, ge=0, le=1000, description="how long an idle worker waits for company for a job")
    max_queue_jobs: int = Field(16_384, ge=1, description="judgements waiting at most; more are refused with 503")
    max_queue_tokens: int = Field(8_000_000, ge=1, description="their tokens at most; more are refused with 503")
    max_batch_items: int = Field(1024, ge=1, description="items in one /score/batch or /compare/batch request at most")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="size of a request body at most; more gets 413")
    body_timeout: float = Field(30.0, gt=0, description="seconds that a caller may take to send a body")
    request_timeout: float = Field(
        300.0, gt=0, description="seconds until a judgement is given up with 504; callers may ask for less"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds given to accepted requests after SIGTERM")
    rate_limit: float | None = Field(
        None, gt=0, description="judgements per minute that each key may ask for; more gets 429; unset: no limit"
    )
    tokenizer_threads: int = Field(2, ge=1, description="threads that render and tokenise prompts")
    fake_delay: float = Field(0.0, ge=0, description="seconds that the fake engine takes for a batch")
    log_format: Literal["console", "json"] = Field("console", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="which log lines are written")

    @field_validator("api_key", "template_file", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        values = value if isinstance(value, list) else [value]
        parts = [p for v in values for p in (v.split(",") if isinstance(v, str) else [v])]
        return [part.strip() if isinstance(part, str) else part for part in parts if part != ""]

    @model_validator(mode="after")
    def _known_queue(self) -> Self:
        if self.queue_url != "memory://":
            raise ValueError("queue_url: only memory:// is supported by this version")
        return self

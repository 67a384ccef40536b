"""The groups of settings that no engine needs: queue, logging, HTTP, limits, prompts."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.process.hosts import parse_host_pattern
from service.settings.values import (
    ApiKeys,
    CommaSeparated,
    parse_origin,
    parse_root_path,
    secret_from_file,
    with_password,
)
from service.telemetry.tracing import parse_endpoint

MEMORY_URL = "memory://"


class SettingsGroup(BaseSettings):
    """How settings are read. Each subclass is a group of --help, titled by its `title`."""

    model_config = SettingsConfigDict(
        env_prefix="JUDGE_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # the value may be a key
    )


class QueueSettings(SettingsGroup, title="queue"):
    """Where jobs wait."""

    queue_url: str = Field(
        MEMORY_URL,
        pattern=r"^(memory://$|redis://|rediss://|unix://)",
        description="where jobs wait; memory://: in this process; redis://[user:password@]host:port/db (rediss:// for "
        "TLS): on Redis, for workers in processes of their own",
    )
    queue_password: SecretStr | None = Field(
        None, description="password for --queue-url, so that the URL need not hold it; best as JUDGE_QUEUE_PASSWORD"
    )
    queue_password_file: Path | None = Field(None, description="file that holds --queue-password")
    key_prefix: str = Field("judge", min_length=1, description="prefix of all Redis keys")

    @model_validator(mode="before")
    @classmethod
    def _add_password(cls, values: Any) -> Any:
        values = secret_from_file(values, "queue_password")
        password = values.get("queue_password") if isinstance(values, dict) else None
        if not password:
            return values
        text = password.get_secret_value() if isinstance(password, SecretStr) else str(password)
        return {**values, "queue_url": with_password(values.get("queue_url", MEMORY_URL), text)}


class LogSettings(SettingsGroup, title="logging and tracing"):
    """Logs and traces of a process."""

    log_format: Literal["console", "json"] = Field("console", description="format of log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level to log")
    otel_endpoint: Annotated[str | None, AfterValidator(parse_endpoint)] = Field(
        None,
        description="export traces to this OpenTelemetry collector over OTLP/HTTP, such as http://localhost:4318; "
        "needs the extra otel; unset: no traces",
    )


class HttpSettings(SettingsGroup, title="HTTP"):
    """Where to listen and whom to answer."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    allowed_hosts: CommaSeparated[Annotated[str, AfterValidator(parse_host_pattern)]] = Field(
        [],
        description="further host names that requests may use for the service, comma-separated; *.example.com: all "
        "subdomains; *: any; unset: any if there are keys, else loopback's names, --host and, if --host is not "
        "loopback, IP addresses and this machine's name",
    )
    api_key: ApiKeys = Field(
        [],
        description="keys, comma-separated; callers must send one of them as `Authorization: Bearer KEY`, or in the "
        "URL (http://:KEY@host); unset: no authentication",
    )
    api_key_file: Path | None = Field(
        None, description="file that holds the keys of --api-key, on a line each or comma-separated"
    )
    cors_origins: CommaSeparated[Annotated[str, AfterValidator(parse_origin)]] = Field(
        [],
        description="origins of web pages that may ask from their visitors' browsers, comma-separated, such as "
        "https://app.example.com; *: any, if there are keys; unset: only the service's own page",
    )
    root_path: Annotated[str, AfterValidator(parse_root_path)] = Field(
        "",
        description="path below which a proxy serves this, such as /judge, whether it strips that prefix or not; "
        "unset: none",
    )
    playground: bool = Field(True, description="serve a page at / to try the judge in a browser")

    @model_validator(mode="before")
    @classmethod
    def _read_keys(cls, values: Any) -> Any:
        return secret_from_file(values, "api_key")

    @model_validator(mode="after")
    def _known_pages_or_keys(self) -> Self:
        if "*" in self.cors_origins and not self.api_key:
            raise ValueError("--cors-origins * needs --api-key: any page could use the service through its visitors")
        return self


class LimitSettings(SettingsGroup, title="limits"):
    """How much callers may ask for, and how long they may take."""

    max_queue_jobs: int = Field(
        16_384,
        ge=1,
        description="maximum judgements waiting; beyond that, requests get 503, or 413 if one alone exceeds it",
    )
    max_queue_tokens: int = Field(
        8_000_000, ge=1, description="maximum tokens waiting; beyond that, requests get 503 or 413 likewise"
    )
    max_batch_items: int = Field(1024, ge=1, description="maximum items per /score/batch or /compare/batch request")
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="maximum size of a request body, in bytes; larger ones get 413"
    )
    body_timeout: float = Field(
        30.0,
        gt=0,
        description="seconds that a caller may take to send the headers, or the body, or may stop reading an answer",
    )
    request_timeout: float = Field(
        300.0, gt=0, description="give up on a judgement with 504 after this many seconds; callers may ask for less"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds to finish accepted requests after SIGTERM")
    rate_limit: float | None = Field(
        None, gt=0, description="maximum judgements per minute and key; beyond that, requests get 429; unset: no limit"
    )


class PromptSettings(SettingsGroup, title="prompts and scores"):
    """How prompts are rendered, and how scores are calibrated and cached."""

    chat_date: date | None = Field(
        None,
        description="date that chat templates give as today's, YYYY-MM-DD; unset: 2024-07-26, the default of Llama's "
        "templates, so that scores do not change from day to day",
    )
    choice_rotations: int = Field(
        1,
        ge=1,
        le=255,
        description="ask a choice of /v1/decisions or /v1/systemone this many times, its options in other places each "
        "time, and average: less bias towards a place, for as many times the work; 1: once, in the order given",
    )
    rerank_template: str = Field(
        "rerank",
        min_length=1,
        max_length=128,
        description="template that /rerank, /v1/rerank and /v2/rerank ask about each document with; rerank-qwen3 for "
        "models of the family Qwen3-Reranker",
    )
    tokenizer_threads: int = Field(2, ge=1, description="threads that render and tokenize prompts")
    calibration_file: CommaSeparated[Path] = Field(
        [], description="calibration files for this model (from `python -m client.calibrate`), comma-separated"
    )
    cache_entries: int = Field(
        100_000, ge=0, description="maximum cached scores, evicting the least recently used; 0: no cache"
    )
    cache_ttl: float = Field(86_400.0, gt=0, description="seconds after which Redis forgets a cached score")

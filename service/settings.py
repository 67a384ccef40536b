"""Every setting of the two programs: each is a flag, an environment variable and a line of --help."""

from __future__ import annotations

import json
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.engine.contract import Task
from service.engine.upstream.openai_client import base_url
from service.hosts import checked_pattern
from service.tracing import checked_endpoint

MEMORY_URL = "memory://"
# How long a batch may take; and one of texts, or of vLLM, whose requests end at their own deadlines.
STALL_SECONDS = 120.0
SLOW_STALL_SECONDS = 600.0


def sendable_key(key: SecretStr) -> SecretStr:
    """The key itself; raises ValueError, which never repeats it, for one that no caller can send in a header."""
    text = key.get_secret_value()
    if not text.strip():
        raise ValueError(
            "a key is blank: take out the comma too many, or unset JUDGE_API_KEY for a service without keys"
        )
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a key holds white space or a character outside ASCII, which no header can carry")
    if text[0] in "[\"'":
        raise ValueError("keys are separated by commas, without brackets around the list or quotes around a key")
    return key


class CommonSettings(BaseSettings):
    """What an API process and a worker have to agree on, and how both log."""

    model_config = SettingsConfigDict(
        env_prefix="JUDGE_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        frozen=True,
        hide_input_in_errors=True,  # one of them may be a key
    )

    model: str | None = Field(
        None,
        description="folder, hub id, or known name (`python -m service.models list`); "
        "unset: qwen2.5-coder-1.5b-instruct, or for the fake engine no model at all",
    )
    engine: Literal["torch", "vllm", "upstream", "fake"] = Field(
        "torch",
        description="what runs the model; vllm: fastest on GPUs; upstream: another server, with OpenAI's API; "
        "fake: made-up scores, no model",
    )
    judge: Literal["yes-no", "pairwise", "self-reward", "reward-model"] = Field(
        "yes-no",
        description="how the model is asked; yes-no: P(Yes) against P(No); pairwise: two responses, P(A) against P(B); "
        "self-reward: for a grade from 0 to 5; reward-model: a classification head reads the conversation",
    )
    self_reward_mode: Literal["expectation", "parsed"] = Field(
        "expectation",
        description="judge self-reward; expectation: over the probabilities of the digits; parsed: a text is written, "
        "and its last line read",
    )
    self_reward_samples: int = Field(
        1, ge=1, le=64, description="parsed grades: texts for a judgement, whose mean counts; 1: greedy, else drawn"
    )
    self_reward_tokens: int = Field(256, ge=8, description="parsed grades: length of a text at most, in tokens")
    max_tokens: int | None = Field(
        None, ge=16, description="longest prompt in tokens; unset: as long as the model reads"
    )
    queue_url: Annotated[str, Field(pattern=r"^(memory://$|redis://|rediss://|unix://)")] = Field(
        MEMORY_URL,
        description="where jobs wait: memory:// within this process; redis://[user:password@]host:port/db, or "
        "rediss:// for TLS, for workers in processes of their own",
    )
    template_file: Annotated[list[Path], NoDecode] = Field(
        [], description="TOML or JSON files with more templates, comma-separated"
    )
    upstream_url: str | None = Field(
        None,
        description="upstream engine: base address of the server, as http://localhost:8000/v1; its key is the "
        "environment variable JUDGE_UPSTREAM_API_KEY, and never a flag",
    )
    upstream_model: str | None = Field(
        None, description="upstream engine: the server's name for the model; unset: the only one that it serves"
    )
    upstream_api: Literal["auto", "completions", "chat"] = Field(
        "auto",
        description="upstream engine: completions sends token ids, for which --model names the folder or hub id of the "
        "model's tokenizer; chat sends text and finds the labels by their spelling; auto: completions with --model",
    )
    upstream_top_logprobs: int = Field(
        20, ge=1, description="upstream engine: how many of the likeliest tokens are asked for"
    )
    upstream_body: Annotated[dict[str, Any], NoDecode] = Field(
        {},
        description="upstream engine: JSON object of more fields for each request, such as "
        '{"chat_template_kwargs": {"enable_thinking": false}}',
    )
    floor: float | None = Field(
        None,
        lt=0,
        description="upstream engine: log-probability, such as -20, that stands in for a label that the server did not "
        "return while it returned another; unset: an error",
    )
    lora: Annotated[str | None, Field(pattern=r"^[^=]+=.+$")] = Field(
        None, description="vllm engine: NAME=FOLDER of a LoRA adapter, which is served by that name"
    )
    key_prefix: str = Field("judge", min_length=1, description="what the names of all Redis keys begin with")
    otel_endpoint: str | None = Field(
        None,
        description="address of an OpenTelemetry collector that traces are sent to by OTLP over HTTP, as "
        "http://localhost:4318; needs `pip install 'judge-as-api[otel]'`; unset: no traces",
    )
    log_format: Literal["console", "json"] = Field("console", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="which log lines are written")

    @property
    def task(self) -> Task:
        """What the judge needs of an engine."""
        if self.judge == "self-reward" and self.self_reward_mode == "parsed":
            return "generate"
        return "classify" if self.judge == "reward-model" else "labels"

    @field_validator("template_file", mode="before")
    @classmethod
    def _split_files(cls, value: object) -> object:
        return split_list(value)

    @field_validator("upstream_url")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        return None if value is None else base_url(value)

    @field_validator("otel_endpoint")
    @classmethod
    def _collector(cls, value: str | None) -> str | None:
        return checked_endpoint(value)

    @field_validator("upstream_body", mode="before")
    @classmethod
    def _parse_body(cls, value: object) -> object:
        return parse_json(value)


class EngineSettings(CommonSettings):
    """How a process that runs the model runs it."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 where the hardware has it, else float32"
    )
    device: str = Field("auto", description="torch device; auto: cuda, else mps, else cpu")
    threads: int | None = Field(None, ge=1, description="CPU threads of the torch engine; unset: one for each core")
    native_kernels: bool = Field(
        True, description="torch engine: read prompts with code that is compiled here, where CPU and model allow it"
    )
    batch_tokens: int | None = Field(None, ge=1, description="tokens in a batch; unset: what suits the engine")
    batch_jobs: int = Field(256, ge=1, description="judgements in a batch at most")
    linger_ms: float = Field(1.0, ge=0, le=1000, description="how long an idle worker waits for company for a job")
    stall_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds that a batch may take before the process ends with status 70, to be started again; unset: "
        "120, with vllm or for written texts 600, with upstream at least four times --upstream-timeout",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="vllm engine: GPUs that share each layer")
    data_parallel_size: int = Field(1, ge=1, description="vllm engine: copies of the model, on GPUs of their own")
    quantization: str | None = Field(
        None, description="vllm engine: how weights are made smaller, as fp8; unset: as the model's files say"
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="vllm engine: share of the GPU's memory for weights and cache; unset: vLLM's own, and on a CPU a "
        "cache of 4 GiB",
    )
    deterministic: bool = Field(
        False, description="vllm engine: numbers do not depend on what else is in the batch; slower, GPUs only"
    )
    vllm_args: Annotated[dict[str, Any], NoDecode] = Field(
        {}, description='vllm engine: JSON object of further arguments of its engine, as {"enforce_eager": true}'
    )
    upstream_concurrency: int = Field(32, ge=1, description="upstream engine: requests under way at most")
    upstream_timeout: float = Field(
        30.0, gt=0, description="upstream engine: seconds that one judgement may take, its retries included"
    )
    upstream_retries: int = Field(
        5, ge=0, description="upstream engine: how often one judgement is asked for again after what may pass"
    )
    fake_delay: float = Field(0.0, ge=0, description="fake engine: seconds that a batch takes")
    fake_unparseable: float = Field(
        0.0, ge=0, le=1, description="fake engine: share of written texts that state no grade, for tests"
    )
    fake_crash_token: int | None = Field(None, description="fake engine: a token id that ends the process, for tests")
    fake_hang_token: int | None = Field(None, description="fake engine: a token id that hangs the process, for tests")

    @property
    def stall_seconds(self) -> float:
        """How long a batch may take before it is thought never to end."""
        if self.stall_timeout is not None:
            return self.stall_timeout
        if self.engine == "upstream":
            # Its calls end by themselves, after three times the time of one question.
            return max(STALL_SECONDS, 4 * self.upstream_timeout)
        return SLOW_STALL_SECONDS if self.engine == "vllm" or self.task == "generate" else STALL_SECONDS

    @field_validator("vllm_args", mode="before")
    @classmethod
    def _parse_args(cls, value: object) -> object:
        return parse_json(value)


class WorkerSettings(EngineSettings):
    """Run the model for API processes that share a queue on Redis.

    Every flag can also be given as an environment variable: --queue-url as JUDGE_QUEUE_URL, and so on.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m service.worker")

    lease_seconds: float = Field(10.0, gt=0, description="after which silence a worker's jobs are given to another")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port for Prometheus; unset: none")
    metrics_host: str = Field("127.0.0.1", description="address for Prometheus")


class Settings(EngineSettings):
    """Serve a language model as a preference judge over HTTP.

    With --queue-url redis://… this process only answers HTTP, and `python -m service.worker` runs the model.
    Every flag can also be given as an environment variable: --max-tokens as JUDGE_MAX_TOKENS, and so on.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m service")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    allowed_hosts: Annotated[list[Annotated[str, AfterValidator(checked_pattern)]], NoDecode] = Field(
        [],
        description="further names by which callers reach the service, comma-separated; *.example.com: all below one; "
        "*: any; unset: any where there are keys, else loopback's, --host and, if that is not loopback, addresses",
    )
    api_key: Annotated[list[Annotated[SecretStr, AfterValidator(sendable_key)]], NoDecode] = Field(
        [], description="keys that callers must send as `Authorization: Bearer KEY`, comma-separated; unset: no auth"
    )
    calibration_file: Annotated[list[Path], NoDecode] = Field(
        [], description="calibrations of this model by template (`python -m client.calibrate`), comma-separated"
    )
    chat_date: date | None = Field(
        None,
        description="YYYY-MM-DD that the model's chat template is told where it asks for today's date; unset: "
        "2024-07-26, as Llama's templates have it, whatever the day",
    )
    max_queue_jobs: int = Field(
        16_384, ge=1, description="judgements waiting at most; more are refused with 503, in one request with 413"
    )
    max_queue_tokens: int = Field(8_000_000, ge=1, description="their tokens at most; more are refused in the same way")
    max_batch_items: int = Field(1024, ge=1, description="items in one /score/batch or /compare/batch request at most")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="size of a request body at most; more gets 413")
    body_timeout: float = Field(
        30.0,
        gt=0,
        description="seconds that a caller may take to send a head, and a body, and may take nothing of an answer",
    )
    request_timeout: float = Field(
        300.0, gt=0, description="seconds until a judgement is given up with 504; callers may ask for less"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds given to accepted requests after SIGTERM")
    rate_limit: float | None = Field(
        None, gt=0, description="judgements per minute that each key may ask for; more gets 429; unset: no limit"
    )
    cache_entries: int = Field(100_000, ge=0, description="scores remembered, least recently used forgotten; 0: none")
    cache_ttl: float = Field(86_400.0, gt=0, description="seconds that Redis remembers a score")
    playground: bool = Field(True, description="serve the page to try the judge on, at /")
    tokenizer_threads: int = Field(2, ge=1, description="threads that render and tokenise prompts")

    @model_validator(mode="after")
    def _one_judgement_fits(self) -> Self:
        if self.task == "generate" and self.self_reward_samples > self.max_queue_jobs:
            raise ValueError("max-queue-jobs must be at least self-reward-samples: a judgement waits as so many")
        return self

    @field_validator("api_key", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        """An empty value is refused too: a secret that was not found must not open the service to everybody."""
        return split_commas(value)

    @field_validator("calibration_file", "allowed_hosts", mode="before")
    @classmethod
    def _split_lists(cls, value: object) -> object:
        return split_list(value)


class UpstreamKey(BaseSettings):
    """The key of the upstream engine's server, from the environment alone: flags can be seen by others."""

    model_config = SettingsConfigDict(env_prefix="JUDGE_", frozen=True, hide_input_in_errors=True)

    upstream_api_key: SecretStr | None = None

    @field_validator("upstream_api_key", mode="after")
    @classmethod
    def _strip(cls, value: SecretStr | None) -> SecretStr | None:
        """Files end in a newline; an empty variable is as good as none."""
        stripped = "" if value is None else value.get_secret_value().strip()
        return SecretStr(stripped) if stripped else None


def parse_json(value: object) -> object:
    """What a flag or an environment variable says in JSON; other values are given in code, as they are."""
    return json.loads(value) if isinstance(value, str) else value


def split_commas(value: object) -> object:
    """The parts of comma-separated values, without the white space around them; blank ones stay, to be refused."""
    values = value if isinstance(value, list) else [value]
    parts = [part for each in values for part in (each.split(",") if isinstance(each, str) else [each])]
    return [part.strip() if isinstance(part, str) else part for part in parts]


def split_list(value: object) -> object:
    """The parts of a comma-separated list; none where it is empty. Raises ValueError for a blank entry."""
    parts = split_commas(value)
    if parts == [""]:
        return []
    if isinstance(parts, list) and "" in parts:
        raise ValueError("an entry of the list is blank: take out the comma too many")
    return parts

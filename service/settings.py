"""Every setting of the two programs: each is a flag, an environment variable and a line of --help.

Each class adds a group of --help, titled by its `title`, and an engine is loaded with the class that is named after it:

    ModelSettings <- EngineSettings <- LocalSettings <- TorchSettings, VllmSettings
                                    <- UpstreamSettings, FakeSettings
    CommonSettings = those of the four engines + QueueSettings + LogSettings
    WorkerSettings = CommonSettings + its own
    Settings       = CommonSettings + HttpSettings + LimitSettings + PromptSettings

Pydantic collects the fields of the last base class first, so bases are listed in the reverse order of --help.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, CliSuppress, SettingsConfigDict

from service.engine.contract import Task
from service.engine.upstream.openai_client import base_url
from service.flag_values import ApiKeys, CommaSeparated, JsonObject, OptionalName
from service.process.hosts import parse_host_pattern
from service.telemetry.tracing import parse_endpoint

MEMORY_URL = "memory://"
# How long a batch may take; generated texts take longer, and so does vLLM, whose requests end at their own deadlines.
STALL_SECONDS = 120.0
SLOW_STALL_SECONDS = 600.0


class SettingsGroup(BaseSettings):
    """How settings are read. A subclass is a group of --help, which its `title` names."""

    model_config = SettingsConfigDict(
        env_prefix="JUDGE_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # one of them may be a key
    )


class ModelSettings(SettingsGroup, title="model and judge"):
    """Which model is asked, and how. API processes and workers that share a queue must agree on these."""

    model: OptionalName = Field(
        None,
        description="folder, hub id or known name (`python -m service.models list`); unset: "
        "qwen2.5-coder-1.5b-instruct, or no model at all with --engine fake",
    )
    engine: Literal["torch", "vllm", "upstream", "fake"] = Field(
        "torch",
        description="what runs the model; torch: runs on any machine; vllm: fastest on GPUs; upstream: another server "
        "that speaks OpenAI's API; fake: no model, made-up scores",
    )
    judge: Literal["yes-no", "pairwise", "self-reward", "reward-model"] = Field(
        "yes-no",
        description="how the model is asked; yes-no: P(Yes) against P(No); pairwise: P(A) against P(B) for two "
        "responses; self-reward: a grade from 0 to 5; reward-model: a classification head on the conversation",
    )
    self_reward_mode: Literal["expectation", "parsed"] = Field(
        "expectation",
        description="how --judge self-reward grades; expectation: mean over the probabilities of the digits; parsed: "
        "generate a text and parse its last line",
    )
    self_reward_samples: int = Field(
        1,
        ge=1,
        le=64,
        description="parsed grades: texts per judgement, of whose grades the mean counts; 1: greedy, more: sampled",
    )
    self_reward_tokens: int = Field(256, ge=8, description="parsed grades: maximum length of a text, in tokens")
    max_tokens: int | None = Field(
        None, ge=16, description="longest prompt, in tokens; unset: the context length of the model"
    )
    template_file: CommaSeparated[Path] = Field(
        [], description="TOML or JSON files with more templates, comma-separated"
    )

    @property
    def task(self) -> Task:
        """What the judge needs of an engine."""
        if self.judge == "self-reward" and self.self_reward_mode == "parsed":
            return "generate"
        return "classify" if self.judge == "reward-model" else "labels"


class EngineSettings(ModelSettings, title="batching"):
    """What every engine is given."""

    batch_tokens: int | None = Field(None, ge=1, description="token budget of a batch; unset: what suits the engine")
    batch_jobs: int = Field(256, ge=1, description="maximum judgements per batch")
    linger_ms: float = Field(
        1.0, ge=0, le=1000, description="max_wait of the scheduler: milliseconds that a lone job waits for others"
    )
    stall_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds after which a batch counts as hung, and the process exits with status 70 so that its "
        "supervisor restarts it; unset: 120; 600 with vllm or parsed grades; at least four times "
        "--upstream-timeout with upstream",
    )


class LocalSettings(EngineSettings, title="torch and vllm engines"):
    """What engines that load the weights on this machine have in common."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 where the hardware has it, else float32"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; unset: one per core")


class TorchSettings(LocalSettings, title="torch engine"):
    """What the torch engine is loaded with."""

    device: str = Field("auto", description="torch device; auto: cuda, else mps, else cpu")
    native_kernels: bool = Field(
        True, description="prefill with kernels compiled on this machine, where the CPU and the model allow it"
    )


class VllmSettings(LocalSettings, title="vllm engine"):
    """What the vllm engine is loaded with."""

    lora: str | None = Field(
        None, pattern=r"^[^=]+=.+$", description="NAME=FOLDER of a LoRA adapter, served under that name"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer")
    data_parallel_size: int = Field(1, ge=1, description="replicas of the model, each on its own GPUs")
    quantization: str | None = Field(
        None, description="quantization of the weights, such as fp8; unset: as the model's files say"
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of the GPU's memory for weights and KV cache; unset: vLLM's default, or a KV cache of "
        "4 GiB on a CPU",
    )
    deterministic: bool = Field(
        False, description="make scores independent of the rest of the batch; slower, GPUs only"
    )
    vllm_args: JsonObject = Field(
        {}, description='JSON object of further arguments for vLLM\'s engine, such as {"enforce_eager": true}'
    )


class UpstreamSettings(EngineSettings, title="upstream engine"):
    """What the upstream engine is loaded with, but for the key: see `UpstreamKey`."""

    upstream_url: Annotated[str, AfterValidator(base_url)] | None = Field(
        None,
        description="base URL of the server, such as http://localhost:8000/v1; its key is read from the environment "
        "variable JUDGE_UPSTREAM_API_KEY, never from a flag",
    )
    upstream_model: OptionalName = Field(
        None, description="the server's name for the model; unset: the only model that it serves"
    )
    upstream_api: Literal["auto", "completions", "chat"] = Field(
        "auto",
        description="completions: send token ids, made with the tokenizer of --model (folder or hub id); chat: send "
        "text and match the labels by spelling; auto: completions if --model is given, else chat",
    )
    upstream_top_logprobs: int = Field(20, ge=1, description="how many of the most likely tokens to request")
    upstream_body: JsonObject = Field(
        {},
        description="JSON object of extra fields for each request, such as "
        '{"chat_template_kwargs": {"enable_thinking": false}}',
    )
    floor: float | None = Field(
        None,
        lt=0,
        description="log-probability, such as -20, assumed for a label that the server left out while it returned "
        "another; unset: such an answer is an error",
    )
    upstream_concurrency: int = Field(32, ge=1, description="maximum requests in flight")
    upstream_timeout: float = Field(
        30.0, gt=0, description="give up on a judgement after this many seconds, retries included"
    )
    upstream_retries: int = Field(5, ge=0, description="retries of a judgement after errors that may be temporary")


class FakeSettings(EngineSettings, title="fake engine"):
    """What the fake engine is loaded with. These are for tests, so --help does not list them."""

    fake_delay: CliSuppress[float] = Field(0.0, ge=0, description="seconds that a batch takes")
    fake_unparseable: CliSuppress[float] = Field(
        0.0, ge=0, le=1, description="fraction of generated texts that state no grade"
    )
    fake_crash_token: CliSuppress[int | None] = Field(None, description="a token id that ends the process")
    fake_hang_token: CliSuppress[int | None] = Field(None, description="a token id that hangs the process")


class QueueSettings(SettingsGroup, title="queue"):
    """Where jobs wait."""

    queue_url: str = Field(
        MEMORY_URL,
        pattern=r"^(memory://$|redis://|rediss://|unix://)",
        description="where jobs wait; memory://: in this process; redis://[user:password@]host:port/db, or rediss:// "
        "for TLS: for workers in processes of their own",
    )
    key_prefix: str = Field("judge", min_length=1, description="prefix of all Redis keys")


class LogSettings(SettingsGroup, title="logging and tracing"):
    """What a process says of itself."""

    log_format: Literal["console", "json"] = Field("console", description="format of log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    otel_endpoint: Annotated[str | None, AfterValidator(parse_endpoint)] = Field(
        None,
        description="send traces to this OpenTelemetry collector with OTLP over HTTP, such as http://localhost:4318; "
        "needs `pip install 'judge-as-api[otel]'`; unset: no traces",
    )


class CommonSettings(LogSettings, QueueSettings, FakeSettings, UpstreamSettings, VllmSettings, TorchSettings):
    """What both programs take: an API process has an engine of its own unless its queue is on Redis."""

    @property
    def stall_seconds(self) -> float:
        """How long a batch may take before it counts as hung."""
        if self.stall_timeout is not None:
            return self.stall_timeout
        if self.engine == "upstream":
            # Its calls end by themselves, after three times the time of one question.
            return max(STALL_SECONDS, 4 * self.upstream_timeout)
        return SLOW_STALL_SECONDS if self.engine == "vllm" or self.task == "generate" else STALL_SECONDS


class WorkerSettings(CommonSettings, title="worker"):
    """Run the model for API processes that share a queue on Redis.

    Every flag can also be given as an environment variable: --queue-url as JUDGE_QUEUE_URL, and so on.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m service.worker")

    lease_seconds: float = Field(
        10.0, gt=0, description="give a worker's jobs to another after this many seconds without a sign of life"
    )
    metrics_port: int | None = Field(None, ge=0, le=65535, description="port for Prometheus; unset: no metrics")
    metrics_host: str = Field("127.0.0.1", description="address for Prometheus")


class HttpSettings(SettingsGroup, title="HTTP"):
    """Who is answered, and where."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    allowed_hosts: CommaSeparated[Annotated[str, AfterValidator(parse_host_pattern)]] = Field(
        [],
        description="more names that callers may use for the service, comma-separated; *.example.com: all names below "
        "it; *: any; unset: any if there are keys, else those of loopback, --host and, if --host is not loopback, IP "
        "addresses and this machine's name",
    )
    api_key: ApiKeys = Field(
        [],
        description="keys, comma-separated, one of which callers must send as `Authorization: Bearer KEY`; unset: no "
        "authentication",
    )
    playground: bool = Field(True, description="serve a page at / to try the judge on")


class LimitSettings(SettingsGroup, title="limits"):
    """What callers may ask for, and how long they may take."""

    max_queue_jobs: int = Field(
        16_384, ge=1, description="maximum judgements waiting; further requests get 503, or 413 if one alone exceeds it"
    )
    max_queue_tokens: int = Field(
        8_000_000, ge=1, description="maximum tokens waiting; further requests get 503 or 413 in the same way"
    )
    max_batch_items: int = Field(1024, ge=1, description="maximum items in one /score/batch or /compare/batch request")
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="largest request body; larger ones get 413")
    body_timeout: float = Field(
        30.0,
        gt=0,
        description="seconds that a caller may take to send the headers, or the body, or may read nothing of an answer",
    )
    request_timeout: float = Field(
        300.0, gt=0, description="give up on a judgement with 504 after this many seconds; callers may ask for less"
    )
    drain_timeout: float = Field(30.0, ge=0, description="seconds that accepted requests get after SIGTERM")
    rate_limit: float | None = Field(
        None, gt=0, description="maximum judgements per minute and key; further requests get 429; unset: no limit"
    )


class PromptSettings(SettingsGroup, title="prompts and scores"):
    """How prompts are made, and what becomes of scores."""

    chat_date: date | None = Field(
        None,
        description="YYYY-MM-DD, for chat templates that state today's date; unset: 2024-07-26, the default of Llama's "
        "templates, so that scores do not change from day to day",
    )
    tokenizer_threads: int = Field(2, ge=1, description="threads that render and tokenise prompts")
    calibration_file: CommaSeparated[Path] = Field(
        [], description="calibrations of this model by template (`python -m client.calibrate`), comma-separated"
    )
    cache_entries: int = Field(
        100_000, ge=0, description="maximum scores cached, evicting the least recently used; 0: no cache"
    )
    cache_ttl: float = Field(86_400.0, gt=0, description="seconds after which Redis forgets a cached score")


class Settings(PromptSettings, LimitSettings, HttpSettings, CommonSettings):
    """Serve a language model as a preference judge over HTTP.

    With --queue-url redis://… this process only answers HTTP, and `python -m service.worker` runs the model.
    Every flag can also be given as an environment variable: --max-tokens as JUDGE_MAX_TOKENS, and so on.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m service")

    @model_validator(mode="after")
    def _one_judgement_fits(self) -> Self:
        if self.task == "generate" and self.self_reward_samples > self.max_queue_jobs:
            raise ValueError("max-queue-jobs must be at least self-reward-samples: each sample waits as a job")
        return self


class UpstreamKey(SettingsGroup):
    """The key of the upstream engine's server, from the environment alone: other users can see flags."""

    upstream_api_key: SecretStr | None = None

    @field_validator("upstream_api_key", mode="after")
    @classmethod
    def _strip(cls, value: SecretStr | None) -> SecretStr | None:
        """Files end in a newline; an empty variable counts as unset."""
        stripped = "" if value is None else value.get_secret_value().strip()
        return SecretStr(stripped) if stripped else None

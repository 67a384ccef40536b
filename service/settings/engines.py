"""The settings that engines are loaded from, one class each, and the key of an upstream server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import CliSuppress

from service.engine.contract import Task
from service.engine.upstream.openai_client import base_url
from service.settings.groups import SettingsGroup
from service.settings.values import CommaSeparated, JsonObject, OptionalName, secret_from_file


class ModelSettings(SettingsGroup, title="model and judge"):
    """Which model judges, and how. API processes and workers that share a queue must agree on these."""

    model: OptionalName = Field(
        None,
        description="model folder, hub id or known name (see `python -m service.models list`); unset: "
        "qwen2.5-coder-1.5b-instruct, or no model with --engine fake",
    )
    engine: Literal["torch", "vllm", "upstream", "fake"] = Field(
        "torch",
        description="what runs the model; torch: works on any machine; vllm: fastest on GPUs; upstream: another server "
        "with OpenAI's API; fake: no model, made-up scores",
    )
    judge: Literal["yes-no", "pairwise", "self-reward", "reward-model"] = Field(
        "yes-no",
        description="how the model judges; yes-no: P(Yes) against P(No); pairwise: P(A) against P(B) for two "
        "responses; self-reward: a grade from 0 to 5; reward-model: a classification head on the conversation",
    )
    self_reward_mode: Literal["expectation", "parsed"] = Field(
        "expectation",
        description="how --judge self-reward grades; expectation: the mean of the digits by their "
        "probabilities; parsed: the grade in the last line of a generated text",
    )
    self_reward_samples: int = Field(
        1,
        ge=1,
        le=64,
        description="parsed grades: texts per judgement, whose grades are averaged; 1: greedy decoding, more: sampling",
    )
    self_reward_tokens: int = Field(256, ge=8, description="parsed grades: maximum tokens per text")
    max_tokens: int | None = Field(
        None, ge=16, description="maximum tokens per prompt; unset: the context length of the model"
    )
    template_file: CommaSeparated[Path] = Field(
        [], description="TOML or JSON files with additional templates, comma-separated"
    )

    @property
    def task(self) -> Task:
        """What the engine must compute for the judge."""
        if self.judge == "self-reward" and self.self_reward_mode == "parsed":
            return "generate"
        return "classify" if self.judge == "reward-model" else "labels"


class EngineSettings(ModelSettings, title="batching"):
    """Settings of every engine."""

    batch_tokens: int | None = Field(None, ge=1, description="maximum tokens per batch; unset: what suits the engine")
    batch_jobs: int = Field(256, ge=1, description="maximum judgements per batch")
    linger_ms: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="milliseconds that an idle engine waits for further jobs to batch with the first (the "
        "scheduler's max_wait)",
    )
    stall_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds after which a batch counts as hung, and the process exits with status 70 so that its "
        "supervisor restarts it; unset: 120; with vllm or parsed grades 600; with upstream at least four times "
        "--upstream-timeout",
    )


class LocalSettings(EngineSettings, title="torch and vllm engines"):
    """Settings of engines that load the weights on this machine."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="number format of the weights; auto: bfloat16 if the hardware supports it, else float32"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; unset: one per core")


class TorchSettings(LocalSettings, title="torch engine"):
    """Settings of the torch engine."""

    device: str = Field("auto", description="torch device; auto: cuda, else mps, else cpu")
    native_kernels: bool = Field(
        True, description="prefill with kernels compiled on this machine, if CPU and model are supported"
    )


class VllmSettings(LocalSettings, title="vllm engine"):
    """Settings of the vllm engine."""

    lora: str | None = Field(
        None,
        pattern=r"^[^=]+=.+$",
        description="NAME=FOLDER of a LoRA adapter to apply; NAME becomes the model's id",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="number of GPUs to split each layer across")
    data_parallel_size: int = Field(1, ge=1, description="number of replicas of the model, each on its own GPUs")
    quantization: str | None = Field(
        None, description="quantize the weights, for example to fp8; unset: as the model's files say"
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="fraction of GPU memory for weights and KV cache; unset: vLLM's default, or on a CPU a KV cache of "
        "4 GiB",
    )
    deterministic: bool = Field(False, description="make scores independent of the batch; slower, GPUs only")
    vllm_args: JsonObject = Field(
        {}, description='JSON object of additional arguments for vLLM\'s engine, such as {"enforce_eager": true}'
    )


class UpstreamSettings(EngineSettings, title="upstream engine"):
    """Settings of the upstream engine, except the server's key: see `UpstreamKey`."""

    upstream_url: Annotated[str, AfterValidator(base_url)] | None = Field(
        None,
        description="base URL of the server, such as http://localhost:8000/v1; its key is read from the environment "
        "variable JUDGE_UPSTREAM_API_KEY only, as other users can see flags",
    )
    upstream_model: OptionalName = Field(
        None, description="name of the model on the server; unset: the only model that it serves"
    )
    upstream_api: Literal["auto", "completions", "chat", "decisions", "systemone"] = Field(
        "auto",
        description="completions: send token ids from the tokenizer of --model (folder or hub id); chat: send text and "
        "match labels by spelling; decisions (OpenAI's) and systemone (TypeSafe's): send text and have the server "
        "choose among the labels, which needs no log-probabilities; auto: completions if --model is given, else chat",
    )
    upstream_top_logprobs: int = Field(20, ge=1, description="number of most likely tokens to request")
    upstream_body: JsonObject = Field(
        {},
        description="JSON object of additional fields for every request, such as "
        '{"chat_template_kwargs": {"enable_thinking": false}}',
    )
    floor: float | None = Field(
        None,
        lt=0,
        description="log-probability, such as -20, to assume for a label that the server did not return, or gave the "
        "probability 0, although it returned another; unset: such an answer is an error",
    )
    upstream_concurrency: int = Field(32, ge=1, description="maximum concurrent requests to the server")
    upstream_timeout: float = Field(
        30.0, gt=0, description="give up on a judgement after this many seconds, retries included"
    )
    upstream_retries: int = Field(5, ge=0, description="maximum retries of a judgement after temporary errors")


class FakeSettings(EngineSettings, title="fake engine"):
    """Settings of the fake engine. They are for tests, so --help does not list them."""

    fake_delay: CliSuppress[float] = Field(0.0, ge=0, description="seconds per batch")
    fake_unparseable: CliSuppress[float] = Field(
        0.0, ge=0, le=1, description="fraction of generated texts without a grade"
    )
    fake_crash_token: CliSuppress[int | None] = Field(None, description="token id that kills the process")
    fake_hang_token: CliSuppress[int | None] = Field(None, description="token id that hangs the process")


class UpstreamKey(SettingsGroup):
    """The key of the upstream server, from the environment only: other users can see flags."""

    upstream_api_key: SecretStr | None = None
    upstream_api_key_file: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_key(cls, values: Any) -> Any:
        return secret_from_file(values, "upstream_api_key")

    @field_validator("upstream_api_key", mode="after")
    @classmethod
    def _strip(cls, value: SecretStr | None) -> SecretStr | None:
        """Strip the newline that files end in; an empty variable counts as unset."""
        stripped = "" if value is None else value.get_secret_value().strip()
        return SecretStr(stripped) if stripped else None

"""What generates the responses: transformers in this process, or vLLM if it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from client.chat import stop_ids
from service.engine.contract import Generated as Generated
from trainer.errors import ModelError, StageError
from trainer.policy.models import DTYPES, DType, choose_device, choose_dtype, load_model

SamplerName: TypeAlias = Literal["auto", "transformers", "vllm"]
# Responses per batch. On a CPU a small model is three times as fast with 64 as with 16.
_BATCH_ROWS: Final = {"cpu": 64}
_BATCH_ROWS_ELSEWHERE: Final = 256
# vLLM schedules the requests itself; this only bounds how much an interruption loses.
_BATCH_ROWS_VLLM: Final = 4096


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How the policy is sampled. Temperature 0 is greedy: all samples of an instruction are the same."""

    samples: int = field(default=4, metadata={"help": "responses per instruction"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature; 0 takes the likeliest token"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus sampling threshold"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest response, in tokens; longer ones are cut off"})
    seed: int = field(default=42, metadata={"help": "seed of the draws"})
    system: str | None = field(default=None, metadata={"help": "system message before each instruction"})
    sampler: SamplerName = field(
        default="auto", metadata={"help": "auto is vllm if it is installed and there is a GPU, else transformers"}
    )
    rows: int | None = field(
        default=None,
        metadata={"help": f"responses per batch ({_BATCH_ROWS['cpu']} on a CPU, {_BATCH_ROWS_ELSEWHERE} on a GPU)"},
    )
    dtype: DType = field(default="auto", metadata={"help": "auto is bfloat16 if the hardware multiplies it natively"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or mps; auto is the fastest available"})

    def __post_init__(self) -> None:
        if min(self.samples, self.max_new_tokens, self.rows or 1) < 1:
            raise ValueError("samples, new tokens and rows are 1 or more")
        if not (0 <= self.temperature < inf and 0 < self.top_p <= 1):
            raise ValueError("the temperature is 0 or more, top_p more than 0 and at most 1")
        if self.sampler not in get_args(SamplerName) or self.dtype not in DTYPES:
            raise ValueError(f"unknown sampler {self.sampler!r} or dtype {self.dtype!r}")

    def described(self) -> dict[str, object]:
        """The settings that decide the responses: all but the device and the batch size."""
        return {key: value for key, value in asdict(self).items() if key not in ("rows", "device")}


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """An instruction's prompt in the model's tokens, and a seed for each response."""

    id: str
    token_ids: list[int]
    seeds: list[int]


# From requests to one response per seed.
Sampler: TypeAlias = Callable[[Sequence[SamplingRequest]], list[list[Generated]]]


def response_seed(seed: int, instruction_id: str, sample: int) -> int:
    """A 63-bit seed of its own for each sample of each instruction, so that no response depends on the others."""
    return int.from_bytes(sha256(f"{seed}\0{instruction_id}\0{sample}".encode()).digest()[:8], "big") >> 1


def make_sampler(folder: Path, tokenizer: Any, settings: SampleSettings) -> tuple[int, Sampler]:
    """How many responses to generate per batch, and the function that does it. Raises ModelError."""
    device = choose_device(settings.device)
    name = settings.sampler
    if name == "auto":
        name = "vllm" if device.type == "cuda" and find_spec("vllm") is not None else "transformers"
    stops = stop_ids(tokenizer, folder)
    if name == "vllm":
        return _BATCH_ROWS_VLLM, _vllm_sampler(folder, stops, settings)
    rows = _BATCH_ROWS.get(device.type, _BATCH_ROWS_ELSEWHERE)
    return rows, _transformers_sampler(folder, stops, settings, device)


def _transformers_sampler(folder: Path, stops: tuple[int, ...], settings: SampleSettings, device: Any) -> Sampler:
    import torch

    from service.engine.torch.decoding import SamplingParams, generate, has_kv_cache

    model = load_model(folder, choose_dtype(settings.dtype, device), device)
    if not has_kv_cache(model):
        raise ModelError(f"{type(model).__name__} does not continue from a KV cache: use --sampler vllm")
    params = SamplingParams(settings.max_new_tokens, stops, settings.temperature, settings.top_p)

    def sample(requests: Sequence[SamplingRequest]) -> list[list[Generated]]:
        prompts, seeds = [request.token_ids for request in requests], [request.seeds for request in requests]
        try:
            return generate(model, prompts, seeds, params)
        except torch.OutOfMemoryError as error:
            raise ModelError("not enough memory for a single response: lower --max-new-tokens") from error
        except ArithmeticError as error:
            raise StageError(
                "the model's logits are NaN or infinite, so nothing can be drawn: its weights are broken (train it "
                "again with a lower --lr), or too large for the dtype (--dtype float32)"
            ) from error

    return sample


def _vllm_sampler(folder: Path, stops: tuple[int, ...], settings: SampleSettings) -> Sampler:
    """vLLM takes a seed per request, but draws other numbers from it than `_transformers_sampler`.

    Written from vLLM's documented interface (LLM, SamplingParams); the project's tests have no GPU to run it on.
    """
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise ModelError("--sampler vllm needs vLLM: pip install vllm, or take --sampler transformers") from error
    # numpy takes seeds of 32 bits only; the draws depend on the requests' own seeds.
    engine = vllm.LLM(model=str(folder), dtype=settings.dtype, seed=settings.seed % 2**31, enable_prefix_caching=True)
    common = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens}

    def sample(requests: Sequence[SamplingRequest]) -> list[list[Generated]]:
        flat = [(request.token_ids, seed) for request in requests for seed in request.seeds]
        outputs = engine.generate(
            [{"prompt_token_ids": token_ids} for token_ids, _ in flat],
            [vllm.SamplingParams(**common, seed=seed, stop_token_ids=list(stops)) for _, seed in flat],
            use_tqdm=False,
        )
        texts = [_vllm_text(output.outputs[0], stops) for output in outputs]
        return [texts[start : start + settings.samples] for start in range(0, len(texts), settings.samples)]

    return sample


def _vllm_text(completion: Any, stops: tuple[int, ...]) -> Generated:
    """vLLM leaves the stop token in the output; the transformers sampler does not."""
    ids, ended = tuple(completion.token_ids), completion.finish_reason == "stop"
    return Generated(ids[:-1] if ended and ids and ids[-1] in stops else ids, ended)

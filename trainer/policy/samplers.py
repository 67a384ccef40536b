"""What writes the responses: transformers in this process, or vLLM where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from trainer.errors import ModelError
from trainer.policy.generation import Decoding, Generated, generate
from trainer.policy.models import DTYPES, DType, choose_device, choose_dtype, eos_ids, load_model

SamplerName: TypeAlias = Literal["auto", "transformers", "vllm"]
# Responses that are written at the same time. On a CPU a small model is three times as fast with 64 as with 16.
_ROWS: Final = {"cpu": 64}
_ROWS_ELSEWHERE: Final = 256
_ROWS_VLLM: Final = 4096


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How the policy is sampled. Temperature 0 is greedy: one response, however many are asked for."""

    samples: int = field(default=4, metadata={"help": "responses to each instruction"})
    temperature: float = field(default=0.7, metadata={"help": "0 takes the likeliest token"})
    top_p: float = field(default=1.0, metadata={"help": "probability that the tokens drawn from hold together"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens after which a response is cut off"})
    seed: int = field(default=42, metadata={"help": "of the draws"})
    system: str | None = field(default=None, metadata={"help": "a system message before each instruction"})
    sampler: SamplerName = field(
        default="auto", metadata={"help": "auto is vllm where it is installed and there is a GPU"}
    )
    rows: int | None = field(
        default=None, metadata={"help": f"responses at a time ({_ROWS['cpu']} on a CPU, {_ROWS_ELSEWHERE} on a GPU)"}
    )
    dtype: DType = field(default="auto", metadata={"help": "auto is bfloat16 where the hardware multiplies it"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, mps; auto takes the best there is"})

    def __post_init__(self) -> None:
        if min(self.samples, self.max_new_tokens, self.rows or 1) < 1:
            raise ValueError("samples, new tokens and rows are 1 or more")
        if not (0 <= self.temperature < inf and 0 < self.top_p <= 1):
            raise ValueError("the temperature is 0 or more, top_p more than 0 and at most 1")
        if self.sampler not in get_args(SamplerName) or self.dtype not in DTYPES:
            raise ValueError(f"unknown sampler {self.sampler!r} or dtype {self.dtype!r}")

    def described(self) -> dict[str, object]:
        """What decides the responses: all but where they are computed and how many at a time."""
        return {key: value for key, value in asdict(self).items() if key not in ("rows", "device")}


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt in the model's tokens, and a seed for each response wanted."""

    id: str
    token_ids: list[int]
    seeds: list[int]


# One response for each seed of each prompt.
Draw: TypeAlias = Callable[[Sequence[Asked]], list[list[Generated]]]


def make_sampler(folder: Path, tokenizer: Any, settings: SampleSettings) -> tuple[int, Draw]:
    """How many responses to draw at a time, and the function that draws them. Raises ModelError."""
    name = settings.sampler
    device = choose_device(settings.device)
    if name == "auto":
        name = "vllm" if device.type == "cuda" and find_spec("vllm") is not None else "transformers"
    eos = eos_ids(folder, tokenizer)
    if name == "vllm":
        return _ROWS_VLLM, _vllm(folder, eos, settings)
    return _ROWS.get(device.type, _ROWS_ELSEWHERE), _transformers(folder, eos, settings, device)


def _transformers(folder: Path, eos: frozenset[int], settings: SampleSettings, device: Any) -> Draw:
    import torch

    model = load_model(folder, choose_dtype(settings.dtype, device)).to(device).eval()
    decoding = Decoding(settings.temperature, settings.top_p, settings.max_new_tokens)

    def draw(batch: Sequence[Asked]) -> list[list[Generated]]:
        try:
            return generate(model, [one.token_ids for one in batch], [one.seeds for one in batch], decoding, eos)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise ModelError("not enough memory for one instruction's samples: ask for shorter ones") from error
        half = len(batch) // 2
        return draw(batch[:half]) + draw(batch[half:])

    return draw


def _vllm(folder: Path, eos: frozenset[int], settings: SampleSettings) -> Draw:
    """The same by vLLM, which takes a seed for each request. Its numbers are not those of the other sampler.

    Written from vLLM's documented interface (LLM, SamplingParams); not run in this project's tests, which have no GPU.
    """
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise ModelError("--sampler vllm needs vLLM: pip install vllm, or take --sampler transformers") from error
    engine = vllm.LLM(model=str(folder), dtype=settings.dtype, seed=settings.seed % 2**31, enable_prefix_caching=True)
    common = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens}

    def draw(batch: Sequence[Asked]) -> list[list[Generated]]:
        requests = [(one.token_ids, seed) for one in batch for seed in one.seeds]
        outputs = engine.generate(
            [{"prompt_token_ids": token_ids} for token_ids, _ in requests],
            [vllm.SamplingParams(**common, seed=seed, stop_token_ids=sorted(eos)) for _, seed in requests],
            use_tqdm=False,
        )
        flat = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            ended = output.outputs[0].finish_reason == "stop"
            flat.append(Generated(ids[:-1] if ended and ids and ids[-1] in eos else ids, ended))
        return [flat[start : start + settings.samples] for start in range(0, len(flat), settings.samples)]

    return draw

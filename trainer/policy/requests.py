"""How the policy is sampled, and what a sampler is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from math import inf
from typing import Final, Literal, TypeAlias, get_args

from client.schema import Message
from service.engine.contract import Generated as Generated
from trainer.flags import FlagGroup
from trainer.policy.models import DTYPES, DType

SamplerName: TypeAlias = Literal["auto", "transformers", "vllm"]

# Responses per batch. On a CPU a small model is three times as fast with 64 as with 16.
BATCH_ROWS: Final = {"cpu": 64}
BATCH_ROWS_ELSEWHERE: Final = 256
# Responses asked of a server at the same time: its own scheduler makes the batches.
IN_FLIGHT: Final = 64

# Not `vllm serve`, which fails in vLLM's build for CPUs: it looks for a package of the name vllm.
SAMPLER_COMMAND: Final = "python -m vllm.entrypoints.openai.api_server --model {model} --host 127.0.0.1 --port {port}"
SAMPLER_KEY_VARIABLE: Final = "SAMPLER_API_KEY"
SERVER: Final = "server"
PATIENCE: Final = 300.0


@dataclass(frozen=True, slots=True)
class SamplerServer:
    """A running server with OpenAI's API that has the policy.

    `model` is the server's name of the policy, None to find it by the policy's name. `patience`: seconds that the
    server may answer nothing before sampling stops. `check_model` is False for a server that the run started itself.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    patience: float = PATIENCE
    check_model: bool = True

    def __post_init__(self) -> None:
        if not self.patience >= 0:
            raise ValueError(f"the patience with a server is 0 or more seconds, not {self.patience}")


def add_server_flags(parser: FlagGroup) -> None:
    """--sampler-url and what goes with it."""
    parser.add_argument(
        "--sampler-url",
        metavar="URL",
        help="sample from a running server with OpenAI's API that serves the policy (vLLM, SGLang, llama.cpp, …), such "
        "as http://localhost:8000/v1",
    )
    parser.add_argument("--sampler-key", metavar="KEY", help=f"its key (default: {SAMPLER_KEY_VARIABLE})")
    parser.add_argument(
        "--sampler-model",
        metavar="NAME",
        help="what the policy is called there (default: the model with the policy's name or folder)",
    )
    parser.add_argument(
        "--sampler-patience",
        type=float,
        default=PATIENCE,
        metavar="N",
        help=f"seconds to wait for a silent server (default: {PATIENCE:g})",
    )


def server_from(args: argparse.Namespace) -> SamplerServer | None:
    """The server that the flags name, if any. Raises ValueError for flags that need one."""
    if args.sampler_url is not None:
        return SamplerServer(args.sampler_url, args.sampler_key, args.sampler_model, args.sampler_patience)
    if args.sampler_key is not None or args.sampler_model is not None:
        raise ValueError("--sampler-key and --sampler-model go with --sampler-url")
    return None


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How the policy is sampled. Temperature 0 is greedy: all samples of an instruction are the same.

    With a `server`, `sampler` and its command, dtype and device have no effect.
    """

    samples: int = field(default=4, metadata={"help": "responses per instruction"})
    temperature: float = field(default=0.7, metadata={"help": "sampling temperature; 0 takes the likeliest token"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus sampling threshold"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest response, in tokens; longer ones are cut off"})
    seed: int = field(default=42, metadata={"help": "seed of the draws"})
    system: str | None = field(default=None, metadata={"help": "system message before each instruction"})
    sampler: SamplerName = field(
        default="auto",
        metadata={
            "help": "transformers samples in this process, vllm in a server that is started for it and stopped "
            "afterwards (see --sampler-command); auto is vllm if it is installed and there is a GPU, else transformers"
        },
    )
    sampler_command: str = field(
        default=SAMPLER_COMMAND,
        metadata={
            "help": "how --sampler vllm starts its server, for a vLLM of another environment or with other flags; any "
            "server with OpenAI's API will do"
        },
    )
    rows: int | None = field(
        default=None,
        metadata={
            "help": f"responses per batch ({BATCH_ROWS['cpu']} on a CPU, {BATCH_ROWS_ELSEWHERE} on a GPU), or asked of "
            f"a server at the same time ({IN_FLIGHT})"
        },
    )
    dtype: DType = field(default="auto", metadata={"help": "auto is bfloat16 if the hardware multiplies it natively"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda or mps; auto is the fastest available"})
    server: SamplerServer | None = None

    def __post_init__(self) -> None:
        if min(self.samples, self.max_new_tokens, self.rows or 1) < 1:
            raise ValueError("samples, new tokens and rows are 1 or more")
        if not (0 <= self.temperature < inf and 0 < self.top_p <= 1):
            raise ValueError("the temperature is 0 or more, top_p more than 0 and at most 1")
        if self.sampler not in get_args(SamplerName) or self.dtype not in DTYPES:
            raise ValueError(f"unknown sampler {self.sampler!r} or dtype {self.dtype!r}")

    def described(self) -> dict[str, object]:
        """The settings that decide the responses: not the device, the batch size, or where a server is."""
        without = ("rows", "device", "server", "sampler_command")
        values = {key: value for key, value in asdict(self).items() if key not in without}
        return values if self.server is None else {**values, "sampler": SERVER}


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """An instruction's prompt in the model's tokens and as messages, and a seed for each response."""

    id: str
    token_ids: list[int]
    seeds: list[int]
    messages: tuple[Message, ...] = ()


# From requests to one response per seed.
Sampler: TypeAlias = Callable[[Sequence[SamplingRequest]], list[list[Generated]]]


def response_seed(seed: int, instruction_id: str, sample: int) -> int:
    """A 63-bit seed of its own for each sample of each instruction, so that no response depends on the others."""
    return int.from_bytes(sha256(f"{seed}\0{instruction_id}\0{sample}".encode()).digest()[:8], "big") >> 1

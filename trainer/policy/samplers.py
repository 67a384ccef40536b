"""What generates the responses: transformers in this process, a server that the run starts, or one that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import httpx

from client.chat import stop_ids
from trainer.errors import ModelError, StageError
from trainer.policy.models import choose_device, choose_dtype, load_model
from trainer.policy.requests import (
    BATCH_ROWS,
    BATCH_ROWS_ELSEWHERE,
    SAMPLER_COMMAND,
    Generated,
    Sampler,
    SamplerServer,
    SampleSettings,
    SamplingRequest,
)
from trainer.run.child_server import ServerCommand, find_program

VLLM: Final = "vllm"
_COMMAND_FLAG: Final = "--sampler-command"


def uses_vllm(settings: SampleSettings) -> bool:
    """Whether the settings ask for a server of the run's own. Raises ModelError for an unknown device."""
    if settings.sampler == "auto":
        return choose_device(settings.device).type == "cuda" and find_spec(VLLM) is not None
    return settings.sampler == VLLM


@contextmanager
def serving_policy(folder: Path, settings: SampleSettings, log: Path) -> Iterator[SamplerServer]:
    """Start a server for the policy, its output in `log`, and stop it afterwards. Raises ModelError and StageError."""
    command = ServerCommand(_COMMAND_FLAG, settings.sampler_command)
    program = command.text.split()[0]
    if find_program(program) is None or (command.text == SAMPLER_COMMAND and find_spec(VLLM) is None):
        raise ModelError(
            "--sampler vllm starts a vLLM that is not there: pip install vllm, or name the Python of an environment "
            f"that has it ({_COMMAND_FLAG} '/path/to/bin/{SAMPLER_COMMAND}'), or take --sampler transformers"
        )
    text = command.text.replace(program, find_program(program) or program, 1)
    with replace(command, text=text).serving(str(folder.resolve()), log, _lists_models) as url:
        yield SamplerServer(f"{url}/v1", check_model=False)


def _lists_models(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def make_sampler(
    folder: Path, tokenizer: Any, settings: SampleSettings, on_step: Callable[[int], None] | None = None
) -> tuple[int, Sampler]:
    """How many responses to generate per batch in this process, and the function that does it.

    `on_step` is told how many tokens each step drew. Raises ModelError.
    """
    device = choose_device(settings.device)
    import torch

    from service.engine.torch.decoding import SamplingParams, generate, has_kv_cache
    from service.engine.torch.prepacked import prepack

    model = load_model(folder, choose_dtype(settings.dtype, device), device)
    if not has_kv_cache(model):
        raise ModelError(f"{type(model).__name__} does not continue from a KV cache: use --sampler vllm")
    rows = BATCH_ROWS.get(device.type, BATCH_ROWS_ELSEWHERE)
    prepack(model, rows)
    stops = stop_ids(tokenizer, folder)
    params = SamplingParams(settings.max_new_tokens, stops, settings.temperature, settings.top_p)

    def sample(requests: Sequence[SamplingRequest]) -> list[list[Generated]]:
        prompts, seeds = [request.token_ids for request in requests], [request.seeds for request in requests]
        try:
            return generate(model, prompts, seeds, params, on_step)
        except torch.OutOfMemoryError as error:
            raise ModelError("not enough memory for a single response: lower --max-new-tokens") from error
        except ArithmeticError as error:
            raise StageError(
                "the model's logits are NaN or infinite, so nothing can be drawn: its weights are broken (train it "
                "again with a lower --lr), or too large for the dtype (--dtype float32)"
            ) from error

    return rows, sample

"""The policy sampled by a real vLLM that the trainer starts: the texts of transformers, and what a seed gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.vllm import VLLM_MARKS
from trainer.policy.requests import SAMPLER_COMMAND, SamplerServer, SampleSettings
from trainer.policy.samplers import serving_policy
from trainer.policy.sampling import Sampled, sample_responses
from trainer.run.files import read_records
from trainer.run.records import Instruction

pytestmark = VLLM_MARKS

INSTRUCTIONS = [Instruction(id=f"q{n}", prompt=f"What is {n}? " + "the quick fox " * n) for n in range(6)]
COMMAND = f"{SAMPLER_COMMAND} --dtype float32 --max-model-len 1024 --max-num-batched-tokens 1024 --enforce-eager"


@pytest.fixture(scope="module")
def sample(vllm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Sampled]]:
    """A function that samples two responses of at most 12 tokens to each instruction."""

    def run(**settings: object) -> list[Sampled]:
        output = tmp_path_factory.mktemp("samples") / "samples.jsonl"
        fixed = {"samples": 2, "max_new_tokens": 12, "dtype": "float32", "device": "cpu"}
        stats = sample_responses(vllm_model, INSTRUCTIONS, output, SampleSettings(**{**fixed, **settings}))  # type: ignore[arg-type]  # the tests' own
        assert (stats.samples, stats.failed) == (12, 0)
        return read_records(output, Sampled)

    return run


def test_vllm_samples_the_policy(
    sample: Callable[..., list[Sampled]], vllm_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes token ids; greedy texts are the transformers sampler's, and a seed decides the drawn ones."""
    settings = SampleSettings(sampler="vllm", sampler_command=COMMAND)
    with serving_policy(vllm_model, settings, tmp_path / "sampler.log") as started:
        running = SamplerServer(started.url)
        greedy, drawn, again = (sample(server=running, temperature=t, top_p=0.9) for t in (0.0, 1.0, 1.0))

    own = sample(temperature=0.0)
    said = capsys.readouterr().err
    assert "loaded from the policy's folder" in said
    assert "asked with token ids" in said
    # vLLM leaves out the bytes of a character that the limit cut in two.
    assert [line.response.rstrip("\ufffd") for line in greedy] == [line.response.rstrip("\ufffd") for line in own]
    assert [(line.key, line.tokens, line.finish) for line in greedy] == [
        (line.key, line.tokens, line.finish) for line in own
    ]
    assert drawn == again
    assert len(drawn) == 12  # no two of an instruction's are equal

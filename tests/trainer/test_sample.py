"""Sampling gives the same responses however it is batched or interrupted, and stops where it should."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from client.schema import Message
from tests.support.tiny import greedy_tokens, make_tiny_model
from tests.support.training import with_nan
from trainer.errors import InputError, ModelError, StageError
from trainer.instructions.reading import read_instructions
from trainer.policy.models import load_model
from trainer.policy.requests import SampleSettings, response_seed
from trainer.policy.sampling import Sampled, sample_responses
from trainer.policy.tokenizers import chat_ids, load_tokenizer
from trainer.run.files import read_records
from trainer.run.records import Instruction
from trainer.sample import main

INSTRUCTIONS = [Instruction(id=f"q{n}", prompt=f"What is {n}? " + "the quick fox " * n) for n in range(7)]
SMALL = {"dtype": "float32", "device": "cpu", "max_new_tokens": 12}


@pytest.fixture
def samples(tiny_model: Path, tmp_path: Path) -> Any:
    """A function that samples with the given settings and returns the path of the file."""

    def make(name: str = "samples", model: Path = tiny_model, **settings: Any) -> Path:
        output = tmp_path / f"{name}.jsonl"
        sample_responses(model, INSTRUCTIONS, output, SampleSettings(**{**SMALL, **settings}))
        return output

    return make


@pytest.fixture
def ending_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, with one token in eight as the end of a response."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "ending"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 600, 8))}))
    return folder


def texts(path: Path) -> dict[tuple[str, int], str]:
    """The responses of a file, by instruction and number."""
    return {line.key: line.response for line in read_records(path, Sampled)}


def test_every_instruction_gets_its_samples(samples: Any) -> None:
    """Each instruction has k samples, counting duplicates by `copies`."""
    lines = read_records(samples(samples=3), Sampled)

    counts = Counter[str]()
    for line in lines:
        counts[line.id] += line.copies
    assert counts == {instruction.id: 3 for instruction in INSTRUCTIONS}


def test_the_seed_decides(samples: Any) -> None:
    """The same seed gives the same file, another seed gives other responses."""
    first, again, other = samples("first", seed=1), samples("again", seed=1), samples("other", seed=2)

    assert first.read_bytes() == again.read_bytes()
    assert texts(first) != texts(other)


def test_a_response_does_not_depend_on_its_batch(samples: Any, ending_model: Path) -> None:
    """One instruction at a time gives the same responses as all at once, though rows leave the batch as they end."""
    alone, together = (samples(f"by-{rows}", ending_model, rows=rows) for rows in (1, 1000))

    assert texts(alone) == texts(together)
    assert {line.finish for line in read_records(together, Sampled)} == {"stop", "length"}


def test_an_interrupted_run_ends_like_an_undisturbed_one(samples: Any, ending_model: Path) -> None:
    """Half a batch and a torn line are sampled again, and the file comes out the same, byte for byte."""
    whole = samples("whole", ending_model, rows=8)
    lines = whole.read_bytes().splitlines(keepends=True)
    whole.with_name("resumed.jsonl").write_bytes(b"".join(lines[:10]) + lines[10][:9])

    resumed = samples("resumed", ending_model, rows=8)

    assert resumed.read_bytes() == whole.read_bytes()


def test_a_complete_file_is_left_alone(samples: Any) -> None:
    """A rerun on a complete file writes nothing."""
    before = samples().stat()

    after = samples().stat()

    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_equal_responses_are_kept_once(samples: Any) -> None:
    """Greedy sampling gives one line per instruction, which counts its copies."""
    lines = read_records(samples(temperature=0.0, samples=3), Sampled)

    assert [line.copies for line in lines] == [3] * len(INSTRUCTIONS)


def test_a_cut_off_response_is_marked(samples: Any) -> None:
    """A response that reached the limit has finish "length" and as many tokens as the limit."""
    lines = read_records(samples(max_new_tokens=2), Sampled)

    cut = [line for line in lines if line.finish == "length"]
    assert cut
    assert {line.tokens for line in cut} == {2}


def test_every_end_token_of_the_generation_configuration_stops(samples: Any, tiny_model: Path, tmp_path: Path) -> None:
    """A second end-of-sequence token ends a response, and is not part of it."""
    tokenizer = load_tokenizer(tiny_model)
    prompt = chat_ids(tokenizer, [Message(role="user", content=INSTRUCTIONS[0].prompt)])
    likeliest = greedy_tokens(load_model(tiny_model, torch.float32), prompt, 3, eos_token_id=None)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "two-ends"))
    ends = [tokenizer.eos_token_id, likeliest[2]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))

    line = next(one for one in read_records(samples(model=folder, temperature=0.0), Sampled) if one.id == "q0")

    assert (line.finish, line.tokens) == ("stop", likeliest.index(likeliest[2]))


def test_every_sample_has_a_seed_of_its_own() -> None:
    """It depends on the run's seed, the instruction and the sample's number, and is the same in every version."""
    names = itertools.product((1, 2), ("a", "b"), (0, 1))

    assert len({response_seed(*name) for name in names}) == 8
    assert response_seed(1, "a", 0) == 2467557379929174221


def test_a_model_with_nan_weights_samples_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """The error says what to do, and a rerun can resume."""
    folder = with_nan(tiny_model, tmp_path / "nan", "model.norm.weight")

    with pytest.raises(StageError, match=r"NaN or infinite.*--dtype float32"):
        sample_responses(folder, INSTRUCTIONS, tmp_path / "s.jsonl", SampleSettings(**SMALL))


def test_a_model_without_a_chat_template_gets_a_plain_one(tmp_path: Path) -> None:
    """A base model is prompted with "User: …" and "Assistant:", and its answers end with its own end token."""
    folder = make_tiny_model(tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    turns = [Message(role="user", content="Hi"), Message(role="assistant", content="Yes")]

    assert tokenizer.decode(chat_ids(tokenizer, turns[:1])) == "User: Hi\n\nAssistant:"
    assert (
        tokenizer.decode(chat_ids(tokenizer, turns, add_generation_prompt=False))
        == "User: Hi\n\nAssistant: Yes<|im_end|>\n\n"
    )


def test_a_prompt_without_room_is_counted(tmp_path: Path) -> None:
    """An instruction that fills the model's context is left out and counted."""
    folder = make_tiny_model(tmp_path / "short", max_tokens=40)

    stats = sample_responses(folder, INSTRUCTIONS, tmp_path / "s.jsonl", SampleSettings(**SMALL))

    assert stats.too_long > 0
    assert stats.instructions == len(INSTRUCTIONS) - stats.too_long


def test_progress_is_told_within_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    """In tokens, as a batch takes minutes on a CPU; at the end they are those of the samples."""
    told: list[tuple[int, str]] = []

    stats = sample_responses(
        tiny_model,
        INSTRUCTIONS,
        tmp_path / "s.jsonl",
        SampleSettings(**SMALL),
        lambda progress: told.append((progress.done, progress.note)),
    )

    assert sum(done == 0 and "tokens, " in note for done, note in told) > 1
    assert told[-1][0] == len(INSTRUCTIONS)
    assert told[-1][1].startswith(f"{stats.tokens:,} tokens, ")


def test_ids_that_repeat_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Two instructions with one id could not be told apart later."""
    with pytest.raises(InputError, match="share their id"):
        sample_responses(tiny_model, [INSTRUCTIONS[0], INSTRUCTIONS[0]], tmp_path / "s.jsonl")


def test_an_unknown_model_is_refused_with_a_way_out(tmp_path: Path) -> None:
    """The error for a name that is neither folder nor hub id lists the models that the service knows."""
    with pytest.raises(ModelError, match=r"nor a known name \(known: .*smollm2-135m-instruct"):
        sample_responses("smollm2", INSTRUCTIONS, tmp_path / "s.jsonl")


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> list[str]:
    """Arguments that sample two instructions into tmp_path/out."""
    (tmp_path / "i.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in INSTRUCTIONS[:2]))
    files = ["--instructions", str(tmp_path / "i.jsonl"), "--output", str(tmp_path / "out")]
    return ["--model", str(tiny_model), *files]


def test_the_command_samples_once(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes samples.jsonl; repeated it finds the file complete, and other settings are refused."""
    codes = [main([*command, "--max-new-tokens", limit]) for limit in ("4", "4", "5")]

    assert codes == [0, 0, 1]
    assert "is complete" in capsys.readouterr().err
    assert len({line.id for line in read_records(tmp_path / "out" / "samples.jsonl", Sampled)}) == 2


def test_instructions_need_no_ids(command: list[str], tmp_path: Path) -> None:
    """A line without one gets the id that the training loop gives it."""
    (tmp_path / "i.jsonl").write_text('{"prompt": "What is 2+2?"}\n')

    assert main([*command, "--samples", "1", "--max-new-tokens", "4"]) == 0

    (sample,) = read_records(tmp_path / "out" / "samples.jsonl", Sampled)
    (given,) = read_instructions(str(tmp_path / "i.jsonl")).instructions
    assert sample.id == given.instruction.id


@pytest.mark.parametrize(
    "flags", [["--temperature", "-1"], ["--samples", "0"], ["--model", "nowhere"], ["--device", "nowhere"]]
)
def test_what_cannot_be_sampled_is_usage(flags: list[str], command: list[str]) -> None:
    """Impossible settings, models and devices exit with 2."""
    assert main([*command, *flags]) == 2

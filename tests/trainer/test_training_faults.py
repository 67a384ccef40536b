"""Training that changes nothing, or breaks: every step has a rate, NaN stops it, and what is not continued is told."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.support.training import (
    TOY,
    Killed,
    adapter_weights,
    kill_at,
    log_lines,
    said,
    toy_preferences,
    toy_settings,
    with_nan,
)
from trainer.dpo import DPO_FILE, DPO_LOG, main, train_dpo
from trainer.errors import StageError
from trainer.evaluate import model_of
from trainer.policy.weights import model_digest
from trainer.run.stages import Stage
from trainer.sft import SFT_LOG, Example, sft_settings, train_sft
from trainer.tuning.preferences import Preference, Split
from trainer.tuning.settings import CHECKPOINTS
from trainer.tuning.training import TrainingError

DATA = Split(train=toy_preferences(16), held_out=[])
FEW = Split(train=toy_preferences(4), held_out=[])


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be touched."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def killed(model: Path, tmp_path: Path) -> Path:
    """The folder of a training of four steps that was killed after the third; a checkpoint is made every two."""
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train_dpo(model, DATA, folder, toy_settings(), kill_at(3))
    return folder


def rates(log: Path) -> list[float]:
    """The learning rate of each step."""
    return [line["learning_rate"] for line in log_lines(log)]


def first_step(model: Path, folder: Path, data: Split = DATA, **changes: Any) -> int:
    """Where a further training in the folder begins: 0, or the checkpoint's step."""
    seen: list[int] = []
    train_dpo(model, data, folder, toy_settings(**changes), lambda advance: seen.append(advance.done))
    return seen[0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_no_rate_is_zero(warmup: float, schedule: Any) -> None:
    """For any number of steps each has a rate above 0, which rises to the peak, reaches it, and then never rises."""
    from trainer.tuning.settings import rate_factor

    for steps in (1, 2, 3, 10, 1000):
        found = [rate_factor(step, steps=steps, warmup=warmup, schedule=schedule) for step in range(steps)]
        peak = found.index(1.0)
        assert min(found) > 0
        assert max(found) == 1
        assert found == sorted(found[: peak + 1]) + sorted(found[peak + 1 :], reverse=True)


def test_one_step_of_dpo_changes_the_model(tiny_model: Path, tmp_path: Path) -> None:
    """Four pairs are one step, at the peak rate."""
    result = train_dpo(tiny_model, FEW, tmp_path, toy_settings(epochs=1.0))

    assert result.steps == 1
    assert rates(tmp_path / DPO_LOG) == [toy_settings().lr]
    assert any(tensor.any() for name, tensor in adapter_weights(tmp_path).items() if "lora_B" in name)


def test_one_step_of_sft_changes_the_model(tiny_model: Path, tmp_path: Path) -> None:
    """So does one step on answers."""
    example = Example(prompt=[said("user", "Question")], completion=[said("assistant", "Paris")])
    train_sft(tiny_model, [example], tmp_path, sft_settings(**{**TOY, "epochs": 1.0}))

    assert rates(tmp_path / SFT_LOG) == [TOY["lr"]]
    assert any(tensor.any() for name, tensor in adapter_weights(tmp_path).items() if "lora_B" in name)


def test_a_resumed_schedule_is_the_undisturbed_one(killed: Path, model: Path, tmp_path: Path) -> None:
    """Interrupted in mid-schedule, the rates and the weights come out bit for bit."""
    train_dpo(model, DATA, killed, toy_settings())
    train_dpo(model, DATA, tmp_path / "undisturbed", toy_settings())

    assert rates(killed / DPO_LOG) == rates(tmp_path / "undisturbed" / DPO_LOG)
    assert min(rates(killed / DPO_LOG)) > 0
    found, expected = adapter_weights(killed), adapter_weights(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_that_changed_nothing_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate too small for fp32 leaves every weight as it was: dpo.json and stderr say it."""
    train_dpo(tiny_model, FEW, tmp_path, toy_settings(lr=1e-60, epochs=1.0))

    assert json.loads((tmp_path / DPO_FILE).read_text())["changed"] is False
    assert "changed no weight" in capsys.readouterr().err


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "epochs", "clip", "beta", "warmup"])
def test_settings_that_are_no_numbers_are_refused(name: str, number: float) -> None:
    """NaN passes every comparison, and is refused by itself."""
    with pytest.raises(ValueError, match=r"."):
        toy_settings(**{name: number})


def test_nan_weights_stop_training_at_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with code 1 and advice; there is no result, no marker, and no NaN in any JSON."""
    broken = with_nan(tiny_model, tmp_path / "nan", "model.layers.1.mlp.up_proj.weight")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(one.model_dump_json() + "\n" for one in FEW.train))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TOY.items()]
    out = tmp_path / "out"

    code = main(["--model", str(broken), "--pairs", str(pairs), "--output", str(out), "--held-out=0", *flags])

    assert code == 1
    assert "Lower --lr" in capsys.readouterr().err
    assert not any((out / name).exists() for name in ("dpo.done", DPO_FILE, "adapter", "merged"))
    assert not [file for file in out.rglob("*.json*") if "NaN" in file.read_text()]


def test_a_rate_that_breaks_the_weights_stops_training(tiny_model: Path, tmp_path: Path) -> None:
    """The first step with weights or losses that are infinite is the last, and is in no checkpoint."""
    with pytest.raises(TrainingError, match=r"step [12]"):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings(lr=3e38, save_steps=1, warmup=0.0))

    assert not (tmp_path / "adapter").exists()
    kept = [load_file(file) for file in (tmp_path / CHECKPOINTS).glob("checkpoint-*/adapter_model.safetensors")]
    assert all(tensor.isfinite().all() for weights in kept for tensor in weights.values())


def test_nan_after_a_checkpoint_leaves_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """One bad token in a later batch stops training there; the checkpoint before it stays, and so does the log."""
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tilde = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    model.get_input_embeddings().weight.data[tilde] = float("nan")
    model.save_pretrained(folder)
    bad = Preference(
        prompt=[said("user", "~")], chosen=[said("assistant", "Paris")], rejected=[said("assistant", "fox")]
    )
    # In the order of this seed the first of 24 is in the third batch of eight.
    data = Split([bad, *toy_preferences(23)], [])

    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        train_dpo(folder, data, tmp_path / "run", toy_settings(save_steps=1, epochs=1.0))

    assert (tmp_path / "run" / CHECKPOINTS / "checkpoint-2").is_dir()
    assert len(log_lines(tmp_path / "run" / DPO_LOG)) == 2


def test_other_times_of_files_change_nothing(killed: Path, model: Path, tmp_path: Path) -> None:
    """A model that was copied, touched or moved is the same model: its checkpoint is gone on with."""
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    for file in moved.iterdir():
        os.utime(file, (1, 1))

    assert first_step(moved, killed) == 2


def test_another_micro_batch_goes_on(killed: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same batch in other parts is the same training but for rounding, which is said."""
    assert first_step(model, killed, micro_batch=2) == 2
    assert "checkpoint-2 with another --micro-batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "data", "told"),
    [({"lr": 1e-3}, DATA, "other lr:"), ({}, Split(toy_preferences(17)[1:], []), "other data:")],
)
def test_a_checkpoint_that_is_not_continued_is_named(
    changes: dict[str, Any],
    data: Split,
    told: str,
    killed: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Which one, and what is other now."""
    assert first_step(model, killed, data, **changes) == 0
    err = capsys.readouterr().err
    assert "checkpoint-2 is not continued" in err
    assert told in err


def test_edited_weights_of_the_same_size_and_time_are_another_model(
    killed: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a file holds counts."""
    file = model / "model.safetensors"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-4:] = b"\x00\x00\x00\x40"
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert first_step(model, killed) == 0
    assert "other model:" in capsys.readouterr().err


def test_checkpoints_of_an_earlier_version_are_refused(killed: Path, model: Path) -> None:
    """Their learning rates were others: they are kept, and the message says how to end them."""
    marker = killed / CHECKPOINTS / "made_from.json"
    marker.write_text(json.dumps({"model": ["m", []], "data": [[], []], "processes": [1, 4], "lr": 0.005}))

    with pytest.raises(StageError, match="checkpoint-2 cannot be continued: it was begun by an earlier version"):
        train_dpo(model, DATA, killed, toy_settings())
    assert (killed / CHECKPOINTS / "checkpoint-2").is_dir()


def test_a_stage_knows_its_model_by_content(model: Path, tmp_path: Path) -> None:
    """A finished stage stays done when the model is touched or moved, and not when one weight has changed."""

    def stage(folder: Path) -> Stage:
        return Stage(tmp_path, "samples", ("samples.jsonl",), {"model": model_of(str(folder)).identity})

    stage(model).begin()
    (tmp_path / "samples.jsonl").touch()
    stage(model).finish()
    os.utime(model / "model.safetensors", (1, 1))
    moved = Path(shutil.move(model, tmp_path / "moved"))

    assert stage(moved).done
    assert not stage(with_nan(moved, tmp_path / "other", "model.norm.weight")).done


@pytest.mark.parametrize("name", ["pytorch_model.bin", "additional_chat_templates/default.jinja"])
def test_a_model_is_also_what_lies_elsewhere(name: str, model: Path) -> None:
    """Weights in another format and a chat template that takes the place of the first are part of what a model is."""
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"one")
    first = model_digest(model)
    (model / name).write_bytes(b"two")

    assert model_digest(model) != first


def test_stages_of_an_earlier_version_are_known_by_sizes_and_times(model: Path, tmp_path: Path) -> None:
    """What it wrote still holds while the files are untouched."""
    stage = Stage(tmp_path, "samples", ("samples.jsonl",), {"model": model_of(str(model)).identity})
    stat = (model / "model.safetensors").stat()
    mark = [str(model), [["model.safetensors", stat.st_size, stat.st_mtime_ns]]]
    (tmp_path / "samples.jsonl").touch()
    (tmp_path / "samples.done").write_text(json.dumps({"model": mark}))

    assert stage.done
    os.utime(model / "model.safetensors", (1, 1))
    assert not stage.done

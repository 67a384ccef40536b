"""Training that changes nothing, or breaks: no rate is zero, NaN stops training, and refused checkpoints are named."""

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
    TOY_FLAGS,
    Killed,
    adapter_weights,
    kill_at,
    logged,
    said,
    toy_preferences,
    toy_settings,
    trained_steps,
    with_nan,
)
from trainer.dpo import main
from trainer.errors import StageError
from trainer.policy.model_ref import model_ref
from trainer.run.model_files import model_digest
from trainer.run.stages import Stage
from trainer.tuning.checkpoints import TrainingError
from trainer.tuning.dpo import DPO, train_dpo
from trainer.tuning.preferences import Preference, Split
from trainer.tuning.settings import CHECKPOINTS, rate_factor
from trainer.tuning.sft import SFT, Example, sft_settings, train_sft
from trainer.tuning.training import Recipe

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


def rates(folder: Path, recipe: Recipe = DPO) -> list[float]:
    """The learning rate of each step."""
    return logged(folder / recipe.log, "learning_rate")


def first_step(model: Path, folder: Path, data: Split = DATA, **changes: Any) -> int:
    """Where another training in the folder starts: at 0, or at the checkpoint's step."""
    return trained_steps(model, data, folder, **changes)[0]


def is_trained(folder: Path) -> bool:
    """Whether the adapter changes anything: LoRA's B starts at 0."""
    return any(tensor.any() for name, tensor in adapter_weights(folder).items() if "lora_B" in name)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_no_rate_is_zero(warmup: float, schedule: Any) -> None:
    """For any number of steps the rates are above 0, rise to the peak, reach it, and never rise again."""
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
    assert rates(tmp_path) == [toy_settings().lr]
    assert is_trained(tmp_path)


def test_one_step_of_sft_changes_the_model(tiny_model: Path, tmp_path: Path) -> None:
    """One example is one step, at the peak rate."""
    example = Example(prompt=[said("user", "Question")], completion=[said("assistant", "Paris")])
    train_sft(tiny_model, [example], tmp_path, sft_settings(**{**TOY, "epochs": 1.0}))

    assert rates(tmp_path, SFT) == [TOY["lr"]]
    assert is_trained(tmp_path)


def test_a_resumed_schedule_is_the_undisturbed_one(killed: Path, model: Path, tmp_path: Path) -> None:
    """Interrupted in mid-schedule, rates and weights are the same, bit for bit."""
    train_dpo(model, DATA, killed, toy_settings())
    train_dpo(model, DATA, tmp_path / "undisturbed", toy_settings())

    assert rates(killed) == rates(tmp_path / "undisturbed")
    assert min(rates(killed)) > 0
    found, expected = adapter_weights(killed), adapter_weights(tmp_path / "undisturbed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_that_changed_nothing_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate too small for fp32 leaves every weight as it was; dpo.json and stderr say so."""
    train_dpo(tiny_model, FEW, tmp_path, toy_settings(lr=1e-60, epochs=1.0))

    assert json.loads((tmp_path / DPO.file).read_text())["changed"] is False
    assert "changed no weight" in capsys.readouterr().err


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "epochs", "clip", "beta", "warmup"])
def test_settings_that_are_not_finite_are_refused(name: str, number: float) -> None:
    """NaN would pass a check for numbers below 0."""
    with pytest.raises(ValueError, match=r"."):
        toy_settings(**{name: number})


def test_nan_weights_stop_training_at_once(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command exits with 1 and advice; there is no result, no marker, and no NaN in any JSON."""
    broken = with_nan(tiny_model, tmp_path / "nan", "model.layers.1.mlp.up_proj.weight")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(one.model_dump_json() + "\n" for one in FEW.train))
    out = tmp_path / "out"

    code = main(["--model", str(broken), "--pairs", str(pairs), "--output", str(out), "--held-out=0", *TOY_FLAGS])

    assert code == 1
    assert "Lower --lr" in capsys.readouterr().err
    assert not any((out / name).exists() for name in ("dpo.done", DPO.file, "adapter", "merged"))
    assert not [file for file in out.rglob("*.json*") if "NaN" in file.read_text()]


def test_a_rate_that_breaks_the_weights_stops_training(tiny_model: Path, tmp_path: Path) -> None:
    """Training ends at the first step whose loss or weights are infinite, before a checkpoint holds them."""
    with pytest.raises(TrainingError, match=r"step [12]"):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings(lr=3e38, save_steps=1, warmup=0.0))

    assert not (tmp_path / "adapter").exists()
    kept = [load_file(file) for file in (tmp_path / CHECKPOINTS).glob("checkpoint-*/adapter_model.safetensors")]
    assert all(tensor.isfinite().all() for weights in kept for tensor in weights.values())


def test_nan_after_a_checkpoint_leaves_the_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    """A bad token in a later batch stops training there; the checkpoint and the log before it stay."""
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
    # This seed's order puts the first of 24 into the third batch of eight.
    data = Split([bad, *toy_preferences(23)], [])

    with pytest.raises(TrainingError, match="the loss of step 3 is nan"):
        train_dpo(folder, data, tmp_path / "run", toy_settings(save_steps=1, epochs=1.0))

    assert (tmp_path / "run" / CHECKPOINTS / "checkpoint-2").is_dir()
    assert len(logged(tmp_path / "run" / DPO.log)) == 2


def test_other_times_of_files_change_nothing(killed: Path, model: Path, tmp_path: Path) -> None:
    """A model that was copied, touched or moved is the same model: its checkpoint is resumed."""
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    for file in moved.iterdir():
        os.utime(file, (1, 1))

    assert first_step(moved, killed) == 2


def test_a_checkpoint_is_resumed_with_another_micro_batch(
    killed: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same batch in other parts is the same training except for rounding, which stderr says."""
    assert first_step(model, killed, micro_batch=2) == 2
    assert "checkpoint-2 with another --micro-batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "data", "reason"),
    [({"lr": 1e-3}, DATA, "other lr:"), ({}, Split(toy_preferences(17)[1:], []), "other data:")],
)
def test_a_checkpoint_that_is_not_continued_is_named(
    changes: dict[str, Any],
    data: Split,
    reason: str,
    killed: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """stderr says which one, and what has changed."""
    assert first_step(model, killed, data, **changes) == 0
    err = capsys.readouterr().err
    assert "checkpoint-2 is not continued" in err
    assert reason in err


def test_edited_weights_of_the_same_size_and_time_are_another_model(
    killed: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model is identified by the contents of its files."""
    file = model / "model.safetensors"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-4:] = b"\x00\x00\x00\x40"
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert first_step(model, killed) == 0
    assert "other model:" in capsys.readouterr().err


def test_checkpoints_of_an_earlier_version_are_refused(killed: Path, model: Path) -> None:
    """Their learning rates differed: they are kept, and the message says what to do."""
    marker = killed / CHECKPOINTS / "made_from.json"
    marker.write_text(json.dumps({"model": ["m", []], "data": [[], []], "processes": [1, 4], "lr": 0.005}))

    with pytest.raises(StageError, match="checkpoint-2 cannot be continued: it was begun by an earlier version"):
        train_dpo(model, DATA, killed, toy_settings())
    assert (killed / CHECKPOINTS / "checkpoint-2").is_dir()


def test_a_stage_identifies_its_model_by_content(model: Path, tmp_path: Path) -> None:
    """A finished stage stays done if the model is touched or moved, but not if one weight has changed."""

    def stage(folder: Path) -> Stage:
        return Stage(tmp_path, "samples", ("samples.jsonl",), {"model": model_ref(str(folder)).identity})

    stage(model).begin()
    (tmp_path / "samples.jsonl").touch()
    stage(model).finish()
    os.utime(model / "model.safetensors", (1, 1))
    moved = Path(shutil.move(model, tmp_path / "moved"))

    assert stage(moved).done
    assert not stage(with_nan(moved, tmp_path / "other", "model.norm.weight")).done


@pytest.mark.parametrize("name", ["pytorch_model.bin", "additional_chat_templates/default.jinja"])
def test_a_models_digest_covers_other_formats(name: str, model: Path) -> None:
    """Weights in another format and a chat template that overrides the first are part of the model."""
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"one")
    first = model_digest(model)
    (model / name).write_bytes(b"two")

    assert model_digest(model) != first


def test_stages_of_an_earlier_version_go_by_sizes_and_times(model: Path, tmp_path: Path) -> None:
    """Its markers hold as long as the files are untouched."""
    stage = Stage(tmp_path, "samples", ("samples.jsonl",), {"model": model_ref(str(model)).identity})
    stat = (model / "model.safetensors").stat()
    mark = [str(model), [["model.safetensors", stat.st_size, stat.st_mtime_ns]]]
    (tmp_path / "samples.jsonl").touch()
    (tmp_path / "samples.done").write_text(json.dumps({"model": mark}))

    assert stage.done
    os.utime(model / "model.safetensors", (1, 1))
    assert not stage.done

"""The training loop: it learns, keeps labels' probability, and an interrupted one ends like an undisturbed one."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.training import files_no_longer_than, with_nan
from tests.trainer.judge.makers import (
    Reports,
    adapter_of,
    examples_of,
    same_adapter,
    toy_labels,
    toy_settings,
    train_toy,
)
from trainer.errors import InputError, ModelError
from trainer.policy.models import quiet_libraries
from trainer.run.model_files import TensorFiles
from trainer.run.stages import content_digest
from trainer.tuning.checkpoints import TrainingError
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.reader import OwnReader, read_prompts
from trainer.tuning.judge.training import train_judge

LABELS = toy_labels(24)


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    """Twenty-four labels as prompts."""
    return examples_of(tiny_model, LABELS)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing interrupted: six steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_toy(tiny_model, examples, folder)
    return folder


def log_of(folder: Path) -> list[dict[str, float]]:
    """The lines of the log."""
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_it_learns_which_answer_is_better(tiny_model: Path, undisturbed: Path) -> None:
    """The loss falls, and base and adapter together put answers right that the base does not know."""
    unseen = examples_of(tiny_model, toy_labels(40)[24:])
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with quiet_libraries():
        tuned = PeftModel.from_pretrained(base, str(undisturbed / "adapter"))
    log = log_of(undisturbed)

    with torch.no_grad():
        margins = [
            (readings.log_odds[0] - readings.log_odds[1]).item()
            for readings in (read_prompts(OwnReader(tuned.base_model.model), e.prompts) for e in unseen)
        ]

    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < log[0]["loss"] / 2
    assert sum(margin > 0 for margin in margins) == len(margins)


def test_the_mass_term_keeps_labels_likely(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    """With the term the labels' probability grows; without it nothing asks for it."""
    train_toy(tiny_model, examples, tmp_path / "with", mass_weight=1.0)
    train_toy(tiny_model, examples, tmp_path / "without", mass_weight=0.0)

    assert log_of(tmp_path / "with")[-1]["mass"] < log_of(tmp_path / "without")[-1]["mass"] / 2


def test_the_base_stays_as_it_is(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    """Training writes nothing into the base's folder, and its adapter has fp32 weights."""
    before = content_digest(tiny_model)
    result = train_toy(tiny_model, examples, tmp_path)

    assert content_digest(tiny_model) == before
    assert result.changed
    assert result.packed
    assert {weight.dtype for weight in adapter_of(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize("at", [2, 4, 6])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=["ctrl-c", "killed"])
def test_an_interrupted_training_ends_like_an_undisturbed_one(
    tiny_model: Path, examples: list[Example], undisturbed: Path, tmp_path: Path, at: int, error: BaseException
) -> None:
    """Interrupted after some step, by Ctrl-C or by a kill, the same command gives the same weights and the same log."""
    settings = toy_settings()
    with pytest.raises(type(error)):
        train_judge(str(tiny_model), examples, tmp_path, settings, Reports(error, at))

    train_judge(str(tiny_model), examples, tmp_path, settings, Reports())

    assert same_adapter(tmp_path, undisturbed)
    assert log_of(tmp_path) == log_of(undisturbed)
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_loses_no_step(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    """Interrupted after its third step, between two checkpoints, a training goes on with the fourth."""
    with pytest.raises(KeyboardInterrupt):
        train_judge(str(tiny_model), examples, tmp_path, toy_settings(), Reports(KeyboardInterrupt(), at=4))

    resumed = Reports()
    train_judge(str(tiny_model), examples, tmp_path, toy_settings(), resumed)

    assert resumed.known == log_of(tmp_path)[2]["tokens"]
    assert len(resumed.done) == 1 + 3


def test_dropout_survives_an_interruption(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    """The random numbers of a resumed training are those of an undisturbed one."""
    train_toy(tiny_model, examples, tmp_path / "whole", dropout=0.3)
    settings = toy_settings(dropout=0.3)
    with pytest.raises(KeyboardInterrupt):
        train_judge(str(tiny_model), examples, tmp_path / "cut", settings, Reports(KeyboardInterrupt(), at=4))

    train_judge(str(tiny_model), examples, tmp_path / "cut", settings, Reports())

    assert same_adapter(tmp_path / "cut", tmp_path / "whole")


def test_other_settings_start_over(
    tiny_model: Path, examples: list[Example], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of another learning rate is not continued, and stderr says so."""
    with pytest.raises(KeyboardInterrupt):
        train_judge(str(tiny_model), examples, tmp_path, toy_settings(), Reports(KeyboardInterrupt(), at=4))

    restarted = Reports()
    train_judge(str(tiny_model), examples, tmp_path, toy_settings(lr=1e-3), restarted)

    assert restarted.known == 0
    assert "begun with other lr" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_training(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    """Weights that explode stop the training with advice; the checkpoint before is kept."""
    with pytest.raises(TrainingError, match=r"NaN or infinite.*Lower --lr"):
        train_toy(tiny_model, examples, tmp_path, lr=1e30, warmup=0.5, schedule="constant_with_warmup", save_steps=1)

    assert not (tmp_path / "adapter").exists()
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 1


def test_a_model_with_nan_is_refused(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    """A base whose weights hold NaN is refused before the first step."""
    broken = with_nan(tiny_model, tmp_path / "broken", "model.norm.weight")

    with pytest.raises(ModelError, match="NaN"):
        train_toy(broken, examples, tmp_path / "run")


def test_a_full_disk_is_said_and_the_checkpoint_stays(
    tiny_model: Path, examples: list[Example], undisturbed: Path, tmp_path: Path
) -> None:
    """If the adapter cannot be written, the error says so, and with room the training ends from its checkpoint."""
    with files_no_longer_than(20_000), pytest.raises(TrainingError, match="no room to write"):
        train_toy(tiny_model, examples, tmp_path)

    train_toy(tiny_model, examples, tmp_path)

    assert same_adapter(tmp_path, undisturbed)


def test_memory_can_be_saved(tiny_model: Path, examples: list[Example], undisturbed: Path, tmp_path: Path) -> None:
    """With gradient checkpointing, and with smaller passes, the weights are the same except for rounding."""
    train_toy(tiny_model, examples, tmp_path, gradient_checkpointing=True, pass_tokens=256)

    expected, found = adapter_of(undisturbed), adapter_of(tmp_path)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-3)


def test_full_training_changes_all_but_embeddings_and_head(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    """--method full saves a whole model in fp32: its layers are others, embeddings and output layer the base's."""
    result = train_toy(tiny_model, examples, tmp_path, method="full", lr=1e-3)

    with TensorFiles(tiny_model) as base, TensorFiles(tmp_path / "model") as tuned:
        changed = {name for name in base.names if not torch.equal(base[name].float(), tuned[name])}
        assert {tuned[name].dtype for name in tuned.names} == {torch.float32}
        assert {name for name in base.names if ".layers." in name} <= changed
        assert not any("embed_tokens" in name or "lm_head" in name for name in changed)
    log = log_of(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"] / 2
    assert result.changed
    assert not (tmp_path / "adapter").exists()


def test_an_interrupted_full_training_ends_like_an_undisturbed_one(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    """Checkpoints hold whatever is trained."""
    whole, cut, settings = tmp_path / "whole", tmp_path / "cut", toy_settings(method="full", lr=1e-3)
    train_judge(str(tiny_model), examples, whole, settings, Reports())
    with pytest.raises(KeyboardInterrupt):
        train_judge(str(tiny_model), examples, cut, settings, Reports(KeyboardInterrupt(), at=4))

    train_judge(str(tiny_model), examples, cut, settings, Reports())

    assert content_digest(cut / "model") == content_digest(whole / "model")


def test_qlora_trains_or_says_what_is_missing(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    """With bitsandbytes it gives an adapter that has learnt something; without, an error says what to install."""
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ModelError, match="pip install bitsandbytes"):
            train_toy(tiny_model, examples, tmp_path, method="qlora")
        return
    train_toy(tiny_model, examples, tmp_path, method="qlora")

    assert log_of(tmp_path)[-1]["loss"] < log_of(tmp_path)[0]["loss"]
    assert {weight.dtype for weight in adapter_of(tmp_path).values()} == {torch.float32}


def test_single_labels_and_soft_ones_train(tiny_model: Path, tmp_path: Path) -> None:
    """Labels of single answers, graded ones too, teach the score itself."""
    labels = [
        Label(id=f"{n}{good}", prompt=f"Question {n}", answers=(text,), target=0.9 if good else 0.1)
        for n in range(12)
        for good, text in ((True, f"Paris is {n}"), (False, f"fox {n} dog"))
    ]
    examples = examples_of(tiny_model, labels)

    train_toy(tiny_model, examples, tmp_path, single_weight=1.0)

    log = log_of(tmp_path)
    assert log[-1]["single"] < log[0]["single"]
    assert "margin" not in log[0]


def test_both_orders_of_a_comparison_train(tiny_model: Path, tmp_path: Path) -> None:
    """Pairwise, the margin is the mean over both orders, and is learnt."""
    train_toy(tiny_model, examples_of(tiny_model, LABELS, "pairwise"), tmp_path)

    log = log_of(tmp_path)
    assert log[-1]["pair"] < log[0]["pair"]


def test_nothing_to_train_on_is_an_input_error(tiny_model: Path, tmp_path: Path) -> None:
    """No examples, no training."""
    with pytest.raises(InputError, match="no label"):
        train_toy(tiny_model, [], tmp_path)

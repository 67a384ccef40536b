"""DPO: the loss falls, beta matters, the base stays as it is, and a killed training ends like an undisturbed one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.live import wait_for
from tests.support.training import (
    TOY_FLAGS,
    Killed,
    files_no_longer_than,
    kill_at,
    log_lines,
    logged,
    said,
    same_adapter,
    toy_preferences,
    toy_settings,
    trained_steps,
)
from trainer.dpo import FSDP_CONFIG, main
from trainer.errors import InputError, ModelError
from trainer.run.stages import content_digest
from trainer.tuning.checkpoints import TrainingError
from trainer.tuning.dpo import DPO, PRESETS, preset, train_dpo
from trainer.tuning.preferences import Split
from trainer.tuning.settings import CHECKPOINTS

DATA = Split(train=toy_preferences(24), held_out=toy_preferences(32)[24:])


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_dpo(tiny_model, DATA, folder, toy_settings())
    return folder


@pytest.fixture
def killed(tiny_model: Path, tmp_path: Path) -> Path:
    """The folder of the same training, killed after its third step of six; a checkpoint is made every two."""
    with pytest.raises(Killed):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings(), kill_at(3))
    return tmp_path


def test_the_loss_falls_and_margins_grow(undisturbed: Path) -> None:
    """The loss falls from log 2, where the model is its own reference; held-out pairs are told apart as well."""
    losses = logged(undisturbed / DPO.log)

    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.3
    assert logged(undisturbed / DPO.log, "eval_rewards/accuracies")[-1] == 1.0


def test_the_result_says_what_was_trained(undisturbed: Path) -> None:
    """dpo.json holds counts, settings and last numbers; the checkpoints are gone, the adapter is whole."""
    result = json.loads((undisturbed / DPO.file).read_text())

    counts = {key: result[key] for key in ("pairs", "held_out", "too_long", "steps")}
    assert counts == {"pairs": 24, "held_out": 8, "too_long": 0, "steps": 6}
    assert result["method"] == "lora"
    assert result["numbers"]["loss"] == logged(undisturbed / DPO.log)[-1]
    assert not (undisturbed / CHECKPOINTS).exists()
    assert {"adapter_config.json", "tokenizer.json", "README.md"} <= {
        file.name for file in (undisturbed / "adapter").iterdir()
    }


def test_the_compact_output_layer_changes_nothing(
    tiny_model: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients are those of TRL's own output layer on a CPU, which computes every position's logits."""
    monkeypatch.setattr("trainer.tuning.training.compact_head", lambda _: nullcontext())

    train_dpo(tiny_model, DATA, tmp_path, toy_settings())

    assert logged(tmp_path / DPO.log) == pytest.approx(logged(undisturbed / DPO.log), abs=1e-4)
    norms, compact = (logged(folder / DPO.log, "grad_norm") for folder in (tmp_path, undisturbed))
    assert norms[0] == pytest.approx(compact[0], rel=1e-5)
    assert norms == pytest.approx(compact, rel=1e-2)


def test_gradient_checkpointing_changes_nothing(tiny_model: Path, tmp_path: Path, undisturbed: Path) -> None:
    """It computes the activations again instead of keeping them: the same weights."""
    train_dpo(tiny_model, DATA, tmp_path, toy_settings(gradient_checkpointing=True))

    assert same_adapter(tmp_path, undisturbed)


def test_the_base_stays_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    """Training changes no byte of the model's folder."""
    before = content_digest(tiny_model)

    train_dpo(tiny_model, DATA, tmp_path, toy_settings(epochs=1.0))

    assert content_digest(tiny_model) == before


def test_beta_scales_the_rewards(tiny_model: Path, tmp_path: Path) -> None:
    """Adam's first step has the same length for any beta, so after it the implicit rewards are proportional to beta."""
    margins = {}
    for beta in (0.1, 0.4):
        settings = toy_settings(beta=beta, lr=1e-4, epochs=1.0, schedule="constant_with_warmup", warmup=0.0, clip=1e9)
        train_dpo(tiny_model, DATA, tmp_path / str(beta), settings)
        margins[beta] = logged(tmp_path / str(beta) / DPO.log, "rewards/margins")[1]

    assert margins[0.4] / margins[0.1] == pytest.approx(4, rel=0.05)


def test_a_large_beta_keeps_the_model_near(tiny_model: Path, tmp_path: Path, undisturbed: Path) -> None:
    """With a larger beta the log-probabilities move less far from the reference's."""
    train_dpo(tiny_model, DATA, tmp_path, toy_settings(beta=2.0))

    near, far = (logged(folder / DPO.log, "rewards/margins")[-1] for folder in (tmp_path, undisturbed))
    assert near / 2.0 < 0.8 * far / 0.1


def first_loss(model: Path, folder: Path, **changes: Any) -> float:
    """The loss of the first step, where the model is its own reference."""
    train_dpo(model, DATA, folder, toy_settings(epochs=1.0, **changes))
    found: float = logged(folder / DPO.log)[0]
    return found


def test_each_loss_begins_where_its_formula_does(tiny_model: Path, tmp_path: Path) -> None:
    """Without any difference to the reference: log 2 for sigmoid, 1 for hinge, (1 / 2 beta)² for Azar et al.'s IPO …"""
    begin = {
        loss: first_loss(tiny_model, tmp_path / loss, loss=loss, **more)
        for loss, more in (
            ("sigmoid_norm", {}),
            ("hinge", {}),
            ("ipo", {"beta": 0.5}),
            ("robust", {"label_smoothing": 0.2}),
            ("apo_zero", {}),
        )
    }

    wanted = {"sigmoid_norm": math.log(2), "hinge": 1.0, "ipo": 1.0, "robust": math.log(2), "apo_zero": 1.0}
    assert begin == pytest.approx(wanted, abs=1e-3)


def test_rpo_adds_the_likelihood_of_the_chosen(tiny_model: Path, tmp_path: Path, undisturbed: Path) -> None:
    """The loss begins higher by alpha times their mean negative log-likelihood, and they end up likelier."""
    plain = first_loss(tiny_model, tmp_path / "plain")
    begin = {alpha: first_loss(tiny_model, tmp_path / str(alpha), rpo_alpha=alpha) for alpha in (0.5, 1.0)}
    train_dpo(tiny_model, DATA, tmp_path / "whole", toy_settings(rpo_alpha=1.0))

    assert begin[1.0] - plain == pytest.approx(2 * (begin[0.5] - plain), rel=1e-3)
    assert begin[1.0] > plain + 1
    likelihoods = [logged(folder / DPO.log, "logps/chosen")[-1] for folder in (tmp_path / "whole", undisturbed)]
    assert likelihoods[0] > likelihoods[1]


def test_a_killed_training_ends_like_an_undisturbed_one(tiny_model: Path, killed: Path, undisturbed: Path) -> None:
    """A rerun resumes the checkpoint: the same weights, no step twice, and each step once in the log."""
    steps = trained_steps(tiny_model, DATA, killed)

    assert steps == [2, 3, 4, 5, 6]
    assert same_adapter(killed, undisturbed)
    assert [line["step"] for line in log_lines(killed / DPO.log)] == [1, 2, 3, 4, 5, 6]


def test_progress_moves_within_a_step(tiny_model: Path, tmp_path: Path) -> None:
    """It is told after each micro-batch, in pairs, with tokens per second, and while held-out pairs are evaluated."""
    told: list[tuple[int, int, str]] = []
    settings = toy_settings(micro_batch=2, epochs=1.0)
    train_dpo(tiny_model, DATA, tmp_path, settings, lambda now: told.append((now.done, now.total, now.note)))

    assert {done for done, _, _ in told} == set(range(0, 25, 2))
    assert {total for _, total, _ in told} == {24}
    assert all("tokens/s" in note for _, _, note in told[1:])
    assert any("evaluating 1/4" in note for _, _, note in told)
    assert "step 3/3" in told[-1][2]


def test_training_says_nothing_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    """No bar and no warning of the libraries reaches the terminal: the program has a bar of its own."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(preference.model_dump_json() + "\n" for preference in toy_preferences(10)))
    command = ["--model", str(tiny_model), "--pairs", str(pairs), "--output", str(tmp_path / "out"), *TOY_FLAGS]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.dpo", *command], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )

    said_on_stderr = done.stderr.splitlines()
    assert done.returncode == 0
    assert [line for line in said_on_stderr if not line.startswith(("DPO: ", "8 pairs to train on"))] == []


def test_half_a_checkpoint_is_ignored(tiny_model: Path, killed: Path, undisturbed: Path) -> None:
    """A checkpoint that a kill left without its last file is removed, and training starts before it."""
    (killed / CHECKPOINTS / "checkpoint-2" / "trainer_state.json").write_text('{"global_')

    steps = trained_steps(tiny_model, DATA, killed)

    assert steps[0] == 0
    assert same_adapter(killed, undisturbed)


def test_a_kill_by_the_system_is_survived(tiny_model: Path, tmp_path: Path, undisturbed: Path) -> None:
    """SIGKILL in mid-training, then the same call again: the weights of an undisturbed training."""
    program = (
        "import sys, time; from pathlib import Path; from tests.support.training import *\n"
        "data = Split(train=toy_preferences(24), held_out=toy_preferences(32)[24:])\n"
        "def tell(advance): time.sleep(60 * (advance.done == 40))\n"
        "train_dpo(Path(sys.argv[1]), data, Path(sys.argv[2]), toy_settings(), tell)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tiny_model), str(tmp_path)], cwd=Path(__file__).parents[3]
    )
    assert wait_for((tmp_path / CHECKPOINTS / "checkpoint-4" / "trainer_state.json").exists, 60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    train_dpo(tiny_model, DATA, tmp_path, toy_settings())

    assert same_adapter(tmp_path, undisturbed)


def test_a_full_disk_is_reported_and_survived(tiny_model: Path, tmp_path: Path, undisturbed: Path) -> None:
    """A checkpoint that does not fit is an error that says so; with room, the same call succeeds."""
    with files_no_longer_than(30_000), pytest.raises(TrainingError, match="no room to write"):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings())
    assert not list((tmp_path / CHECKPOINTS).glob("checkpoint-*"))

    train_dpo(tiny_model, DATA, tmp_path, toy_settings())

    assert same_adapter(tmp_path, undisturbed)


def test_long_pairs_are_counted_and_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """A pair over max_length is not cut, and is not trained on."""
    long = DATA.train[0].model_copy(update={"rejected": [said("assistant", "fox " * 200)]})

    result = train_dpo(tiny_model, Split([long, *DATA.train[:8]], [long]), tmp_path, toy_settings(epochs=1.0))

    assert (result.trained, result.held_out, result.too_long) == (8, 0, 2)


def test_no_usable_pair_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    """If every pair is too long, nothing is trained."""
    with pytest.raises(InputError, match="longer than 4 tokens"):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings(max_length=4))


def test_dropout_is_applied(tiny_model: Path, tmp_path: Path, undisturbed: Path) -> None:
    """LoRA's dropout changes the losses, although TRL turns all dropout off by default."""
    train_dpo(tiny_model, DATA, tmp_path, toy_settings(dropout=0.5))

    assert logged(tmp_path / DPO.log)[2] != pytest.approx(logged(undisturbed / DPO.log)[2], rel=1e-3)


def test_full_fine_tuning_leaves_a_model(tiny_model: Path, tmp_path: Path) -> None:
    """The method `full` trains all weights, against the first model as the reference."""
    result = train_dpo(tiny_model, DATA, tmp_path, toy_settings(method="full", lr=1e-3, epochs=1.0))

    assert result.output == "model"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert logged(tmp_path / DPO.log)[-1] < math.log(2)


def test_qlora_without_bitsandbytes_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QLoRA says what it needs; `qlora-or-lora`, as in the paper's preset, falls back to LoRA."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)

    with pytest.raises(ModelError, match="needs bitsandbytes"):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings(method="qlora"))
    assert train_dpo(tiny_model, DATA, tmp_path, toy_settings(method="qlora-or-lora", epochs=1.0)).method == "lora"


def test_a_missing_tracker_is_an_error(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reporting to wandb without wandb is an error that says what to install."""
    monkeypatch.setattr("trainer.tuning.settings.find_spec", lambda _: None)

    with pytest.raises(ImportError, match="pip install wandb"):
        train_dpo(tiny_model, DATA, tmp_path, toy_settings(report_to="wandb"))


def test_the_paper_preset_has_the_numbers_of_the_paper() -> None:
    """The numbers that the authors trained with."""
    paper = preset("paper")

    assert (paper.rank, paper.alpha, paper.dropout, paper.lr, paper.beta) == (256, 128, 0.05, 5e-5, 0.1)
    assert (paper.batch, paper.epochs, paper.schedule, paper.warmup, paper.clip) == (6, 1.0, "cosine", 0.1, 0.3)
    assert (paper.loss, paper.method) == ("sigmoid", "qlora-or-lora")


def test_full_fine_tuning_has_its_own_learning_rate() -> None:
    """LoRA's rate would ruin a model whose every weight moves."""
    assert preset(method="full").lr < preset().lr / 10
    assert preset(method="full", lr=3e-6).lr == 3e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"batch": 6, "micro_batch": 4},
        {"rank": 0},
        {"dropout": 1.0},
        {"method": "dora"},
        {"label_smoothing": 0.1},
        {"loss": "exo_pair"},
        {"rpo_alpha": -1.0},
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any]) -> None:
    """A wrong number is an error before anything is loaded."""
    with pytest.raises(ValueError, match=r"."):
        preset(**changes)


def test_settings_without_effect_on_weights_are_not_part_of_the_identity() -> None:
    """Logging does not make another training, beta does."""
    settings = preset()

    assert replace(settings, log_steps=7, report_to="wandb").described() == settings.described()
    assert replace(settings, beta=0.3).described() != settings.described()


def test_the_command_trains_once(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command trains on a file; a repetition finds the result complete, and other settings are refused."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(preference.model_dump_json() + "\n" for preference in toy_preferences(10)))
    command = ["--model", str(tiny_model), "--pairs", str(pairs), "--output", str(tmp_path / "out"), *TOY_FLAGS]

    codes = [main([*command, f"--beta={beta}"]) for beta in (0.2, 0.2, 0.3)]

    printed = capsys.readouterr()
    assert codes == [0, 0, 1]
    assert json.loads(printed.out)["settings"]["beta"] == 0.2
    assert "is complete" in printed.err


@pytest.mark.parametrize(
    "flags",
    [[], ["--model", "x/y"], ["--model=.", "--pairs=none.jsonl", "--output=o"], ["--fsdp-config", "--held-out=2"]],
)
def test_missing_input_is_usage(flags: list[str]) -> None:
    """Missing input is exit code 2; the path of the FSDP configuration needs no other flag."""
    assert main(flags) == (0 if "--fsdp-config" in flags else 2)


def test_the_shipped_fsdp_configuration_is_accelerates(capsys: pytest.CaptureFixture[str]) -> None:
    """`--fsdp-config` prints the path of a file that accelerate reads as an FSDP configuration."""
    from accelerate.commands.config.config_args import load_config_from_file

    main(["--fsdp-config"])

    assert capsys.readouterr().out.strip() == str(FSDP_CONFIG)
    assert load_config_from_file(str(FSDP_CONFIG)).fsdp_config["fsdp_version"] == 2


def test_presets_are_settings() -> None:
    """Every preset can be made, with every field known."""
    assert {name: preset(name).beta for name in PRESETS} == {"default": 0.1, "paper": 0.1}

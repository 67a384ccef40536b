"""`python -m service.models check`: every way to run a model on this machine, tried and told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from service.engine.torch.ladder import CheckError
from service.models import __main__ as models
from tests.ladder.test_packed_forward import SMALL, make_model


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """The exit status, and what was said of each rung."""
    status = models.main(["check", *arguments, "--device", "cpu"])
    lines = re.findall(r"^  (\S+) +(.*) \([\d.]+ s\)$", capsys.readouterr().out, re.MULTILINE)
    return status, dict(lines)


def test_every_rung_that_holds_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small Llama can be run in each way; the digests differ."""
    make_model(tmp_path, "llama", rounded=True)

    status, rungs = told(capsys, str(tmp_path), "--dtype", "float32")

    digests = [re.fullmatch(r"holds, the same bits in any company, digest (\w{12})", rungs[name])[1] for name in rungs]
    assert status == 0
    assert list(rungs)[-3:] == ["packed", "single", "own"]
    assert len(set(digests)) == len(rungs)


def test_a_rung_that_is_not_there_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 is not a family that can be packed, and runs one prompt at a time."""
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    status, rungs = told(capsys, str(tmp_path))

    assert status == 0
    assert rungs["packed"].startswith("no: it is not available for GPT2")
    assert rungs["single"].startswith("holds")


def test_a_reward_model_is_checked_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its judge named its head is tried; without, the command says what it is."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)

    status, rungs = told(capsys, str(tmp_path), "--judge", "reward-model")
    refused = models.main(["check", str(tmp_path)])

    assert status == 0
    assert rungs["packed"].startswith("holds")
    assert refused == 1
    assert "is not a causal language model" in capsys.readouterr().err


def test_where_no_rung_holds_each_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is printed all the same, and the status says so."""
    make_model(tmp_path, "llama", rounded=True)
    monkeypatch.setattr("service.engine.torch.ladder.agree", lambda *_: (_ for _ in ()).throw(CheckError("is off")))

    status, rungs = told(capsys, str(tmp_path))

    assert status == 1
    assert {said.split("(")[0] for name, said in rungs.items() if not name.startswith("compiled")} == {"no: it is off"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--threads", "0"], "0 threads"), (["--device", "foo"], "no device foo"), (["--device", "meta"], "meta")],
)
def test_flags_that_cannot_be_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and no traceback."""
    make_model(tmp_path, "llama")

    assert models.main(["check", str(tmp_path), *flags]) == 1
    assert message in capsys.readouterr().err

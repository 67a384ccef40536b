"""`python -m service.models check`: every rung of the ladder, tried and reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

from service.models import __main__ as models
from tests.support.causal import SMALL, make_model, write_model


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str]]:
    """The exit status, and the report on each rung."""
    status = models.main(["check", *arguments, "--device", "cpu"])
    lines = re.findall(r"^  (\S+) +(.*) \([\d.]+ s\)$", capsys.readouterr().out, re.MULTILINE)
    return status, dict(lines)


def test_every_rung_that_holds_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small Llama runs on each rung, with another digest on each."""
    make_model(tmp_path, "llama", rounded=True)

    status, rungs = check(capsys, str(tmp_path), "--dtype", "float32")

    digests = [re.fullmatch(r"holds, the same bits in any batch, digest (\w{12})", rungs[name])[1] for name in rungs]
    assert status == 0
    assert list(rungs)[-3:] == ["packed", "single", "own"]
    assert len(set(digests)) == len(rungs)


def test_a_missing_rung_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 cannot be packed, and runs one prompt at a time."""
    config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    write_model(tmp_path, config)

    status, rungs = check(capsys, str(tmp_path))

    assert status == 0
    assert rungs["packed"].startswith("no: it is not available for GPT2")
    assert rungs["single"].startswith("holds")


def test_a_reward_model_is_checked_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its head is tried if --judge names it; if not, the command says what the model is."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=1)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)

    status, rungs = check(capsys, str(tmp_path), "--judge", "reward-model")
    refused = models.main(["check", str(tmp_path)])

    assert status == 0
    assert rungs["packed"].startswith("holds")
    assert refused == 1
    assert "is not a causal language model" in capsys.readouterr().err


def test_if_no_rung_holds_each_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is printed, and the status is 1."""
    make_model(tmp_path, "llama", rounded=True)
    monkeypatch.setattr("service.engine.torch.ladder.TOLERANCE", {torch.bfloat16: -1.0, torch.float32: -1.0})

    status, rungs = check(capsys, str(tmp_path))

    assert status == 1
    assert all("disagrees with the model's own forward" in said for said in rungs.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--threads", "0"], "0 threads"), (["--device", "foo"], "no device foo"), (["--device", "meta"], "meta")],
)
def test_impossible_flags_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, and no traceback."""
    make_model(tmp_path, "llama")

    assert models.main(["check", str(tmp_path), *flags]) == 1
    assert message in capsys.readouterr().err

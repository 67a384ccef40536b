"""The memory that a training needs, said before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from client.runtime.memory import available_bytes
from tests.trainer.judge.makers import toy_settings
from trainer.tuning.judge.memory import needed_bytes


def test_smaller_passes_and_numbers_need_less(tiny_model: Path) -> None:
    """What is kept for the gradients grows with the tokens of a pass, and takes half as many bytes in bf16."""
    whole = needed_bytes(tiny_model, toy_settings(pass_tokens=4096), 100, 4)
    small = needed_bytes(tiny_model, toy_settings(pass_tokens=1024), 100, 4)
    rounded = needed_bytes(tiny_model, toy_settings(pass_tokens=4096), 100, 2)

    assert whole is not None
    assert small is not None
    assert rounded is not None
    assert whole > rounded
    assert whole > small


def test_a_prompt_longer_than_a_pass_counts(tiny_model: Path) -> None:
    """A single label is read in one pass, however long it is."""
    short, long = (needed_bytes(tiny_model, toy_settings(pass_tokens=256), longest, 4) for longest in (100, 2000))

    assert short is not None
    assert long is not None
    assert long > short


def test_methods_need_their_own(tiny_model: Path) -> None:
    """A base in NF4 needs less than one in bf16, and training all its weights the most."""
    qlora, lora, full = (
        needed_bytes(tiny_model, toy_settings(method=method, rank=1), 100, 2) for method in ("qlora", "lora", "full")
    )

    assert qlora is not None
    assert lora is not None
    assert full is not None
    assert qlora < lora < full


def test_a_model_of_unknown_size_has_no_estimate(tiny_model: Path, tmp_path: Path) -> None:
    """Without readable weights there is none, and the system's free memory is known or not."""
    shutil.copy(tiny_model / "config.json", tmp_path)

    assert needed_bytes(tmp_path, toy_settings(), 100, 4) is None
    assert available_bytes() is None or available_bytes() > 0

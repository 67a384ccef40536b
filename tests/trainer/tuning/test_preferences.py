"""Preference data: read from anybody's files, and split by prompt."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.support.training import said, toy_preferences
from trainer.tuning.preferences import load_preferences, split_preferences


def test_the_split_holds_out_whole_prompts() -> None:
    """A fifth is held out, chosen by the seed, and no prompt is on both sides."""
    preferences = toy_preferences(50) + toy_preferences(50)

    split, again, other = (split_preferences(preferences, 0.2, seed) for seed in (0, 0, 1))

    prompts = [{preference.prompt[0].content for preference in side} for side in (split.train, split.held_out)]
    assert (len(split.train), len(split.held_out)) == (80, 20)
    assert not prompts[0] & prompts[1]
    assert split == again != other


def test_preferences_of_the_hubs_layout_are_read(tmp_path: Path) -> None:
    """A text as prompt with conversations as answers, as in UltraFeedback; equal answers are counted as unusable."""
    answers = {
        side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": side}] for side in ("good", "bad")
    }
    rows = [
        {"prompt": "Q", "chosen": answers["good"], "rejected": answers["bad"], "chosen-rating": 5.0},
        {"prompt": "Q", "chosen": answers["bad"], "rejected": answers["bad"]},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    preferences, unusable = load_preferences(str(tmp_path / "pairs.jsonl"))

    assert unusable == 1
    assert (preferences[0].prompt, preferences[0].chosen) == ([said("user", "Q")], [said("assistant", "good")])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_answers_that_were_cut_off_are_known(tmp_path: Path, suffix: str) -> None:
    """Columns say so, as the loop's pairs.jsonl does; without them an answer is whole."""
    rows = [{"prompt": "Q", "chosen": "good", "rejected": "ba", "chosen_cut_off": False, "rejected_cut_off": True}]
    file = tmp_path / f"pairs.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text(json.dumps(rows[0]) + "\n")

    (preference,), _ = load_preferences(str(file))

    assert (preference.chosen_cut_off, preference.rejected_cut_off) == (False, True)

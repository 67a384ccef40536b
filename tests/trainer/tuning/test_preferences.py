"""Preference data: read from anybody's files, and split by prompt."""

from __future__ import annotations

import json
from pathlib import Path

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

"""Reward functions in the trainers that they are for: rewards are the log-odds of /score, and -20 for the unjudged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.environments import ROOT, ProgramError
from tests.integrations.served import Served

RECIPES = ROOT / "docs/recipes"
UNJUDGED = -20.0


@pytest.fixture
def ask(run: Callable[..., Any], service: Served) -> Callable[..., Any]:
    """Runs a program with the service's address and key where a trainer's user puts them."""
    return lambda *command: run(*command, JUDGE_URL=service.url, JUDGE_API_KEY=service.key)


def log_odds(service: Served, prompt: str, response: str) -> float:
    """What /score says of an answer in a data set with a column of categories."""
    turns = [{"role": "user", "content": prompt}]
    answer = service.post("/score", {"prompt": turns, "response": response, "category": "math"})
    return float(answer["log_odds"])


@pytest.mark.integrations("trl")
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_step_of_async_grpo_is_driven_by_the_judge(
    ask: Callable[..., Any], service: Served, tiny_model: Path, way: str
) -> None:
    """Its rollout process has the reward function, and reads the service's key there; the step moves the weights."""
    told = ask("trl_async_grpo.py", service.url, str(tiny_model), way)

    assert (told["step"], told["changed"]) == (1, True)
    group = told["samples"][:4]
    expected = [log_odds(service, "Name a prime.", completion) for completion, _ in group]
    assert [reward for _, reward in group] == pytest.approx(expected, abs=1e-5)


@pytest.mark.integrations("verl")
@pytest.mark.parametrize("way", ["manager", "function"])
def test_verls_rewards_are_the_judges(ask: Callable[..., Any], service: Served, tiny_model: Path, way: str) -> None:
    """Of a reward function and of a reward manager, which verl loads by their names; what is unjudged is marked."""
    told = ask("verl_rewards.py", service.url, str(tiny_model), way)

    expected = [log_odds(service, "What is 2+2?", "4"), log_odds(service, "Name a prime.", "It is seven.")]
    assert told["rewards"] == [*expected, UNJUDGED, UNJUDGED]
    marks = [0.0, 0.0, 1.0, 1.0]
    assert told["extra"] == [
        {"score": reward, "unjudged": mark} for reward, mark in zip(told["rewards"], marks, strict=True)
    ]


@pytest.mark.integrations("verl")
def test_verls_workers_give_its_trainer_the_judges_rewards(
    ask: Callable[..., Any], service: Served, tiny_model: Path
) -> None:
    """At the last token of each response; Ray's processes read the key for themselves."""
    told = ask("verl_rewards.py", service.url, str(tiny_model), "ray")

    expected = [log_odds(service, "What is 2+2?", "4"), log_odds(service, "Name a prime.", "It is seven.")]
    assert told["rewards"] == pytest.approx([*expected, UNJUDGED, UNJUDGED], abs=1e-5)
    assert told["elsewhere"] == 0
    assert told["unjudged"] == [0, 0, 1, 1]


@pytest.mark.integrations("verl")
def test_verl_stops_at_what_cannot_be_judged(run: Callable[..., Any], service: Served, tiny_model: Path) -> None:
    """Unless `unjudged` says what it counts as."""
    with pytest.raises(ProgramError, match=r"TooManyFailuresError: .*unjudged is .raise."):
        run("verl_rewards.py", service.url, str(tiny_model), "strict", JUDGE_API_KEY=service.key)


@pytest.mark.integrations("ms-swift")
def test_ms_swifts_rewards_are_the_judges(ask: Callable[..., Any], service: Served) -> None:
    """Called and awaited, and after a pickle; an empty completion counts as the recipe says, and stops without that."""
    told = ask("swift_rewards.py", str(RECIPES / "swift_plugin.py"))

    expected = [log_odds(service, "What is 2+2?", text) for text in ("4", "It is five.", "Four, after a call.")]
    for name, kind in (("judge", "JudgeORM"), ("judge_async", "AsyncJudgeORM")):
        assert told[name]["names"] == [kind]
        assert told[name]["rewards"] == pytest.approx([*expected, UNJUDGED], abs=1e-5)
        assert told[name]["totals"] == told[name]["rewards"]
    assert told["judge_strict"].startswith("TooManyFailuresError: 1 of 4 completions")


@pytest.mark.integrations("axolotl")
def test_axolotls_rewards_are_the_judges(ask: Callable[..., Any], service: Served) -> None:
    """Its loader takes the recipe's reward, and its worker processes answer the same."""
    told = ask("axolotl_rewards.py", str(RECIPES))

    expected = [log_odds(service, "What is 2+2?", text) for text in ("4", "It is five.")]
    assert told == {"called": [*expected, UNJUDGED], "worker": [*expected, UNJUDGED]}

"""The recipes in docs/recipes/, run as they are by the tools that they are for: their numbers are those of /score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import pytest

from tests.integrations.environments import ROOT, ProgramError
from tests.integrations.served import Served

RECIPES = ROOT / "docs/recipes"


@pytest.fixture
def recipe(run: Callable[..., Any], service: Served) -> Callable[..., Any]:
    """Runs a program over a recipe, with the service's address and key where its user would put them."""
    settings = {"JUDGE_URL": service.url, "JUDGE_API_KEY": service.key}
    return lambda program, name, **others: run(program, str(RECIPES / name), **{**settings, **others})


def scores(service: Served, asked: Sequence[tuple[str, str]]) -> list[float]:
    """What /score says of these questions and answers."""
    return [
        service.post("/score", {"prompt": prompt, "response": response, "category": "chat"})["score"]
        for prompt, response in asked
    ]


@pytest.mark.integrations("inspect")
def test_inspects_scorer_gives_the_judges_scores(recipe: Callable[..., Any], service: Served) -> None:
    """For each sample, and their mean as the metric."""
    told = recipe("inspect_recipe.py", "inspect_scorer.py")

    assert told["status"] == "success"
    assert told["scores"] == scores(service, told["asked"])
    assert told["metrics"]["mean"] == pytest.approx(mean(told["scores"]))


@pytest.mark.integrations("mlflow")
def test_mlflows_scorer_gives_the_judges_scores(recipe: Callable[..., Any], service: Served) -> None:
    """For each row, and their mean as the metric."""
    told = recipe("mlflow_recipe.py", "mlflow_scorer.py")

    expected = scores(service, told["asked"])
    assert told["scores"] == dict(zip(map("".join, told["asked"]), expected, strict=True))
    assert told["metrics"] == {"judged/mean": pytest.approx(mean(expected))}


@pytest.mark.integrations("weave")
def test_weaves_scorer_gives_the_judges_scores(recipe: Callable[..., Any], service: Served) -> None:
    """Their mean is the summary."""
    told = recipe("weave_recipe.py", "weave_scorer.py")

    assert told["summary"]["JudgeScorer"]["score"] == {"mean": pytest.approx(mean(scores(service, told["asked"])))}


@pytest.mark.integrations("deepeval")
def test_deepevals_metric_gives_the_judges_scores(recipe: Callable[..., Any], service: Served) -> None:
    """The same ones from its synchronous and its asynchronous runs, with success above the threshold."""
    told = recipe("deepeval_recipe.py", "deepeval_metric.py")

    expected = {
        prompt + response: [score, score >= 0.5]
        for (prompt, response), score in zip(told["asked"], scores(service, told["asked"]), strict=True)
    }
    assert told["sync"] == told["async"] == expected


@pytest.mark.integrations("lm-eval")
def test_lm_evals_task_gives_the_judges_scores(recipe: Callable[..., Any], service: Served) -> None:
    """In the samples that it logs, and their mean as the metric."""
    told = recipe("lm_eval_recipe.py", "lm_eval")

    assert told["scores"] == scores(service, told["asked"])
    assert told["metrics"]["judge_score,none"] == pytest.approx(mean(told["scores"]))


WRONG_KEY = {"JUDGE_API_KEY": "wrong"}


@pytest.mark.integrations("inspect")
def test_inspect_does_not_score_what_could_not_be_judged(recipe: Callable[..., Any]) -> None:
    """The evaluation fails, without a metric."""
    told = recipe("inspect_recipe.py", "inspect_scorer.py", **WRONG_KEY)

    assert (told["status"], told["scores"], told["metrics"]) == ("error", [], None)


@pytest.mark.integrations("mlflow")
def test_mlflow_does_not_score_what_could_not_be_judged(recipe: Callable[..., Any]) -> None:
    """Its rows have no value, and there is no metric."""
    told = recipe("mlflow_recipe.py", "mlflow_scorer.py", **WRONG_KEY)

    assert (told["scores"], told["metrics"]) == ({}, {})


@pytest.mark.integrations("weave")
def test_weave_does_not_score_what_could_not_be_judged(recipe: Callable[..., Any]) -> None:
    """The summary has nothing for the scorer."""
    told = recipe("weave_recipe.py", "weave_scorer.py", **WRONG_KEY)

    assert told["summary"]["JudgeScorer"] is None


@pytest.mark.parametrize(
    ("program", "name"),
    [
        pytest.param("deepeval_recipe.py", "deepeval_metric.py", marks=pytest.mark.integrations("deepeval")),
        pytest.param("lm_eval_recipe.py", "lm_eval", marks=pytest.mark.integrations("lm-eval")),
    ],
)
def test_an_answer_that_cannot_be_judged_stops_the_run(recipe: Callable[..., Any], program: str, name: str) -> None:
    """Of DeepEval and of lm-eval."""
    with pytest.raises(ProgramError, match="AuthenticationError"):
        recipe(program, name, **WRONG_KEY)

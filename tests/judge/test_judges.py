"""The judges beside yes-no, through a live service with the fake engine: what they answer, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from client.stats import sigmoid
from service.engine.contract import ItemFailure, LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine, fake_tokenizer
from service.errors import ServiceError
from service.loading.engines import find_model
from service.queue.memory import MemoryQueue
from service.server import compose
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.support.live import Live, live_service

ASKED = {"prompt": "What is the capital of France?", "response": "Paris."}
COMPARED = {"prompt": "What is the capital of France?", "responses": ["Paris.", "Lyon.", "Score: 5"]}
PARSED = {"judge": "self-reward", "self_reward_mode": "parsed"}


@pytest.fixture(scope="module")
def graded() -> Iterator[Live]:
    """A self-rewarding judge that reads the digits' probabilities."""
    with live_service(judge="self-reward") as live:
        yield live


@pytest.fixture(scope="module")
def rewarded() -> Iterator[Live]:
    """A reward model."""
    with live_service(judge="reward-model") as live:
        yield live


@pytest.fixture(scope="module")
def paired() -> Iterator[Live]:
    """A judge that compares."""
    with live_service(judge="pairwise") as live:
        yield live


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and field of an error."""
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def ok(answer: httpx.Response) -> dict[str, Any]:
    """The body of a success."""
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("judge", ["yes-no", "pairwise", "self-reward", "reward-model"])
def test_the_service_says_which_judge_runs(judge: str) -> None:
    """GET /v1/models names the judge."""
    with live_service(judge=judge) as live:
        assert ok(live.http.get("/v1/models"))["data"][0]["judge"] == judge


# self-reward, by expectation


class Digits(FakeEngine):
    """Gives the six grades these probabilities."""

    chances = (0.02, 0.03, 0.05, 0.1, 0.2, 0.4)

    def run(self, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        """See FakeEngine."""
        return [LabelLogprobs(tuple(map(math.log, self.chances)), item.label_ids[5]) for item in items]


def test_the_expected_grade_is_over_the_digits() -> None:
    """The score is a fifth of the mean grade, by its definition, and the mass what the digits hold together."""
    with live_service(Digits(), judge="self-reward") as live:
        result = ok(live.http.post("/score", json=ASKED))

    mean = sum(k * p for k, p in enumerate(Digits.chances)) / sum(Digits.chances)
    assert result["grade"] == pytest.approx(mean, abs=1e-12)
    assert result["score"] == pytest.approx(mean / 5, abs=1e-12)
    assert result["log_odds"] == pytest.approx(math.log(mean / (5 - mean)), abs=1e-12)
    assert result["label_mass"] == pytest.approx(0.8, abs=1e-12)
    assert (result["label_is_argmax"], result["template"], result["samples"]) == (True, "self-reward@1", None)


def test_the_digits_are_what_is_asked_for(graded: Live) -> None:
    """The labels of the built-in template are the six digits, one token each."""
    (template,) = ok(graded.http.get("/templates"))["templates"]

    assert template["mode"] == "graded"
    assert template["grades"] == ["0", "1", "2", "3", "4", "5"]
    assert template["labels"] is None
    assert all(len(fake_tokenizer()(digit).input_ids) == 1 for digit in template["grades"])


def test_a_comparison_ranks_by_grade(graded: Live) -> None:
    """Responses are graded one by one, and the better grade beats the other by their log-odds."""
    result = ok(graded.http.post("/compare", json=COMPARED))

    grades = [score["grade"] for score in result["scores"]]
    odds = [score["log_odds"] for score in result["scores"]]
    assert result["mode"] == "pointwise"
    assert result["ranking"] == sorted(range(3), key=lambda i: -grades[i])
    assert result["win_probability"][0][1] == pytest.approx(sigmoid(odds[0] - odds[1]))


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({"template": "general"}, (400, "bad_template", "template")),
        ({"template": {"layout": "{prompt} {response}"}}, (400, "bad_template", "template")),
        ({"template": "self-reward-rubric"}, (400, "bad_template", "template")),
        ({"category": "math"}, (404, "template_not_found", "category")),
    ],
)
def test_only_graded_templates_are_taken(graded: Live, extra: dict[str, Any], error: tuple[int, str, str]) -> None:
    """A template that asks for Yes or No, or for a text, and a category without a graded one, are refused."""
    assert error_of(graded.http.post("/score", json=ASKED | extra)) == error


def test_a_graded_template_of_a_file_can_be_named(tmp_path: Any) -> None:
    """A user's template with labels of its own for the grades is asked by name."""
    file = tmp_path / "more.toml"
    file.write_text('[[templates]]\nname="letters"\nversion=1\nmode="graded"\ngrades=["A","B","C","D","Yes","No"]\n')

    with live_service(judge="self-reward", template_file=[file]) as live:
        result = ok(live.http.post("/score", json=ASKED | {"template": "letters"}))

    assert result["template"] == "letters@1"
    assert 0 <= result["grade"] <= 5


def test_a_default_template_whose_digit_is_no_token_is_refused_at_start(tmp_path: Any) -> None:
    """A grade that is several tokens is named when the service starts, not approximated."""
    file = tmp_path / "more.toml"
    file.write_text(
        '[[templates]]\nname="self-reward"\nversion=2\nmode="graded"\ngrades=["0","1","2","3","4","55"]\n'
        'category="general"\n'
    )

    with (
        pytest.raises(Exception, match="grade 5 label 0 is 2 tokens"),
        live_service(judge="self-reward", template_file=[file]),
    ):
        pass


# self-reward, parsed


def test_a_written_grade_is_read() -> None:
    """The text's grade, its score in the middle of the grade's sixth, and what the text cost."""
    with live_service(**PARSED) as live:
        result = ok(live.http.post("/score", json=ASKED))

    assert result["grade"] in range(6)
    assert result["score"] == pytest.approx((result["grade"] + 0.5) / 6, abs=1e-12)
    assert result["log_odds"] == pytest.approx(result["yes_logprob"] - result["no_logprob"], abs=1e-12)
    assert (result["label_mass"], result["label_is_argmax"]) == (pytest.approx(1.0), True)
    assert result["samples"] == {"drawn": 1, "parsed": 1}
    assert result["usage"]["completion_tokens"] > 5
    assert result["template"] == "self-reward-rubric@1"


def test_the_grade_of_several_texts_is_the_mean_of_those_that_state_one() -> None:
    """Texts without a grade are counted, in the answer and in the metrics, and pull the mean nowhere."""
    with live_service(FakeEngine(unparseable=0.5), **PARSED, self_reward_samples=16) as live:
        result = ok(live.http.post("/score", json=ASKED))
        failed = live.value("judge_unparseable_total")

    parsed = result["samples"]["parsed"]
    assert result["samples"]["drawn"] == 16
    assert 0 < parsed < 16
    assert failed == 16 - parsed
    assert result["label_mass"] == pytest.approx(parsed / 16)
    assert not result["label_is_argmax"]
    assert (result["grade"] * parsed) == pytest.approx(round(result["grade"] * parsed))


def test_no_text_with_a_grade_is_an_error() -> None:
    """An unparseable judgement has its own code, is counted, and fails no neighbour's item."""
    with live_service(FakeEngine(unparseable=1.0), **PARSED, self_reward_samples=3) as live:
        single = live.http.post("/score", json=ASKED)
        batch = ok(live.http.post("/score/batch", json={"items": [ASKED, {"prompt": "x"}]}))
        failed = live.value("judge_unparseable_total")

    assert error_of(single) == (500, "unparseable", None)
    assert [entry["error"]["code"] for entry in batch["results"]] == ["unparseable", "invalid_request"]
    assert failed == 6


def test_a_text_is_the_same_when_asked_again() -> None:
    """The seeds are fixed, and nothing is remembered: the second answer is drawn again."""
    with live_service(**PARSED, self_reward_samples=4) as live:
        first, second = (ok(live.http.post("/score", json=ASKED)) for _ in range(2))

    assert first["grade"] == second["grade"]
    assert second["usage"] == first["usage"]
    assert second["usage"]["prompt_tokens"] % 4 == 0


def test_the_prompt_leaves_room_for_the_text() -> None:
    """The longest prompt is as much shorter as the text may be long."""
    with live_service(**PARSED, max_tokens=600, self_reward_tokens=100) as live:
        longest = ok(live.http.get("/v1/models"))["data"][0]["max_tokens"]

    assert longest == 500


def test_a_text_longer_than_the_model_is_refused_at_start() -> None:
    """There must be room for a prompt."""
    with (
        pytest.raises(ValueError, match="--self-reward-tokens 400 leaves no room"),
        live_service(**PARSED, max_tokens=300, self_reward_tokens=400),
    ):
        pass


# pairwise


def test_a_judge_that_compares_does_so_unasked(paired: Live) -> None:
    """Without a mode, and with null, the responses are shown two by two in both orders."""
    result = ok(paired.http.post("/compare", json=COMPARED | {"mode": None}))

    assert result == ok(paired.http.post("/compare", json=COMPARED)) | {"timing_ms": result["timing_ms"]} | {
        "usage": result["usage"]
    }
    assert (result["mode"], result["position_bias"]["pairs"]) == ("pairwise", 3)
    assert result["template"] == "pairwise-general@1"


def test_it_scores_nothing(paired: Live) -> None:
    """A single response is refused with a code and advice of its own, alone and in a batch."""
    answer = paired.http.post("/score", json=ASKED)

    assert error_of(answer) == (400, "unsupported_by_judge", None)
    assert "/compare" in answer.json()["error"]["message"]
    assert error_of(paired.http.post("/compare", json=COMPARED | {"mode": "pointwise"}))[1:] == (
        "unsupported_by_judge",
        "mode",
    )


def test_yes_no_still_judges_one_by_one() -> None:
    """The default of a comparison is what it was: pointwise; pairwise is there on request."""
    with live_service() as live:
        modes = [ok(live.http.post("/compare", json=COMPARED | more))["mode"] for more in ({}, {"mode": "pairwise"})]

    assert modes == ["pointwise", "pairwise"]


# reward-model


def test_the_reward_is_the_log_odds(rewarded: Live) -> None:
    """The raw logit is kept; the other numbers follow from it, and leave nothing for other tokens."""
    result = ok(rewarded.http.post("/score", json=ASKED))

    logit = result["log_odds"]
    assert -8 <= logit <= 8
    assert result["score"] == pytest.approx(sigmoid(logit), abs=1e-12)
    assert result["yes_logprob"] == pytest.approx(math.log(sigmoid(logit)), abs=1e-9)
    assert result["no_logprob"] == pytest.approx(math.log(sigmoid(-logit)), abs=1e-9)
    assert result["label_mass"] == pytest.approx(1.0, abs=1e-12)
    assert (result["template"], result["grade"]) == ("reward-model@1", None)


def test_rewards_compare_by_bradley_terry(rewarded: Live) -> None:
    """The win probability is the sigmoid of the rewards' difference."""
    result = ok(rewarded.http.post("/compare", json=COMPARED))

    rewards = [score["log_odds"] for score in result["scores"]]
    assert result["win_probability"][0][2] == pytest.approx(sigmoid(rewards[0] - rewards[2]))


def test_the_second_time_a_reward_is_known(rewarded: Live) -> None:
    """Rewards are remembered like scores."""
    asked = {"prompt": "Once", "response": "Twice"}
    first, second = (ok(rewarded.http.post("/score", json=asked)) for _ in range(2))

    assert second["log_odds"] == first["log_odds"]
    assert second["usage"]["cached_tokens"] == second["usage"]["prompt_tokens"] > first["usage"]["cached_tokens"]


@pytest.mark.parametrize("extra", [{"category": "math"}, {"template": "general"}])
def test_a_reward_model_has_no_templates(rewarded: Live, extra: dict[str, str]) -> None:
    """It reads the conversation itself; a category or template is refused, and none is listed."""
    (field,) = extra

    assert error_of(rewarded.http.post("/score", json=ASKED | extra)) == (400, "unsupported_by_judge", field)
    assert ok(rewarded.http.get("/templates")) == {"templates": [], "categories": []}


@pytest.mark.parametrize("judge", ["self-reward", "reward-model"])
def test_judges_of_single_responses_compare_no_pairs(judge: str) -> None:
    """Pairwise mode is refused, with a code of its own."""
    with live_service(judge=judge) as live:
        answer = live.http.post("/compare", json=COMPARED | {"mode": "pairwise"})

    assert error_of(answer) == (400, "unsupported_by_judge", "mode")


def test_its_fingerprint_is_its_own() -> None:
    """The same files read as a classifier are another judge."""
    prints = [find_model(Settings(engine="fake", judge=judge)).fingerprint for judge in ("yes-no", "reward-model")]

    assert prints == ["fake", "fake-classify"]


# What engines cannot do, and what befalls one item


class Refusing(FakeEngine):
    """An API that refuses long prompts, and does not return every label."""

    def run(self, items: Sequence[ScoreItem]) -> list[LabelLogprobs | ItemFailure]:
        """See FakeEngine."""
        return [self._answer(item) for item in items]

    def _answer(self, item: ScoreItem) -> LabelLogprobs | ItemFailure:
        if len(item.token_ids) > 500:
            return ItemFailure("inference_failed", "the API refused this one")
        return LabelLogprobs((-0.1, -20.0), item.label_ids[0], floored=True)


def test_what_befalls_one_item_is_its_own() -> None:
    """An engine's failure for one item is that item's error; its neighbour is judged."""
    with live_service(Refusing()) as live:
        items = [ASKED, ASKED | {"response": "word " * 500}]
        fine, failed = ok(live.http.post("/score/batch", json={"items": items}))["results"]

    assert failed["error"]["message"] == "the API refused this one"
    assert fine["result"]["floored"] is True


def test_what_a_floor_stands_in_for_is_said_and_not_remembered() -> None:
    """A floored judgement says so, in comparisons too, and is asked for again the next time."""
    with live_service(Refusing()) as live:
        results = [ok(live.http.post("/score", json=ASKED)) for _ in range(2)]
        compared = ok(live.http.post("/compare", json=COMPARED))

    assert [result["usage"]["cached_tokens"] for result in results] == [0, 0]
    assert all(score["floored"] for score in compared["scores"])


def test_a_reward_model_without_a_chat_template_is_refused() -> None:
    """There is no way to put the conversation to it."""
    settings = Settings(engine="fake", judge="reward-model")
    model = find_model(settings)
    model.tokenizer.chat_template = None

    with pytest.raises(ServiceError, match="has no chat template, which the judge reward-model"):
        compose(settings, model, MemoryQueue(1, 1), Metrics(), ThreadPoolExecutor(1))

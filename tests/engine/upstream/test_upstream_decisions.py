"""The upstream engine asking for decisions, by OpenAI's protocol and by TypeSafe's: requests, numbers, bad answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

import pytest
from structlog.testing import capture_logs

from client.errors import ErrorCode
from service.engine.contract import ItemFailure, LabelLogprobs, TextScoreItem
from service.engine.upstream.engine import UpstreamEngine
from tests.engine.upstream.makers import decisions, failed, message, shares, systemone
from tests.support.decision_answers import decisions_answer, diagnosed, options_of, systemone_answer
from tests.support.openai_server import MODEL, Reply, Seen, Upstream, error, openai_server

Api = Callable[..., AbstractContextManager[UpstreamEngine]]
ANSWERS: Final[dict[Api, Callable[..., dict[str, Any]]]] = {decisions: decisions_answer, systemone: systemone_answer}


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A server that makes decisions (`shares`)."""
    with openai_server(shares=shares) as server:
        yield server


@pytest.fixture(params=list(ANSWERS))
def api(request: pytest.FixtureRequest) -> Api:
    """Each protocol in turn."""
    made: Api = request.param
    return made


def gives(api: Api, given: list[float], **more: Any) -> Callable[[Seen], Reply]:
    """A script that answers with these probabilities."""
    return lambda seen: Reply(body=ANSWERS[api](seen.body, given, **more))


def judged(engine: UpstreamEngine, item: TextScoreItem) -> LabelLogprobs:
    """The answer to an item that does not fail."""
    (answer,) = engine.run([item])
    assert isinstance(answer, LabelLogprobs), answer
    return answer


def test_the_request_is_what_servers_accept(upstream: Upstream) -> None:
    """Golden bodies of both protocols: no field that a strict server would refuse, the labels as options in order."""
    for api in (decisions, systemone):
        with api(upstream) as engine:
            judged(engine, message("Is 2+2=4?\n\tgrüße"))

    instructions = "Answer the question that the input ends with."
    listed = [{"value": "Yes"}, {"value": "No"}]
    question = {"type": "choice", "name": "answer", "instructions": instructions, "choices": listed}
    criteria = {"type": "choice", "instructions": instructions, "criteria": {"Yes": None, "No": None}}
    assert [(seen.path, seen.body) for seen in upstream.asked] == [
        ("/v1/decisions", {"model": MODEL, "input": "Is 2+2=4?\n\tgrüße", "questions": [question]}),
        ("/v1/systemone", {"model": MODEL, "state": "Is 2+2=4?\n\tgrüße", "questions": {"answer": criteria}}),
    ]


@pytest.mark.parametrize("labels", [("Yes", "No"), ("A", "B"), ("0", "1", "2", "3", "4", "5")])
def test_shares_become_log_probabilities(upstream: Upstream, api: Api, labels: tuple[str, ...]) -> None:
    """In the labels' order, whatever they are. Without a label mass it is 1, and a label is the likeliest reply."""
    with api(upstream) as engine:
        answer = judged(engine, message("some text", *labels))

    given = shares("some text", labels)
    assert answer.logprobs == pytest.approx([math.log(share) for share in given])
    assert answer.argmax_id == given.index(max(given))
    assert math.fsum(map(math.exp, answer.logprobs)) == pytest.approx(1)
    assert not answer.floored


def test_letters_are_options_in_alphabetical_order(upstream: Upstream, api: Api) -> None:
    """Where a server marks its options A and B, each is its own mark; the numbers are in the labels' order."""
    with api(upstream) as engine:
        answer = judged(engine, message("some text", "B", "A"))

    a, b = shares("some text", ("A", "B"))
    assert options_of(upstream.asked[0].body) == ["A", "B"]
    assert answer.logprobs == pytest.approx([math.log(b), math.log(a)])


def test_a_label_mass_is_counted(upstream: Upstream, api: Api) -> None:
    """Log-probabilities are then over the whole vocabulary."""
    upstream.mass = 0.4
    with api(upstream) as engine:
        answer = judged(engine, message("some text"))

    assert answer.logprobs == pytest.approx([math.log(0.4 * share) for share in shares("some text", ("Yes", "No"))])


def test_vllms_diagnostics_are_a_label_mass(upstream: Upstream) -> None:
    """They stand beside the answers, by the question's name; and say whether a label is the likeliest reply."""
    said = [(0.1, True), (0.9, False)]
    for mass, likeliest in said:
        upstream.scripts.append(
            lambda seen, mass=mass, likeliest=likeliest: Reply(
                body=diagnosed(systemone_answer(seen.body, [0.2, 0.8]), mass, argmax_is_label=likeliest)
            )
        )
    with systemone(upstream) as engine:
        first, second = (judged(engine, message("x")) for _ in said)

    assert first.logprobs == pytest.approx([math.log(0.02), math.log(0.08)])
    assert second.logprobs == pytest.approx([math.log(0.18), math.log(0.72)])
    assert (first.argmax_id, second.argmax_id) == (1, 2)


@pytest.mark.parametrize(("mass", "argmax"), [(1.0, 1), (0.6, 1), (0.5, 2), (0.0001, 2)])
def test_a_label_is_likeliest_if_the_mass_proves_it(upstream: Upstream, api: Api, mass: float, argmax: int) -> None:
    """No other token can be likelier than all that is not label mass; below that nothing is claimed."""
    upstream.scripts.append(gives(api, [0.2, 0.8], mass=mass))
    with api(upstream) as engine:
        answer = judged(engine, message("x"))

    assert answer.argmax_id == argmax


def test_a_mass_that_rounding_took_above_one_is_one(upstream: Upstream, api: Api) -> None:
    """SGLang sums rounded probabilities."""
    upstream.scripts.append(gives(api, [0.5, 0.5], mass=1 + 1e-6))
    with api(upstream) as engine:
        answer = judged(engine, message("x"))

    assert answer.logprobs == (math.log(0.5), math.log(0.5))


def test_spellings_that_differ_in_white_space_are_one_option(upstream: Upstream, api: Api) -> None:
    """The first has its probability, so that none counts twice."""
    with api(upstream) as engine:
        answer = judged(engine, message("some text", " Yes", "Yes", "No"))

    yes, no = shares("some text", ("Yes", "No"))
    assert answer.logprobs == pytest.approx([math.log(yes), -9999, math.log(no)])


def test_rounded_shares_are_taken(upstream: Upstream, api: Api) -> None:
    """Servers that round to two decimals send what adds up to nearly 1; the rest is spread over all."""
    upstream.scripts.append(gives(api, [0.33, 0.33, 0.33]))
    with api(upstream) as engine:
        answer = judged(engine, message("x", "a", "b", "c"))

    assert answer.logprobs == pytest.approx([math.log(1 / 3)] * 3)


@pytest.mark.parametrize("api", [decisions])
def test_cached_tokens_are_the_servers(upstream: Upstream, api: Api) -> None:
    """As far as the prompt is that long."""
    with api(upstream) as engine:
        long, short = judged(engine, message("x" * 40)), judged(engine, message("x" * 12))

    assert (long.cached_tokens, short.cached_tokens) == (5, 3)


def test_a_probability_of_zero_has_no_logarithm(upstream: Upstream, api: Api) -> None:
    """Its item fails, or is given the floor and says so."""
    upstream.always = gives(api, [1.0, 0.0])
    with api(upstream) as engine, api(upstream, floor=-20.0) as floored:
        (bare,) = engine.run([message("x")])
        answer = judged(floored, message("x"))

    assert isinstance(bare, ItemFailure)
    assert bare.code is ErrorCode.LABEL_NOT_RETURNED
    assert "label 2 of 2 is not given a probability above 0" in bare.message
    assert answer == LabelLogprobs((0.0, -20.0), 0, answer.cached_tokens, floored=True)


def test_the_floor_is_below_every_label_that_has_a_probability(upstream: Upstream, api: Api) -> None:
    """It is lowered to the least likely one's: the missing one is no likelier."""
    upstream.always = gives(api, [1 - 1e-12, 1e-12, 0.0])
    with api(upstream, floor=-5.0) as engine:
        answer = judged(engine, message("x", "a", "b", "c"))

    assert answer.logprobs[2] == answer.logprobs[1] == pytest.approx(math.log(1e-12))


def test_no_label_mass_at_all_is_never_floored(upstream: Upstream, api: Api) -> None:
    """The shares of nothing say nothing."""
    upstream.always = gives(api, [0.5, 0.5], mass=0.0)
    with api(upstream, floor=-20.0) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.LABEL_NOT_RETURNED


def choice(**changes: Any) -> Callable[[Api, Mapping[str, Any]], Any]:
    """An answer of probabilities 0.2 and 0.8, with these fields of the question's answer changed."""

    def changed(api: Api, body: Mapping[str, Any]) -> Any:
        whole = ANSWERS[api](body, [0.2, 0.8])
        answer = whole["answers"][0] if api is decisions else whole["answers"]["answer"]
        answer.update(changes)
        return whole

    return changed


def given(*pairs: tuple[Any, Any]) -> Callable[[Api, Mapping[str, Any]], Any]:
    """An answer whose probabilities are these, by option."""

    def changed(api: Api, body: Mapping[str, Any]) -> Any:
        listed = [{"value": value, "probability": share} for value, share in pairs]
        return choice(probabilities=listed if api is decisions else dict(pairs))(api, body)

    return changed


NOT_RETURNED: Final = ErrorCode.LABEL_NOT_RETURNED
FAILED: Final = ErrorCode.INFERENCE_FAILED


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (choice(type="refusal"), NOT_RETURNED, "declined to answer"),
        (given(("Yes", 1.0)), NOT_RETURNED, "label 2 of 2 is not given a probability"),
        (given(("Yes", 0.0), ("No", 0.0)), FAILED, "add up to 0 and not to 1"),
        (given(), FAILED, "add up to 0 and not to 1"),
        (given(("Yes", 0.6)), FAILED, "add up to 0.6 and not to 1"),
        (given(("Yes", 0.7), ("No", 0.7)), FAILED, "add up to 1.4 and not to 1"),
        (given(("Yes", 0.5), ("Maybe", 0.5)), FAILED, "one that was not given"),
        (given(("Yes", 0.5), ("No", 0.5), ("", 0.0)), FAILED, "one that was not given"),
        (given(("Yes", math.nan), ("No", 0.5)), FAILED, "not in the form of"),
        (given(("Yes", math.inf), ("No", 0.5)), FAILED, "not in the form of"),
        (given(("Yes", -0.5), ("No", 1.5)), FAILED, "not in the form of"),
        (given(("Yes", "0.5"), ("No", 0.5)), FAILED, "not in the form of"),
        (given(("Yes", True), ("No", 0)), FAILED, "not in the form of"),
        (given(("Yes", None), ("No", 1.0)), FAILED, "not in the form of"),
        (choice(probabilities="Yes"), FAILED, "not in the form of"),
        (choice(type="predicate"), FAILED, "is not a choice"),
        (choice(type="noul"), FAILED, "is not a choice"),
        (choice(type=None), FAILED, "not in the form of"),
        (choice(x_label_mass=1.5), FAILED, "not in the form of"),
        (choice(x_label_mass=-0.1), FAILED, "not in the form of"),
        (choice(x_label_mass=math.nan), FAILED, "not in the form of"),
        (choice(x_label_mass="much"), FAILED, "not in the form of"),
        (lambda api, body: {**ANSWERS[api](body, [0.2, 0.8]), "answers": None}, FAILED, "not in the form of"),
        (lambda *_: {"choices": [{"text": "Yes"}]}, FAILED, "not in the form of"),
        (lambda *_: b"<html>", FAILED, "does a proxy answer"),
        (lambda *_: b"[]", FAILED, "not in the form of"),
        (lambda *_: {"error": {"code": 404, "message": "no"}}, FAILED, "with an error in it (404)"),
    ],
)
def test_an_answer_that_is_no_distribution_fails_its_item_alone(
    upstream: Upstream, api: Api, reply: Callable[..., Any], code: ErrorCode, words: str
) -> None:
    """At once, with the code that says why, and the other item of the batch is answered."""
    of = {decisions: "input", systemone: "state"}[api]
    upstream.always = lambda seen: Reply(body=reply(api, seen.body)) if seen.body[of] == "bad" else None
    with api(upstream) as engine:
        good, bad = engine.run([message("good"), message("bad")])

    assert isinstance(good, LabelLogprobs)
    assert isinstance(bad, ItemFailure)
    assert (bad.code, words in bad.message) == (code, True), bad.message
    assert len(upstream.asked) == 2


@pytest.mark.parametrize(
    "answers",
    [[], [{"type": "refusal"}, {"type": "refusal"}], {"other": {"type": "refusal"}}, {}],
)
def test_answers_to_other_questions_are_errors(upstream: Upstream, answers: Any) -> None:
    """None, several, or one by another name."""
    api = decisions if isinstance(answers, list) else systemone
    upstream.always = lambda _: Reply(body={"answers": answers})
    with api(upstream) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.INFERENCE_FAILED


def test_an_option_that_is_named_twice_is_an_error(upstream: Upstream) -> None:
    """Which of the two would count?"""
    upstream.always = lambda seen: Reply(body=given(("Yes", 0.5), ("Yes", 0.5))(decisions, seen.body))
    with decisions(upstream) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.INFERENCE_FAILED


def test_more_options_than_the_protocol_has_are_not_sent(upstream: Upstream, api: Api) -> None:
    """255 are; neither is a choice of one."""
    with api(upstream) as engine:
        most, more, one = engine.run([message("x", *map(str, range(n))) for n in (255, 256, 1)])

    assert isinstance(most, LabelLogprobs)
    assert (failed(more), failed(one)) == (ErrorCode.BAD_LABEL, ErrorCode.BAD_LABEL)
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "This model supports at most 26 choices per question"),
        error(400, "question 'answer': at most 26 options for this model"),
        Reply(422, {"detail": [{"loc": ["body", "questions"], "msg": "too many options", "type": "too_long"}]}),
    ],
)
def test_more_options_than_the_server_takes_are_the_callers_error(upstream: Upstream, api: Api, refusal: Reply) -> None:
    """The question is not for this model; it is not asked again."""
    upstream.always = lambda _: refusal
    with api(upstream) as engine:
        (answer,) = engine.run([message("x", *map(str, range(30)))])

    assert failed(answer) is ErrorCode.BAD_LABEL
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "refusal",
    [
        Reply(400, {"detail": {"error_type": "max_tokens_exceeded"}}),
        Reply(422, {"detail": {"error_type": "max_tokens_exceeded", "message": None}}),
        Reply(422, {"detail": "The prompt is too long: 40000 tokens"}),
        Reply(413, {"detail": "no", "code": "context_length_exceeded"}),
        Reply(400, {"detail": None, "message": "The prompt is too long: 40000 tokens"}),
        error(400, "anything", code="context_length_exceeded"),
        error(400, "This model's maximum context length is 4096 tokens. However, your request has 5000"),
    ],
)
def test_a_prompt_that_is_too_long_for_the_server_is_the_callers_error(
    upstream: Upstream, api: Api, refusal: Reply
) -> None:
    """In TypeSafe's words, FastAPI's or OpenAI's."""
    upstream.always = lambda _: refusal
    with api(upstream) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_temporary_errors_are_retried(upstream: Upstream, api: Api, status: int) -> None:
    """As with the other ways of asking."""
    upstream.scripts.extend([error(status), Reply(status, {"detail": {"error_type": "overloaded"}})])
    with api(upstream) as engine:
        judged(engine, message("x"))

    assert len(upstream.asked) == 3


def test_a_server_that_stays_busy_is_reported_as_such(upstream: Upstream, api: Api) -> None:
    """Clients come back later."""
    upstream.always = lambda _: error(429, headers={"Retry-After": "3600"})
    with api(upstream) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.OVERLOADED


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_a_server_without_the_route_is_reported_with_it(upstream: Upstream, api: Api, status: int) -> None:
    """Once, by the probe; no other route is tried."""
    upstream.always = lambda _: error(status, "there is no such thing")
    path = {decisions: "/v1/decisions", systemone: "/v1/systemone"}[api]
    with (
        api(upstream) as engine,
        pytest.raises(RuntimeError, match=f"{path}: .*answered {status} and says: there is no such thing"),
    ):
        engine.probe(message("probe"))

    assert [seen.path for seen in upstream.seen] == [path]


def test_what_is_wrong_with_a_probe_is_quoted_from_fastapis_form(upstream: Upstream, api: Api) -> None:
    """Field and problem of each entry, and none of the body's values."""
    upstream.always = lambda _: Reply(
        422, {"detail": [{"loc": ["body", "model"], "msg": "Field required", "input": "secret"}, "odd"]}
    )
    with api(upstream) as engine, pytest.raises(RuntimeError, match="Field required") as told:
        engine.probe(message("probe"))

    assert "secret" not in str(told.value)


def test_a_refused_probe_only_warns(upstream: Upstream, api: Api) -> None:
    """The model may answer what the templates ask."""
    upstream.always = lambda seen: Reply(body=choice(type="refusal")(api, seen.body))
    with capture_logs() as logs, api(upstream) as engine:
        engine.probe(message("probe"))

    assert [entry["log_level"] for entry in logs] == ["warning"]

"""One client in several processes, threads and event loops: each gets its own answers."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import client
from client import AsyncJudge, Judge, JudgeConnectionError
from client.adapters.trl import JudgeReward, RewardOptions
from client.bulk import BulkOptions
from client.schema import InlineTemplate, Labels, ScoreRequest
from tests.client.scoring_server import scoring_server
from tests.client.tcp_server import tcp_server
from tests.support.fake_judge import SCORE, Ask, Service, ask_sync, both
from tests.support.live import wait_for

FORK = multiprocessing.get_context("fork")
WAYS = [lambda judge: pickle.loads(pickle.dumps(judge)), copy.copy, copy.deepcopy]
NOT_FOUND = {"error": {"message": "m", "type": "not_found_error", "code": "not_found"}}


def log_odds(judge: Judge, number: int) -> float:
    """What the scoring server answers to this number: the number itself."""
    return judge.score("p", str(number)).log_odds


async def async_log_odds(judge: AsyncJudge, number: int) -> float:
    """`log_odds` for asyncio."""
    return (await judge.score("p", str(number))).log_odds


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=lambda: theirs.send(work()))
    child.start()
    theirs.close()
    answer = ours.recv()
    child.join(30)
    return answer


# Forks.


def test_a_forked_child_uses_its_own_connection() -> None:
    """A child never writes to its parent's connection, which the parent keeps using."""
    with scoring_server() as server, Judge(server.url) as judge:
        answers = [log_odds(judge, 1), in_child(lambda: log_odds(judge, 2)), log_odds(judge, 3)]

    assert answers == [1, 2, 3]
    assert server.connections[0] == server.connections[2] != server.connections[1]


def test_forked_children_and_their_parent_get_their_own_scores() -> None:
    """Four processes that share one Judge at the same time each get their own scores."""
    with scoring_server() as server, Judge(server.url) as judge:
        log_odds(judge, 0)
        with ThreadPoolExecutor(4) as threads:
            asked = [range(start, start + 20) for start in (100, 200, 300)]
            children = [threads.submit(in_child, lambda ns=ns: [log_odds(judge, n) for n in ns]) for ns in asked]
            mine = [log_odds(judge, number) for number in range(400, 440)]

    assert mine == [*range(400, 440)]
    assert [child.result() for child in children] == [[*numbers] for numbers in asked]


def test_a_forked_child_with_asyncio_uses_its_own_connection() -> None:
    """An AsyncJudge in a forked child does not touch its parent's loop and connections, in bulk calls either."""

    async def many(judge: AsyncJudge) -> list[float]:
        results = await judge.score_many(ScoreRequest(prompt="p", response=str(number)) for number in range(3))
        return [result.log_odds for result in results if not isinstance(result, client.JudgeAPIError)]

    with scoring_server() as server, asyncio.Runner() as runner:
        judge = AsyncJudge(server.url)
        first = runner.run(async_log_odds(judge, 1))
        children = in_child(lambda: [asyncio.run(async_log_odds(judge, 2)), asyncio.run(many(judge))])
        last = runner.run(async_log_odds(judge, 3))

    assert [first, children, last] == [1, [2, [0, 1, 2]], 3]
    assert server.connections[0] == server.connections[-1]


def test_a_child_that_closes_the_judge_leaves_the_parents_connection() -> None:
    """Closing in a child closes only what the child opened."""
    with scoring_server() as server, Judge(server.url) as judge:
        log_odds(judge, 1)
        in_child(judge.close)
        answer = log_odds(judge, 2)

    assert answer == 2
    assert len(set(server.connections)) == 1


# Answers to other requests.


def answer_to(body: dict[str, Any], request_id: str | None, status: int = 200) -> httpx.Response:
    """An answer with this X-Request-Id, or none."""
    return httpx.Response(status, json=body, headers={} if request_id is None else {"X-Request-Id": request_id})


@both
@pytest.mark.parametrize("status", [200, 404])
def test_an_answer_to_another_request_is_retried(ask: Ask, status: int) -> None:
    """An answer or error with another request's id is neither returned nor raised: the next attempt counts."""
    another = answer_to(SCORE if status == 200 else NOT_FOUND, "another", status)
    service = Service(another, another, answer_to({**SCORE, "log_odds": 9.0}, None))

    assert ask(service, "score", "p", "r").log_odds == 9.0


@both
def test_nothing_but_answers_to_other_requests_is_an_error(ask: Ask) -> None:
    """If retries do not help, the error says that the ids differ and what a gateway should do."""
    with pytest.raises(JudgeConnectionError, match=r"another request's.*'theirs'.*gateway"):
        ask(Service(answer_to(SCORE, "theirs")), "score_batch", [ScoreRequest(prompt="p", response="r")])


@both
def test_a_gateways_own_error_keeps_its_status(ask: Ask) -> None:
    """An error page of a gateway that sets its own ids is still that error."""
    page = httpx.Response(401, html="no", headers={"X-Request-Id": "gateway"})

    with pytest.raises(client.AuthenticationError) as caught:
        ask(Service(page), "score", "p", "r")
    assert caught.value.request_id == "gateway"


def test_an_additional_id_of_a_gateway_is_accepted() -> None:
    """If one of several ids is the request's, the answer is its own."""

    def answer(request: httpx.Request) -> httpx.Response:
        return answer_to(SCORE, f"gateway, {request.headers['X-Request-Id']}")

    assert ask_sync(answer, "score", "p", "r").log_odds == SCORE["log_odds"]


def test_the_connection_of_a_mix_up_is_dropped() -> None:
    """The next attempt opens a new connection: whatever else the old one holds is never read."""
    whole = b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\n{}"

    with tcp_server([whole * 2, whole]) as (url, requests), pytest.raises(JudgeConnectionError, match="theirs"):
        ask_sync(url, "score", "p", "r", settings={"max_retries": 1})
    assert len(requests) == 2


# Pickles and copies.


@pytest.mark.parametrize("way", WAYS, ids=["pickle", "copy", "deepcopy"])
def test_a_judge_pickles_and_copies_as_its_settings(way: Callable[[Any], Any]) -> None:
    """The copy asks the same service with the same key, headers and timeout."""
    with scoring_server() as server:
        judge = Judge(server.url, api_key="k", timeout=7, headers={"traceparent": "t"})
        judge.backoff = 0.5
        with way(judge) as arrived:
            log_odds(arrived, 1)

    head = server.heads[0]
    assert (head["Authorization"], head["traceparent"], arrived.backoff) == ("Bearer k", "t", 0.5)
    assert 6 < float(head["X-Request-Timeout"]) <= 7


@pytest.mark.parametrize("way", WAYS, ids=["pickle", "copy", "deepcopy"])
def test_a_copy_of_a_used_or_closed_judge_is_fresh(way: Callable[[Any], Any]) -> None:
    """A copy is open and has no connections, even if the original has some or is closed."""
    with scoring_server() as server, Judge(server.url) as judge:
        log_odds(judge, 1)
        with way(judge) as used:
            judge.close()
            with way(judge) as closed:
                answers = [log_odds(used, 2), log_odds(closed, 3)]

    assert answers == [2, 3]
    assert len(set(server.connections)) == 3


@pytest.mark.parametrize("way", WAYS, ids=["pickle", "copy", "deepcopy"])
async def test_a_copy_of_a_used_async_judge_is_fresh(way: Callable[[Any], Any]) -> None:
    """An AsyncJudge with open connections can be sent to another process."""
    with scoring_server() as server:
        async with AsyncJudge(server.url) as judge:
            await async_log_odds(judge, 1)
            async with way(judge) as other:
                answer = await async_log_odds(other, 2)

    assert answer == 2
    assert len(set(server.connections)) == 2


def test_a_reward_function_pickles_with_its_options() -> None:
    """TRL's AsyncGRPO and Ray send reward functions to other processes, with their options, name and counts."""
    template = InlineTemplate(layout="{prompt} {response}", labels=Labels(yes=["A"], no=["B"]))
    options = RewardOptions(value="score", template=template, bulk=BulkOptions(batch_items=2))
    with scoring_server() as server, Judge(server.url) as judge:
        reward = JudgeReward(judge, options, name="mine")
        reward(["p"], [""])
        arrived = pickle.loads(pickle.dumps(reward))
        with arrived.judge:
            rewards = arrived(["p", "p"], ["1", "2"])

    assert rewards == [SCORE["score"]] * 2
    assert (arrived.options, arrived.__name__, arrived.failures) == (options, "mine", reward.failures)


def score_in_worker(judge: Judge) -> float:
    """The work of a spawned worker process."""
    return log_odds(judge, os.getpid())


def test_a_judge_can_be_sent_to_a_spawned_worker() -> None:
    """A Judge may be an argument of work for another process."""
    with scoring_server() as server, Judge(server.url) as judge:
        log_odds(judge, 1)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pid = pool.apply_async(score_in_worker, [judge]).get(120)

    assert pid != os.getpid()


# Event loops.


def test_an_async_judge_works_in_one_loop_after_another() -> None:
    """Each asyncio.run has its own connection, which is closed when it ends."""
    with scoring_server() as server:
        judge = AsyncJudge(server.url)
        answers, closed = [], []
        for number in range(3):
            answers.append(asyncio.run(async_log_odds(judge, number)))
            closed.append(wait_for(lambda: not server.open))

    assert (answers, closed) == ([0, 1, 2], [True] * 3)
    assert len(set(server.connections)) == 3


def test_an_async_judge_works_in_two_loops_at_once() -> None:
    """Threads with their own loops may share one AsyncJudge."""
    with scoring_server() as server:
        judge = AsyncJudge(server.url)

        def ask(start: int) -> list[float]:
            async def work() -> list[float]:
                return await asyncio.gather(*(async_log_odds(judge, start + number) for number in range(20)))

            return asyncio.run(work())

        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(ask, (0, 100, 200)))

    assert answers == [[*range(start, start + 20)] for start in (0, 100, 200)]


def test_a_closed_async_judge_is_closed_in_every_loop() -> None:
    """After aclose, which may be repeated, calls raise RuntimeError, in the same loop and in another."""
    with scoring_server() as server:
        judge = AsyncJudge(server.url)

        async def use() -> None:
            await judge.score("p", "1")
            await judge.aclose()
            await judge.aclose()
            with pytest.raises(RuntimeError, match="closed"):
                await judge.score("p", "2")

        asyncio.run(use())

        with pytest.raises(RuntimeError, match="closed"):
            asyncio.run(async_log_odds(judge, 3))


async def test_a_sync_judge_works_inside_a_running_loop() -> None:
    """The sync client works in a notebook's loop too, for single calls and in bulk."""
    with scoring_server() as server, Judge(server.url) as judge:
        one = log_odds(judge, 1)
        many = judge.score_many([ScoreRequest(prompt="p", response="2")])

    assert [one, *(result.log_odds for result in many if not isinstance(result, client.JudgeAPIError))] == [1, 2]

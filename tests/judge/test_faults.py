"""Workers, API processes and Redis die, hang and fall silent under load; every caller is answered once, and rightly.

The load is thousands of judgements at once with a fake engine that takes 0.1 s for a batch, so that each fault strikes
while most of them are open. A lease of 1.5 s keeps takeovers short.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

from bench.load import open_loop
from client.errors import JudgeConnectionError
from client.load.traffic import Load
from service.engine.fake import CRASH_STATUS, fake_tokenizer
from service.queue.redis_protocol import GROUP, Keys
from service.worker.loop import STALLED_STATUS
from tests.support.fleet import Fleet
from tests.support.live import wait_for
from tests.support.load import JudgedAlone, Mix, RunningLoad, Tally
from tests.support.redis_server import RedisServer, leftovers

MIX = Mix(batches=50, batch_size=100, singles=500)
ALL_ANSWERED = Tally(sent=MIX.sent, once=MIX.sent)
# Still under way after four kills and the redelivery of what the first two left.
LONG_MIX = Mix(batches=80, batch_size=100, singles=500)
# Three of them answer 960 judgements a second.
WORKER = ("--fake-delay", "0.1", "--batch-jobs", "32", "--lease-seconds", "1.5")
# A character that is in no template, so that a text with it is the only one with its token.
MARK = "~"


def start(fleet: Fleet, workers: int = 3) -> str:
    """One API process with so many workers; its address."""
    api = fleet.api()
    for _ in range(workers):
        fleet.worker(*WORKER)
    fleet.wait_ready()
    return api.url


def mark_token() -> str:
    """The id of MARK as a flag's value."""
    (token,) = fake_tokenizer().encode(MARK)
    return str(token)


def test_the_account_sees_what_goes_wrong() -> None:
    """A neighbour's number, a second answer, an error and silence are each told apart from a right answer."""
    alone = JudgedAlone()
    load = RunningLoad(Mix(batches=1, batch_size=5, singles=0), [])
    right = [alone.log_odds(load.mix.response(number)) for number in range(3)]
    load.answers = {0: [right[0]], 1: [right[2]], 2: [right[2], right[2]]}
    load.errors = {3: JudgeConnectionError("reset")}

    account = load.tally()

    assert account == Tally(sent=5, once=1, twice=1, wrong=1, hung=1, failed={"JudgeConnectionError": 1})


def test_killed_workers_lose_nothing(redis_server: RedisServer, fleet: Fleet) -> None:
    """kill -9 of one of three workers, four times: others take over its jobs, and no caller notices.

    A job that three workers in a row were lost with is given up by design, and a third kill can happen upon one that
    two have struck: after each two, what they left behind is answered before the next.
    """
    url = start(fleet)

    with RunningLoad(LONG_MIX, [url]) as load:
        for _ in range(2):
            for _ in range(2):
                load.wait_for_answers(len(load.answers) + 700)
                fleet.workers.pop(0).kill()
                fleet.worker(*WORKER)
            wait_for_what_is_held(redis_server)

    assert load.tally() == Tally(sent=LONG_MIX.sent, once=LONG_MIX.sent)
    assert leftovers(redis_server) == {}


def wait_for_what_is_held(server: RedisServer) -> None:
    """Return when every job that a worker, dead or alive, has in hand now has been answered."""
    with server.client() as client:
        held = [
            (stream, each["message_id"])
            for stream in Keys("judge:{fake}").streams
            for each in client.xpending_range(stream, GROUP, "-", "+", 1000)
        ]
        assert wait_for(lambda: not any(client.xrange(stream, entry, entry) for stream, entry in held), seconds=30)


def test_a_redis_that_loses_its_memory_costs_a_retry(redis_server: RedisServer, fleet: Fleet) -> None:
    """kill -9 and restart of Redis: callers of lost jobs are told at once, and are answered when they ask again."""
    url = start(fleet)

    with RunningLoad(MIX, [url]) as load:
        load.wait_for_answers(1000)
        redis_server.kill()
        time.sleep(1)
        redis_server.start()

    assert load.retried["queue_unavailable"] > 1000
    assert load.tally() == ALL_ANSWERED
    assert leftovers(redis_server) == {}


def test_a_killed_api_process_costs_its_callers_a_retry(redis_server: RedisServer, fleet: Fleet) -> None:
    """kill -9 and restart of one of two API processes: its callers' connections break, and they ask again."""
    start(fleet)
    dying = fleet.api()
    fleet.wait_ready()

    with RunningLoad(MIX, [api.url for api in fleet.apis]) as load:
        load.wait_for_answers(1000)
        dying.kill()
        fleet.apis.remove(dying)
        fleet.api(port=dying.port)

    assert load.tally() == ALL_ANSWERED
    assert leftovers(redis_server) == {}


def test_a_network_pause_is_sat_out(redis_server: RedisServer, fleet: Fleet) -> None:
    """Redis silent for 5 s, connections open: longer than a lease, shorter than anybody's patience."""
    url = start(fleet)

    with RunningLoad(MIX, [url]) as load:
        load.wait_for_answers(1000)
        redis_server.pause()
        time.sleep(5)
        redis_server.resume()

    assert load.tally() == ALL_ANSWERED
    assert leftovers(redis_server) == {}
    assert all(worker.alive for worker in fleet.workers)


def test_a_worker_that_comes_back_after_its_lease_changes_nothing(redis_server: RedisServer, fleet: Fleet) -> None:
    """Held for two leases and then let go: its jobs were judged by others, and its late replies are ignored."""
    url = start(fleet)

    with RunningLoad(MIX, [url]) as load:
        load.wait_for_answers(500)
        fleet.workers[0].pause()
        time.sleep(3)
        fleet.workers[0].resume()

    assert load.tally() == ALL_ANSWERED
    assert leftovers(redis_server) == {}
    assert fleet.workers[0].alive


def test_a_worker_that_hangs_ends_and_others_do_its_work(redis_server: RedisServer, fleet: Fleet) -> None:
    """An engine call that never returns: after the stall timeout the process ends, its jobs go to other workers."""
    stuck = fleet.worker(*WORKER, "--fake-hang-token", mark_token(), "--stall-timeout", "1")
    url = start(fleet, workers=2)
    mix = Mix(special={number: f"4 {MARK} {number}" for number in range(0, MIX.sent, 50)})

    with RunningLoad(mix, [url]) as load:
        status = stuck.wait()

    assert status == STALLED_STATUS
    assert load.tally() == ALL_ANSWERED
    assert leftovers(redis_server) == {}


def test_an_item_that_crashes_its_worker_is_given_up_alone(redis_server: RedisServer, fleet: Fleet) -> None:
    """Poison in a batch and in a single request: a 500 that says so after three deliveries; no neighbour suffers."""
    crash = (*WORKER, "--fake-crash-token", mark_token())
    for _ in range(3):
        fleet.worker(*crash)
    url = start(fleet, workers=0)
    poison = {2050: f"4 {MARK} in a batch", 5100: f"4 {MARK} alone"}

    with fleet.replacing_the_dead(*crash), RunningLoad(Mix(special=poison), [url]) as load:
        assert wait_for(lambda: set(load.errors) == set(poison), seconds=60)

    assert load.tally() == Tally(sent=MIX.sent, once=MIX.sent - 2, failed={"inference_failed": 2})
    assert all("workers in a row were lost" in str(error) for error in load.errors.values())
    # Three workers for each; the first delivery of both may be in one batch, and cost one.
    assert Counter(worker.process.poll() for worker in fleet.workers)[CRASH_STATUS] in {5, 6}
    assert dead_letters(redis_server) == 2
    assert leftovers(redis_server) == {}


def dead_letters(server: RedisServer) -> int:
    """Jobs in the stream of those given up."""
    with server.client() as client:
        return int(client.xlen("judge:{fake}:dead"))


def test_twice_the_capacity_gets_answers_or_an_honest_refusal(redis_server: RedisServer, fleet: Fleet) -> None:
    """200 requests a second where 100 can be judged: the surplus hears 503 and when to return, the rest is in time."""
    api = fleet.api("--max-queue-jobs", "100")
    fleet.worker("--fake-delay", "0.1", "--batch-jobs", "10")
    fleet.wait_ready()
    before = api.peak_memory

    load = Load(api.url, "/score", b'{"prompt": "What is 2+2?", "response": "4 {n}"}', 16, seconds=6, timeout=5)
    answers = asyncio.run(open_loop(load, rate=200))

    refused = [answer for answer in answers if answer.status == 503]
    assert Counter(answer.status for answer in answers) == {200: 1200 - len(refused), 503: len(refused)}
    assert 200 < len(refused) < 900
    assert {json.loads(answer.body)["error"]["code"] for answer in refused} == {"overloaded"}
    assert all(int(answer.retry_after or 0) >= 1 for answer in refused)
    assert api.peak_memory - before < 50e6
    assert leftovers(redis_server) == {}

"""The batching policy, on a clock that the tests set."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.contract import ScoreItem
from service.queue.contract import Job, Priority
from service.worker.scheduler import Scheduler, split_expired


def job(name: str, tokens: int, *, prefix: int = 0, start: int = 0, **more: Any) -> Job:
    boundaries = (prefix,) if prefix else ()
    ids = (start,) * prefix + tuple(range(tokens - prefix))
    return Job(name, ScoreItem(ids, (1, 2), boundaries), more.pop("deadline", 1e9), 0.0, **more)


def names(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


def test_a_batch_is_bounded_by_tokens() -> None:
    """Jobs of 40 tokens go two by two under a budget of 100."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=0.0)
    scheduler.add([job(name, 40) for name in "abc"], now=0.0)

    assert names(scheduler.next_batch()) == ["a", "b"]
    assert names(scheduler.next_batch()) == ["c"]


def test_a_batch_is_bounded_by_jobs() -> None:
    """No more than max_jobs go together, however small they are."""
    scheduler = Scheduler(max_tokens=100, max_jobs=2, max_wait=0.0)
    scheduler.add([job(name, 1) for name in "abc"], now=0.0)

    assert names(scheduler.next_batch()) == ["a", "b"]


def test_a_job_over_the_budget_goes_alone() -> None:
    """A job larger than the whole budget is a batch of its own."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=0.0)
    scheduler.add([job("big", 500), job("small", 10)], now=0.0)

    assert names(scheduler.next_batch()) == ["big"]
    assert names(scheduler.next_batch()) == ["small"]


def test_no_job_is_overtaken() -> None:
    """A later small job does not overtake an older one that did not fit, so that nothing starves."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=0.0)
    scheduler.add([job("a", 60), job("b", 60), job("c", 10)], now=0.0)

    assert names(scheduler.next_batch()) == ["a"]
    assert names(scheduler.next_batch()) == ["b", "c"]


def test_a_lone_job_waits_for_others() -> None:
    """It is due only after max_wait."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=0.5)
    scheduler.add([job("a", 10)], now=10.0)

    assert scheduler.seconds_until_due(now=10.25) == 0.25
    assert scheduler.seconds_until_due(now=10.5) == 0.0


def test_a_full_batch_does_not_wait() -> None:
    """When the tokens fill a batch it goes at once, and no more jobs are taken meanwhile."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=60.0)
    scheduler.add([job("a", 100)], now=0.0)

    assert scheduler.seconds_until_due(now=0.0) == 0.0
    assert scheduler.room == 0


def test_an_empty_batcher_is_never_due() -> None:
    """Without jobs there is nothing to wait for."""
    assert Scheduler(max_tokens=100, max_jobs=16, max_wait=0.0).seconds_until_due(now=0.0) is None


def test_jobs_that_share_a_prefix_stand_side_by_side() -> None:
    """Siblings that arrived apart are put together, in the order of the oldest job of each group."""
    scheduler = Scheduler(max_tokens=1000, max_jobs=16, max_wait=0.0)
    ones = [job(name, 20, prefix=10, start=1) for name in ("a1", "a2")]
    twos = [job(name, 20, prefix=10, start=2) for name in ("b1", "b2")]
    scheduler.add([ones[0], twos[0], ones[1], twos[1]], now=0.0)

    assert names(scheduler.next_batch()) == ["a1", "a2", "b1", "b2"]


@pytest.mark.parametrize(("shares", "batches"), [(True, ["abc", "d"]), (False, ["a", "b", "c", "d"])])
def test_a_shared_prefix_counts_once_where_the_engine_computes_it_once(shares: bool, batches: list[str]) -> None:
    """Three jobs of 60 tokens that share 50 fit a budget of 80; a fourth with another beginning does not."""
    scheduler = Scheduler(max_tokens=80, max_jobs=16, max_wait=0.0, shares_prefixes=shares)
    scheduler.add([job(name, 60, prefix=50, start=1) for name in "abc"], now=0.0)
    scheduler.add([job("d", 60, prefix=50, start=2)], now=0.0)

    assert ["".join(names(scheduler.next_batch())) for _ in batches] == batches
    assert scheduler.seconds_until_due(now=0.0) is None


def test_a_shared_prefix_leaves_room_for_more_jobs() -> None:
    """A batch is not full while only the prompts, and not what is computed of them, reach the budget."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=60.0, shares_prefixes=True)
    scheduler.add([job(name, 60, prefix=50) for name in "abc"], now=0.0)

    assert scheduler.room > 0
    assert scheduler.seconds_until_due(now=0.0) == 60.0
    scheduler.add([job(name, 60, prefix=50) for name in "de"], now=0.0)
    assert scheduler.seconds_until_due(now=0.0) == 0.0


def test_interactive_jobs_go_before_bulk_ones() -> None:
    """A single request behind a benchmark's thousands goes with the next batch."""
    scheduler = Scheduler(max_tokens=40, max_jobs=16, max_wait=0.0)
    scheduler.add([job(f"bulk{n}", 10, priority=Priority.BULK) for n in range(9)], now=0.0)
    scheduler.add([job("single", 10)], now=1.0)

    assert names(scheduler.next_batch()) == ["single", "bulk0", "bulk1", "bulk2"]


def test_bulk_jobs_keep_a_share_of_each_batch() -> None:
    """However many single requests wait, bulk jobs get a quarter of the tokens and of the places."""
    by_tokens = Scheduler(max_tokens=40, max_jobs=16, max_wait=0.0)
    by_jobs = Scheduler(max_tokens=10_000, max_jobs=4, max_wait=0.0)
    for scheduler in (by_tokens, by_jobs):
        scheduler.add([job(f"single{n}", 10) for n in range(9)], now=0.0)
        scheduler.add([job(f"bulk{n}", 10, priority=Priority.BULK) for n in range(9)], now=0.0)

    assert names(by_tokens.next_batch()) == names(by_jobs.next_batch()) == ["single0", "single1", "single2", "bulk0"]


def test_a_redelivered_job_goes_alone() -> None:
    """It may have killed its last worker, and must not take neighbours along a second time."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=5.0)
    scheduler.add([job("a", 10), job("suspect", 10, attempt=2), job("b", 10)], now=0.0)

    assert scheduler.seconds_until_due(now=0.0) == 0.0
    assert names(scheduler.next_batch()) == ["suspect"]
    assert names(scheduler.next_batch()) == ["a", "b"]


def test_room_follows_the_size_of_the_jobs_seen() -> None:
    """After many jobs of 50 tokens, a budget of 1,000 has room for about 20, not for 256."""
    scheduler = Scheduler(max_tokens=1000, max_jobs=256, max_wait=0.0)
    for number in range(100):
        scheduler.add([job(str(number), 50)], now=0.0)
        scheduler.next_batch()

    assert 20 <= scheduler.room <= 21


def test_everything_can_be_handed_back() -> None:
    """A stopping worker takes out every job, and none is left."""
    scheduler = Scheduler(max_tokens=100, max_jobs=16, max_wait=0.0)
    scheduler.add([job("a", 10), job("b", 10, priority=Priority.BULK), job("c", 10, attempt=2)], now=0.0)

    assert sorted(names(scheduler.take_all())) == ["a", "b", "c"]
    assert scheduler.seconds_until_due(now=1.0) is None


def test_expired_jobs_are_split_from_live_ones() -> None:
    """A job at or past its deadline has expired."""
    live, late = split_expired([job("a", 1, deadline=5.0), job("b", 1, deadline=5.1)], now=5.0)

    assert names(live) == ["b"]
    assert names(late) == ["a"]


@given(st.lists(st.integers(min_value=1, max_value=150), max_size=60), st.integers(1, 8))
def test_every_job_goes_exactly_once_and_in_order(sizes: list[int], max_jobs: int) -> None:
    """Whatever the sizes, all jobs come out once, oldest first, and only a single job may exceed the budget."""
    scheduler = Scheduler(max_tokens=100, max_jobs=max_jobs, max_wait=0.0)
    scheduler.add([job(str(index), size) for index, size in enumerate(sizes)], now=0.0)

    batches = []
    while scheduler.seconds_until_due(now=1.0) == 0.0:
        batches.append(scheduler.next_batch())

    assert [name for batch in batches for name in names(batch)] == [str(index) for index in range(len(sizes))]
    assert all(len(batch) <= max_jobs for batch in batches)
    assert all(len(batch) == 1 or sum(job.tokens for job in batch) <= 100 for batch in batches)

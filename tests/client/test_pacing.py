"""How bulk calls are paced: concurrency by the service's answers, and patience when none come."""

from __future__ import annotations

from client.transport.pacing import Patience, Throttle


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_quick_answers_raise_the_concurrency_one_by_one() -> None:
    """It starts at 2, grows by one with each quick answer, and stops at the maximum."""
    throttle = Throttle(4)

    allowed = [throttle.allowed]
    for _ in range(3):
        throttle.answered(1.0)
        allowed.append(throttle.allowed)

    assert allowed == [2, 3, 4, 4]


def test_slow_answers_do_not_raise_the_concurrency() -> None:
    """A judge that takes longer than the quick limit is busy enough."""
    throttle = Throttle(4, quick=5.0)

    throttle.answered(5.1)

    assert throttle.allowed == 2


def test_calls_refused_together_halve_the_concurrency_once() -> None:
    """A refusal halves it, never below 1, unless the call began before the last halving."""
    clock = Clock()
    throttle = Throttle(16, clock=clock)
    for _ in range(6):
        throttle.answered(0.1)

    clock.now = 1.0
    together = [throttle.refused(began=0.5), throttle.refused(began=0.6)]
    after_one_round = throttle.allowed
    for clock.now in (2.0, 3.0, 4.0, 5.0):
        throttle.refused(began=clock.now)

    assert together == [True, False]
    assert (after_one_round, throttle.allowed, throttle.rounds) == (4, 1, 5)


def test_a_shorter_pause_does_not_shorten_a_longer_one() -> None:
    """A pause lasts as long as the longest that was asked for."""
    clock = Clock()
    throttle = Throttle(4, clock=clock)

    throttle.pause(10.0)
    throttle.pause(1.0)
    clock.now = 4.0

    assert throttle.paused_for() == 6.0


def test_patience_runs_from_the_first_failure_and_is_renewed_by_an_answer() -> None:
    """Further failures do not extend it; after an answer it is whole, and the next failure is a first one again."""
    patience = Patience(10.0)

    first = [patience.failed(began=1.0), patience.failed(began=5.0)]
    left = patience.left(at=6.0)
    patience.answered(at=7.0)

    assert (first, left) == ([True, False], 5.0)
    assert (patience.left(at=100.0), patience.failed(began=101.0)) == (10.0, True)


def test_patience_is_not_spent_before_the_last_answer() -> None:
    """A call that hung while others were answered costs only the time since their last answer."""
    patience = Patience(10.0)
    patience.answered(at=7.0)

    patience.failed(began=0.0)

    assert patience.left(at=9.0) == 8.0


def test_the_readers_own_time_costs_no_patience() -> None:
    """What a stream's reader spends between two outcomes is given back."""
    patience = Patience(10.0)
    patience.failed(began=0.0)

    patience.excuse(4.0)

    assert patience.left(at=5.0) == 9.0

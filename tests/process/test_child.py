"""Work in a forked process: what it returns, and how its end is reported."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

import psutil
import pytest
import torch

from service.process.child import ChildError, in_child
from tests.support.live import wait_for


def crash() -> bytes:
    """Read an address without memory."""
    return ctypes.string_at(8)


def refuse() -> NoReturn:
    """Raise an error."""
    raise ValueError("no such thing")


def hang() -> bytes:
    """Deaf to all but SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(60)


def send(number: int) -> Callable[[], bytes]:
    """End by a signal."""
    return lambda: os.kill(os.getpid(), number) or b"alive"


@contextmanager
def torch_at_work() -> Iterator[None]:
    """Two threads multiply in bf16 and fp32 at the same time."""
    done = threading.Event()

    def work(dtype: torch.dtype) -> None:
        rows = torch.ones(64, 64, dtype=dtype)
        while not done.is_set():
            rows = torch.nn.functional.linear(rows, rows).clamp(0, 1)

    with ThreadPoolExecutor(2) as threads:
        working = [threads.submit(work, dtype) for dtype in (torch.float32, torch.bfloat16)]
        try:
            yield
        finally:
            done.set()
        for future in working:
            future.result()


def test_a_child_returns_bytes() -> None:
    """From a process of its own, which has a copy of this one's memory."""
    seen = [os.getpid()]

    def work() -> bytes:
        seen.append(0)
        return f"{seen[0]} {os.getppid()} {os.getpid()}".encode()

    parent, ppid, pid = map(int, in_child(work, 10).split())

    assert parent == ppid == os.getpid() != pid
    assert seen == [os.getpid()]


@pytest.mark.parametrize("returned", [b"", b"\0\xff" * 2000])
def test_any_bytes_come_back(returned: bytes) -> None:
    """None, and nearly as many as a child may return."""
    assert in_child(lambda: returned, 10) == returned


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (refuse, "raised ValueError: no such thing"),
        (lambda: sys.exit("enough"), "raised SystemExit: enough"),
        (lambda: bytes(5000), "raised ValueError: 5000 bytes are more"),
        (lambda: {}["é" * 9000], "raised KeyError: 'ééé"),
        (lambda: os._exit(3), "ended with status 3"),
        (lambda: os._exit(0), "ended with status 0"),
        (os.abort, "was killed by SIGABRT"),
        (crash, "was killed by SIGSEGV"),
        *((send(number), f"was killed by {number.name}") for number in (signal.SIGILL, signal.SIGBUS, signal.SIGKILL)),
        (send(signal.SIGRTMIN + 3), f"was killed by signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_the_error_says_how_a_child_ended(work: Callable[[], bytes], said: str) -> None:
    """By an exception with its text, a status, or a signal by its name."""
    with pytest.raises(ChildError) as raised:
        in_child(work, 10)

    assert str(raised.value).startswith(said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_leaves_the_signals_of_a_stop_to_its_parent(number: signal.Signals) -> None:
    """Ctrl-C reaches the whole group of processes."""
    assert in_child(send(number), 10) == b"alive"


def test_a_child_that_hangs_is_killed() -> None:
    """It is gone when the error is raised."""
    before = psutil.Process().children()

    with pytest.raises(ChildError, match="did not end within 1 s"):
        in_child(hang, 0.5001)

    assert psutil.Process().children() == before


def test_a_child_whose_threads_hang_returns() -> None:
    """It does not wait for them."""

    def work() -> bytes:
        threading.Thread(target=hang_quietly).start()
        return b"done"

    def hang_quietly() -> None:
        time.sleep(60)

    assert in_child(work, 10) == b"done"


def test_what_a_child_prints_is_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    """What a library prints when it crashes does not get into this process's log."""

    def work() -> bytes:
        os.write(1, b"printed\n")
        os.write(2, b"free(): invalid pointer\n")
        return b""

    in_child(work, 10)

    assert capfd.readouterr() == ("", "")


def test_nothing_is_left_behind() -> None:
    """Many children that end in all these ways leave no open files and no zombies."""
    fds, children = psutil.Process().num_fds(), psutil.Process().children()

    for _ in range(30):
        in_child(bytes, 10)
        for work in (refuse, os.abort, lambda: os._exit(1)):
            with pytest.raises(ChildError):
                in_child(work, 10)

    assert psutil.Process().num_fds() == fds
    assert psutil.Process().children() == children


_PARENT = """
import sys, time
from service.process import child
child.ALARM_GRACE_SECONDS = 2
print("forking", flush=True)
child.in_child(lambda: time.sleep(600) or b"", 1000 if sys.argv[1] == "long" else 1)
"""


def test_the_child_of_a_killed_parent_ends_itself() -> None:
    """A little after its time."""
    with subprocess.Popen([sys.executable, "-c", _PARENT, "short"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forking\n"
        assert wait_for(lambda: bool(psutil.Process(parent.pid).children()))
        (child,) = psutil.Process(parent.pid).children()

        parent.kill()

        assert wait_for(lambda: not child.is_running(), 20)


def test_an_interrupted_parent_kills_its_child() -> None:
    """Ctrl-C during the wait."""
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, "long"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forking\n"
        assert wait_for(lambda: bool(psutil.Process(parent.pid).children()))
        (child,) = psutil.Process(parent.pid).children()

        parent.send_signal(signal.SIGINT)

        assert parent.wait(20) != 0
        assert not child.is_running()


def test_threads_may_have_children() -> None:
    """Several at once, while torch works in other threads: each gets its own child's answer or end."""

    def ask(number: int) -> bytes | str:
        try:
            return in_child(lambda: crash() if number % 3 == 0 else str(torch.ones(number, number).sum()).encode(), 30)
        except ChildError as ended:
            return str(ended)

    with torch_at_work(), ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, range(60)))

    assert answers == [
        "was killed by SIGSEGV" if n % 3 == 0 else str(torch.ones(n, n).sum()).encode() for n in range(60)
    ]


def test_a_child_may_have_children() -> None:
    """A service may itself be one of a pool's processes."""
    assert in_child(lambda: in_child(lambda: b"grandchild", 10), 20) == b"grandchild"


def test_sigchld_may_be_ignored() -> None:
    """A process may be started like that. The kernel then drops the status, and what was returned decides."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert in_child(lambda: b"returned", 10) == b"returned"
        with pytest.raises(ChildError, match="ended with status 0"):
            in_child(crash, 10)
    finally:
        signal.signal(signal.SIGCHLD, before)

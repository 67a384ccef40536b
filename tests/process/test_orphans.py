"""Processes end with the one that started them, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from service.process.orphans import OrphanGuard
from tests.support.live import wait_for

GUARDING = """
import subprocess, sys, time
from service.process.orphans import OrphanGuard
guard = OrphanGuard()
child = subprocess.Popen(["/bin/sh", "-c", "sleep 600 & echo $$ $!; wait"], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), flush=True)
time.sleep(600)
"""


def test_orphans_are_ended_with_their_parent() -> None:
    """kill -9 of a process with a guard: its children and theirs are gone, too."""
    parent = subprocess.Popen([sys.executable, "-c", GUARDING], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()

    assert len(pids) == 2
    assert wait_for(lambda: not any(map(alive, pids)), 20)


def test_a_guard_ends_what_was_started_after_it() -> None:
    """And nothing else; dismissed, nothing at all."""
    before = subprocess.Popen(["/bin/sleep", "60"])
    guard = OrphanGuard()
    after = subprocess.Popen(["/bin/sleep", "60"])
    guard.kill_all()
    dismissed = OrphanGuard()
    spared = subprocess.Popen(["/bin/sleep", "60"])
    dismissed.dismiss()
    statuses = [after.wait(20), spared.poll(), before.poll()]
    for process in (before, spared):
        process.kill()
        process.wait()

    assert statuses == [-signal.SIGKILL, None, None]


def alive(pid: int) -> bool:
    """Whether a process still runs (a zombie does not)."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

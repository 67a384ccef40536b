"""The log's way to its reader, who may pause or leave."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.runtime.stderr import LIMIT, Writer


@pytest.fixture
def pipe() -> Iterator[tuple[int, Writer]]:
    """The end to read from, and a writer on the other end."""
    reader, end = os.pipe()
    yield reader, Writer(end)
    os.close(reader)
    os.close(end)


def drained(reader: int, writer: Writer) -> list[str]:
    """All lines that come until everything has been written."""
    found: list[bytes] = []

    def read() -> None:
        while not found or not found[-1].endswith(b"the end\n"):
            found.append(os.read(reader, 2**16))

    thread = threading.Thread(target=read)
    thread.start()
    while not writer.flush(20):
        pass
    writer.write("the end\n")
    thread.join(20)
    return b"".join(found).decode().splitlines()


def test_a_reader_who_pauses_gets_the_lines_in_order_and_how_many_are_missing(pipe: tuple[int, Writer]) -> None:
    """Nobody who writes has waited meanwhile."""
    reader, writer = pipe
    for number in range(3 * LIMIT):
        writer.write(f"line {number}\n")

    *lines, end = drained(reader, writer)
    numbers = [int(line.removeprefix("line ")) for line in lines if line.startswith("line ")]
    notices = [line.partition(" ")[0] for line in lines if line.endswith("dropped: it could not be written")]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + len(notices) == len(lines)
    assert LIMIT <= len(numbers) == 3 * LIMIT - sum(map(int, notices)) < 3 * LIMIT
    assert end == "the end"


def test_lines_that_come_while_the_reader_is_away_are_counted_when_there_is_one_again(tmp_path: Path) -> None:
    """As on a disk that was full: the first line that can be written says so, and begins a new line."""
    full, free = os.open("/dev/full", os.O_WRONLY), os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = Writer(full)
    for number in range(3):
        writer.write(f"line {number}\n")
    assert writer.flush(20)
    os.dup2(free, full)
    writer.write("back\n")
    assert writer.flush(20)

    said = (tmp_path / "log").read_text("utf-8").splitlines()
    assert said == ["3 lines of the log were dropped: it could not be written", "back"]
    os.close(full)
    os.close(free)


def test_a_forked_child_writes_too(pipe: tuple[int, Writer]) -> None:
    """The thread that writes stays with the parent, so the child has one of its own."""
    reader, writer = pipe
    child = os.fork()
    if child == 0:
        writer.write("from the child\n")
        os._exit(0 if writer.flush(20) else 1)
    _, status = os.waitpid(child, 0)

    assert (status, os.read(reader, 100)) == (0, b"from the child\n")

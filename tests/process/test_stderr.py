"""The writer of stderr never blocks: its reader may stall or leave."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.runtime.stderr import LIMIT, Writer


@pytest.fixture
def pipe() -> Iterator[tuple[int, Writer]]:
    """The reading end of a pipe, and a Writer on the other end."""
    reader, end = os.pipe()
    yield reader, Writer(end)
    os.close(reader)
    os.close(end)


def drained(reader: int, writer: Writer) -> list[str]:
    """All lines until everything has been written."""
    chunks: list[bytes] = []

    def read() -> None:
        while not chunks or not chunks[-1].endswith(b"the end\n"):
            chunks.append(os.read(reader, 2**16))

    thread = threading.Thread(target=read)
    thread.start()
    while not writer.flush(20):
        pass
    writer.write("the end\n")
    thread.join(20)
    return b"".join(chunks).decode().splitlines()


def test_a_stalled_reader_gets_lines_in_order_and_a_count_of_the_dropped_ones(pipe: tuple[int, Writer]) -> None:
    """Writing never waits for the reader."""
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


def test_lines_dropped_on_a_full_disk_are_counted_once_it_is_writable(tmp_path: Path) -> None:
    """The first line that can be written has the count."""
    full, free = os.open("/dev/full", os.O_WRONLY), os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    writer = Writer(full)
    for number in range(3):
        writer.write(f"line {number}\n")
    assert writer.flush(20)
    os.dup2(free, full)
    writer.write("back\n")
    assert writer.flush(20)

    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    assert lines == ["3 lines of the log were dropped: it could not be written", "back"]
    os.close(full)
    os.close(free)


def test_a_forked_child_can_write(pipe: tuple[int, Writer]) -> None:
    """The writer's thread stays with the parent, so the child starts its own."""
    reader, writer = pipe
    child = os.fork()
    if child == 0:
        writer.write("from the child\n")
        os._exit(0 if writer.flush(20) else 1)
    _, status = os.waitpid(child, 0)

    assert (status, os.read(reader, 100)) == (0, b"from the child\n")

"""How our programs begin and end: what signals do, what a missing package is told, which status is left behind.

if __name__ == "__main__":  # before the imports below, which take a while
    from client.runtime import program

    program.begin("python -m client.load", "benchmarks")

import …

if __name__ == "__main__":
    program.finish(main)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Final, NoReturn

from client.runtime import stderr

STOPS: Final = (signal.SIGINT, signal.SIGTERM)
FAILED, INTERRUPTED, TERMINATED, BROKEN_PIPE = 1, 128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGPIPE

_OURS: Final = {"bench", "client", "deploy", "service", "tests", "trainer"}
_terminated: list[bool] = []


def begin(name: str, extra: str = "") -> None:
    """Call it first of all: from here on SIGINT or SIGTERM ends the process at once, with a line and status 130 or 143.

    A package that is missing ends it with a line too, which names the `extra` that brings it, and status 1. Standard
    streams that are closed become /dev/null, and stderr never blocks or raises any more.
    """
    _open_standard_streams()
    stderr.install()
    sys.excepthook = partial(_explain, name, extra)
    on_signals(partial(_stop_at_once, name))


def on_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    """What SIGINT and SIGTERM do from now on."""
    for number in STOPS:
        signal.signal(number, handle)


def finish(main: Callable[[], int]) -> NoReturn:
    """Run a command's main and end the process with its status.

    Ctrl-C and SIGTERM raise KeyboardInterrupt in it: files are closed, children ended. The status is then 130 or 143. A
    reader of stdout who has left (`| head`) is nothing to talk about: 141. What cannot be written or read is one line.
    """
    stderr.install()
    # Python's own: asyncio.run cancels its task in good order where it finds it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.unraisablehook = _interrupt_again
    status: object
    try:
        status = _status_of(main)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = _interrupted()
        sys.stderr.write("\ninterrupted\n")
        leave(code)
    except BrokenPipeError:
        leave(BROKEN_PIPE)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        leave(FAILED)
    if status == INTERRUPTED:
        leave(_interrupted())
    raise SystemExit(status)


def _status_of(main: Callable[[], int]) -> object:
    try:
        return main()
    except SystemExit as ended:
        return ended.code


def _interrupted() -> int:
    """The status of a command that was interrupted; from here on a signal changes nothing but that it ends now."""
    on_signals(lambda number, _: os._exit(128 + number))
    # A reader of stdout who pauses does not hold up the end.
    last = threading.Thread(target=_flush_stdout, daemon=True)
    last.start()
    last.join(stderr.CLOSE_SECONDS)
    return TERMINATED if _terminated else INTERRUPTED


def _flush_stdout() -> None:
    with suppress(OSError):
        sys.stdout.flush()


def leave(status: int) -> NoReturn:
    """End the process now, once stderr is written; the interpreter's own end would wait for threads, or abort them."""
    if isinstance(sys.stderr, stderr.Stderr):
        sys.stderr.writer.flush()
    os._exit(status)


def _stop_at_once(name: str, number: int, _frame: FrameType | None) -> None:
    try:
        sys.stderr.write(f"{name}: stopped by {signal.Signals(number).name}\n")
    finally:
        leave(128 + number)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _terminated.append(True)
    signal.raise_signal(signal.SIGINT)


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in finalizers and callbacks of C code: a KeyboardInterrupt is sent once more."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def _explain(
    name: str, extra: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    if issubclass(kind, ImportError) and "pip install" in str(error):
        sys.stderr.write(f"error: {error}\n")
    elif issubclass(kind, ModuleNotFoundError) and missing and missing not in _OURS:
        package = f"judge-as-api[{extra}]" if extra else "judge-as-api"
        sys.stderr.write(f"{name}: {missing} is missing: pip install '{package}'\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _open_standard_streams() -> None:
    """Otherwise the next file or socket takes the number of a closed one, and gets what is written to it."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= stderr.STDERR:
        pass
    os.close(free)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process runs)

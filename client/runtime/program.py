"""How our programs start and end: signals, missing packages, exit codes.

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

# Exit codes. By the shell's convention, 128 plus a signal's number means that the signal ended the program.
OK, FAILED, USAGE = 0, 1, 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
BROKEN_PIPE: Final = 128 + 13  # SIGPIPE, which Python on Windows lacks

_OURS: Final = {"bench", "client", "deploy", "service", "tests", "trainer"}
_terminated: list[bool] = []
_called: list[str] = []


def call_as(command: str) -> None:
    """From now on this process is this command, such as `judge label`, and its messages and usages say so."""
    _called[:] = [command]


def called(name: str) -> str:
    """What the user typed: `name`, the form of `python -m`, or the command that stands for it."""
    return _called[0] if _called else name


def begin(name: str, extra: str = "") -> None:
    """Prepare the process; call it before everything else, the slow imports included.

    From here on SIGINT or SIGTERM ends the process at once, with one line and exit code 130 or 143. A missing package
    also ends it with one line, which names the `extra` to install, and exit code 1. Closed standard streams become
    /dev/null, and stderr never blocks or raises.
    """
    _open_standard_streams()
    stderr.install()
    name = called(name)
    sys.excepthook = partial(_explain, name, extra)
    on_signals(partial(_stop_at_once, name))


def on_signals(handle: Callable[[int, FrameType | None], None]) -> None:
    """Handle SIGINT and SIGTERM with this function from now on."""
    for number in STOPS:
        signal.signal(number, handle)


def finish(main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code.

    Ctrl-C and SIGTERM raise KeyboardInterrupt in `main`, so that files are closed and child processes ended; the exit
    code is then 130 or 143. A reader of stdout who has left (`| head`) ends it silently with 141; any other OSError
    becomes one line and 1.
    """
    stderr.install()
    # Python's own handler: asyncio.run recognises it, and then cancels its task instead of raising anywhere.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.unraisablehook = _interrupt_again
    code: object
    try:
        code = _exit_code_of(main)
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
    if code == INTERRUPTED:
        leave(_interrupted())
    raise SystemExit(code)


def _exit_code_of(main: Callable[[], int]) -> object:
    try:
        return main()
    except SystemExit as ended:
        return ended.code


def _interrupted() -> int:
    """The exit code of an interrupted program. From here on another signal ends the process immediately."""
    on_signals(lambda number, _: os._exit(128 + number))
    # In a thread, with a limit: a reader of stdout who pauses must not hold up the end.
    flushing = threading.Thread(target=_flush_stdout, daemon=True)
    flushing.start()
    flushing.join(stderr.CLOSE_SECONDS)
    return TERMINATED if _terminated else INTERRUPTED


def _flush_stdout() -> None:
    with suppress(OSError):
        sys.stdout.flush()


def leave(code: int) -> NoReturn:
    """Flush stderr and end the process now; the interpreter's own shutdown would wait for threads, or abort them."""
    if isinstance(sys.stderr, stderr.Stderr):
        sys.stderr.writer.flush()
    os._exit(code)


def _stop_at_once(name: str, number: int, _frame: FrameType | None) -> None:
    try:
        sys.stderr.write(f"{name}: stopped by {signal.Signals(number).name}\n")
    finally:
        leave(128 + number)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    _terminated.append(True)
    signal.raise_signal(signal.SIGINT)


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Send SIGINT again: Python drops a KeyboardInterrupt that is raised in a finalizer or a C library's callback."""
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
        from client.runtime.extras import install_command  # here, because signals are handled only after the imports

        sys.stderr.write(f"{name}: {missing} is missing: {install_command(extra)}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _open_standard_streams() -> None:
    """Otherwise the next file or socket would get a closed stream's number, and whatever is written to that stream."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= stderr.STDERR:
        pass
    os.close(free)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process runs)

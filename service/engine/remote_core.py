"""What the worker asks of an engine whose model runs in other processes: whether they live, and to honour deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class EngineLostError(RuntimeError):
    """The processes that run the model are gone. No item is at fault, and every later call will fail as well.

    The worker ends without answering its jobs, so that another worker takes them.
    """


@runtime_checkable
class RemoteCore(Protocol):
    """Implemented by such an engine in addition to Engine."""

    def check(self) -> None:
        """Raise EngineLostError if the processes are gone. Cheap enough to call while idle."""

    def set_deadlines(self, deadlines: Sequence[float]) -> None:
        """When to give up each item of the next `run`, in its order, in seconds of `time.monotonic()`.

        An item that is unanswered by then is aborted, and its answer is an ItemFailure.
        """

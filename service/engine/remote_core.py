"""What an engine offers besides its answers when the model runs in processes of its own: news of their death, and an
end for what nobody waits for any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class EngineLostError(RuntimeError):
    """The processes that run the model are gone. No item is at fault, and no other call will succeed.

    The worker must not answer its jobs then but end, so that they go to another one.
    """


@runtime_checkable
class RemoteCore(Protocol):
    """An engine of which the worker asks this too."""

    def check(self) -> None:
        """Return if the processes live; raises EngineLostError. Costs next to nothing."""

    def set_deadlines(self, deadlines: Sequence[float]) -> None:
        """When the items of the next call are given up, in order, in seconds of `time.monotonic()`.

        An item that is not answered by then is stopped, and its answer is an ItemFailure.
        """

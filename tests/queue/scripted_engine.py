"""An engine whose answers a test makes up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.engine.contract import EngineInfo, Executor, LabelLogprobs, ScoreItem


class ScriptedEngine:
    """An engine that answers with what a function makes of the items."""

    info = EngineInfo("scripted", "labels", "float64", 1000, 1000, Executor("by hand", "0", stable=True))

    def __init__(self, answer: Callable[[Sequence[ScoreItem]], list[LabelLogprobs]]) -> None:
        self.run = answer

    def close(self) -> None:
        """Nothing to free."""

"""The torch engine of another checkout of this repository, in a process of its own: before and after in one run.

The process runs this file with the other checkout first on the path. It answers each line of JSON with one line, and
knows the engine by its present name and by that of earlier releases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Checkout:
    """The engine of the checkout in `folder`, loaded for labels or to generate text."""

    def __init__(self, folder: Path, model: Path, task: str = "labels", **options: object) -> None:
        """`options` are those of `TorchEngine.load`. Raises RuntimeError if the engine does not load."""
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder, bufsize=1
        )
        self._ask([str(model), task, options])

    def run(self, items: Sequence[Any]) -> None:
        """Compute these ScoreItems or GenerateItems, in calls of about `batch_tokens`."""
        self._ask([_fields(item) for item in items])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError("the engine of the other checkout ended; its messages are above")


def _fields(item: Any) -> list[Any]:
    if hasattr(item, "label_ids"):
        return [list(item.token_ids), item.label_ids, item.boundaries]
    return [list(item.token_ids), item.max_new_tokens, item.stop_ids]


def _engine(folder: str, task: str, options: dict[str, Any]) -> tuple[Callable[..., object], int, Callable[..., Any]]:
    """The function that runs a call, how many tokens fill a call, and the class of an item."""
    from service.engine import contract

    generates = task == "generate"
    if not hasattr(contract, "ScoreItem"):
        from service.engine.torch_engine import TorchEngine as Former

        engine = Former.load(Path(folder), **options)
        run = engine.generate if generates else engine.label_logprobs
        return run, engine.batch_tokens, contract.GenerateItem if generates else contract.EngineItem
    from service.engine.torch.engine import TorchEngine
    from service.engine.torch.generate import TorchGenerator

    engine = (TorchGenerator if generates else TorchEngine).load(Path(folder), **options)
    return engine.run, engine.info.batch_tokens, contract.GenerateItem if generates else contract.ScoreItem


def _frozen(field: object) -> object:
    return tuple(field) if isinstance(field, list) else field


def main() -> int:
    """Load what the first line says, then compute the items of each further line."""
    run, batch_tokens, item = _engine(*json.loads(sys.stdin.readline()))
    from calls import in_calls  # this folder's: another checkout may keep it elsewhere

    sys.stdout.write("done\n")
    sys.stdout.flush()
    for line in sys.stdin:
        items = [item(*map(_frozen, fields)) for fields in json.loads(line)]
        for call in in_calls(items, batch_tokens):
            run(call)
        sys.stdout.write("done\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.path = [os.environ["PYTHONPATH"], *sys.path[1:], sys.path[0]]  # the other checkout before this file's folder
    raise SystemExit(main())

"""How fast the stages of a run were here: what another run's estimate can be made from. Never decides anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

from client.benchmarks.run import Progress
from trainer.run.files import write_json

RATES_FILE: Final = "rates.json"


class Meter:
    """Passes progress on, and counts what was done in this process."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        if not any(progress is one for one in self._seen):
            self._seen.append(progress)
        self._tell(progress)

    @property
    def fresh(self) -> int:
        """How much was done, less what was known before."""
        return sum(progress.done - progress.known for progress in self._seen)


def keep_rate(folder: Path, what: str, amount: float, seconds: float) -> None:
    """Note that so much took so long, in `folder`/rates.json; nothing where nothing was done."""
    if amount > 0 and seconds > 0 and math.isfinite(amount / seconds):
        known = read_rates(folder)
        known[what] = amount / seconds
        write_json(folder / RATES_FILE, dict(sorted(known.items())))


def read_rates(folder: Path) -> dict[str, float]:
    """What `keep_rate` noted, by name: sampled tokens, judgements, DPO steps, each a second; {} where there is none."""
    try:
        known = json.loads((folder / RATES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): float(value) for key, value in known.items()} if isinstance(known, dict) else {}


def rates_of_run(folder: Path) -> dict[str, float]:
    """The rates of a whole run: those of its first rounds give way to those of later ones."""
    found = read_rates(folder)
    for part in sorted(folder.glob("round-*")):
        found.update(read_rates(part))
    return found

"""How fast a run's stages were on this machine, for the estimates of `--dry-run`. Decides nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

from client.runs.progress import Progress
from trainer.run.files import write_json

RATES_FILE: Final = "rates.json"


class ProgressMeter:
    """Passes progress on, and counts what was done in this process."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        # A labelling reports one object that it updates; an evaluation has several labellings.
        self._seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        if not any(progress is one for one in self._seen):
            self._seen.append(progress)
        self._report(progress)

    @property
    def new_items(self) -> int:
        """The items done here, without those already known from an earlier process."""
        return sum(progress.done - progress.known for progress in self._seen)


def save_rate(folder: Path, name: str, amount: float, seconds: float) -> None:
    """Record `amount` per second under `name` in `folder`/rates.json; a stage that did nothing records nothing."""
    if amount > 0 and seconds > 0 and math.isfinite(amount / seconds):
        rates = read_rates(folder)
        rates[name] = amount / seconds
        write_json(folder / RATES_FILE, dict(sorted(rates.items())))


def read_rates(folder: Path) -> dict[str, float]:
    """What `save_rate` recorded, per second and by name: sampled tokens, judgements, DPO pairs; {} without a file."""
    try:
        rates = json.loads((folder / RATES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(key): float(value) for key, value in rates.items()} if isinstance(rates, dict) else {}


def rates_of_run(folder: Path) -> dict[str, float]:
    """The rates of a whole run; later rounds override earlier ones."""
    rates = read_rates(folder)
    for round_folder in sorted(folder.glob("round-*")):
        rates.update(read_rates(round_folder))
    return rates

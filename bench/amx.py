"""The compiled prefill against what the tile units can do, in one interleaved run (CPUs with AMX).

    python -m bench.amx [any flags of bench.engine]

Work is useful work, as bench.engine counts it. The tile units are measured with products from registers, and with all
tiles loaded from the L1 cache. Shares are medians over rounds, by wall time and, as other programs may use the machine,
by CPU time.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from bench.engine import parse
from bench.support.ways import by_engine
from bench.support.workload import Measurement, useful_flop
from service.engine.torch.cpu import build
from service.engine.torch.engine import TorchEngine

STEPS = 1_000_000
FLOP_OF_STEP = 4 * 2 * 16 * 16 * 32


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parse(argv)
    folder, items, settings = options.folder, options.items, options.settings
    flop = useful_flop(AutoModelForCausalLM.from_pretrained(folder), items)
    tile_peak = load_tile_peak()
    with (
        ThreadPoolExecutor(options.threads) as pool,
        closing(TorchEngine.load(folder, dtype=settings.dtype, device="cpu", threads=options.threads)) as engine,
    ):

        def peak(loads: int) -> None:
            list(pool.map(tile_peak, [STEPS] * options.threads, [loads] * options.threads))

        peak_flop = float(options.threads * STEPS * FLOP_OF_STEP)
        turns: list[tuple[Measurement, Callable[[], object]]] = [
            (Measurement("tile units, from registers", peak_flop), partial(peak, 0)),
            (Measurement("tile units, from L1", peak_flop), partial(peak, 1)),
            (Measurement(engine.info.executor.rung, flop), partial(by_engine, engine, items)),
        ]
        for _, turn in turns:
            turn()
        for _ in range(options.rounds):
            for measurement, turn in turns:
                measurement.run(turn)
    tokens = sum(len(item.token_ids) for item in items)
    print(f"{options.model}, {len(items)} texts of {tokens / len(items):.0f} tokens, {options.compare} to a prompt")
    for measurement, _ in turns:
        print(line(measurement, turns[0][0]))
    return 0


def load_tile_peak() -> Any:
    """The function of tile_peak.cpp: steps, loads or not."""
    source = Path(__file__).with_name("tile_peak.cpp")
    library = ctypes.CDLL(str(build.shared_library(source, ("-mavx512f", "-mamx-tile", "-mamx-bf16"))))
    library.tile_peak.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.tile_peak.restype = None
    return library.tile_peak


def line(measurement: Measurement, peak: Measurement) -> str:
    """Speeds, and shares of the peak in the same round."""
    speeds, shares = [], []
    for own, other in ((measurement.seconds, peak.seconds), (measurement.cpu_seconds, peak.cpu_seconds)):
        speeds.append(measurement.flop / statistics.median(own) / 1e12)
        ratios = [measurement.flop / mine / (peak.flop / theirs) for mine, theirs in zip(own, other, strict=True)]
        shares.append(statistics.median(ratios))
    return (
        f"{measurement.name:28} {speeds[0]:6.2f} TFLOP/s {shares[0]:5.0%}; "
        f"by CPU time {speeds[1]:5.2f} a core {shares[1]:5.0%}"
    )


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)

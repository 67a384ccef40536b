"""The compiled prefill against what the tile units reach, in one interleaved run (CPUs with AMX).

    python -m bench.amx [any flags of bench.engine]

Work is useful work, as bench.engine counts it. Shares are medians over rounds, by CPU time too, as other programs may
use the machine: of the tile units' products from registers, and with all tiles loaded from the L1 cache.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM

from bench.engine import Way, parse, settings_of, texts, useful_flop
from bench.support.ways import by_engine
from service.engine.torch.cpu import build
from service.engine.torch.engine import TorchEngine
from service.models import resolve as models

STEPS = 1_000_000
FLOP_OF_STEP = 4 * 2 * 16 * 16 * 32


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    folder = models.resolve(args.model).path
    items, settings = texts(folder, args), settings_of(folder, args)
    flop = useful_flop(AutoModelForCausalLM.from_pretrained(folder), [len(item.token_ids) for item in items])
    library = ctypes.CDLL(
        str(build.library(Path(__file__).with_name("tile_peak.cpp"), ("-mavx512f", "-mamx-tile", "-mamx-bf16")))
    )
    library.tile_peak.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.tile_peak.restype = None
    peak_flop = float(args.threads * STEPS * FLOP_OF_STEP)
    with (
        ThreadPoolExecutor(args.threads) as pool,
        closing(TorchEngine.load(folder, dtype=settings.dtype, device="cpu", threads=args.threads)) as engine,
    ):

        def peak(loads: int) -> None:
            list(pool.map(library.tile_peak, [STEPS] * args.threads, [loads] * args.threads))

        turns: list[tuple[Way, Callable[[], object]]] = [
            (Way("tile units, from registers", peak_flop), partial(peak, 0)),
            (Way("tile units, from L1", peak_flop), partial(peak, 1)),
            (Way(engine.info.executor.rung, flop), partial(by_engine, engine, items)),
        ]
        for _, turn in turns:
            turn()
        for _ in range(args.rounds):
            for way, turn in turns:
                way.run(turn)
    tokens = sum(len(item.token_ids) for item in items)
    print(f"{args.model}, {len(items)} texts of {tokens / len(items):.0f} tokens, {args.compare} to a prompt")
    first = turns[0][0]
    for way, _ in turns:
        speeds = [way.flop / statistics.median(way.seconds), way.flop / statistics.median(way.cpu_seconds)]
        shares = [
            statistics.median(way.flop / mine / (first.flop / theirs) for mine, theirs in zip(ours, tile, strict=True))
            for ours, tile in ((way.seconds, first.seconds), (way.cpu_seconds, first.cpu_seconds))
        ]
        print(
            f"{way.name:28} {speeds[0] / 1e12:6.2f} TFLOP/s {shares[0]:5.0%}; "
            f"by CPU time {speeds[1] / 1e12:5.2f} a core {shares[1]:5.0%}"
        )
    return 0


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)

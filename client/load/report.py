"""The numbers of a load: latencies of successes, counts of everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from client.load.traffic import RequestOutcome, percentile

# If requests left later than this, the report warns that the generator itself was the bottleneck.
LAG_MS: Final = 50.0


def outcome_name(outcome: RequestOutcome) -> str:
    """The HTTP status, "timeout" or "connection"."""
    return outcome.failure or str(outcome.status)


def summarise_load(outcomes: Sequence[RequestOutcome], elapsed: float) -> dict[str, Any]:
    """The report's numbers for a run of `elapsed` seconds; latencies are of successes alone, in milliseconds."""
    counts = Counter(map(outcome_name, outcomes))
    succeeded = [outcome.seconds * 1e3 for outcome in outcomes if outcome.status == 200]
    known = {
        "succeeded": counts["200"],
        "refused_503": counts["503"],
        "rate_limited_429": counts["429"],
        "timeouts": counts["504"] + counts["timeout"],
    }
    return {
        "sent": len(outcomes),
        **known,
        "other_errors": len(outcomes) - sum(known.values()),
        "by_outcome": dict(sorted(counts.items())),
        "elapsed_s": round(elapsed, 3),
        "throughput_per_s": round(len(succeeded) / elapsed, 2),
        "latency_ms": _percentiles(succeeded),
        "lag_ms": _percentiles([outcome.late * 1e3 for outcome in outcomes]),
    }


def load_table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    names = ("sent", "succeeded", "refused_503", "rate_limited_429", "timeouts", "other_errors", "throughput_per_s")
    lines = [f"{name.replace('_', ' '):<20}{report[name]:>12}" for name in names]
    for name, label in (("latency_ms", "latency ms"), ("lag_ms", "generator lag ms")):
        points = report[name] or {}
        lines.append(f"{label:<20}" + "  ".join(f"{key} {value:.1f}" for key, value in points.items()))
    if report["loop"] == "open" and (report["lag_ms"] or {}).get("p99", 0.0) > LAG_MS:
        lines.append("The generator fell behind (see its lag), so part of these latencies is its own.")
    return "\n".join([*lines, ""])


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    points = {f"p{percent}": round(percentile(values, percent), 3) for percent in (50, 95, 99)}
    return {**points, "max": round(max(values), 3)}

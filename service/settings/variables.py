"""The JUDGE_… variables: which there are, and which are set by mistake."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from client.runtime.parser import did_you_mean
from service.settings import Settings, UpstreamKey, WorkerSettings

PREFIX: Final = "JUDGE_"
# Read by other parts of the package: the client and the trainer, the models' cache, the compiled kernels, this process'
# children.
_ELSEWHERE: Final = ("URL", "CACHE_DIR", "KNOWN_MODELS", "NATIVE_DIR", "ORPHANS_OF")
# Those of docker-compose.yml and .env.example, which may be exported where a service runs too.
COMPOSE: Final = (
    "BENCH_DATA",
    "BIND",
    "CLIENT_API_KEY",
    "DATA",
    "FILES",
    "GRAFANA_IMAGE",
    "INSTRUCTIONS",
    "POLICY",
    "PROMETHEUS_IMAGE",
    "REDIS_IMAGE",
    "RUN",
    "TAG",
    "WORKER_MEMORY",
)
_TESTS: Final = f"{PREFIX}TEST_"


def known_variables() -> list[str]:
    """Every variable of the service, the worker, and what is deployed beside them."""
    fields = [name.upper() for cls in (Settings, WorkerSettings, UpstreamKey) for name in cls.model_fields]
    return [f"{PREFIX}{name}" for name in dict.fromkeys((*fields, *_ELSEWHERE, *COMPOSE))]


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """A sentence for each JUDGE_… variable that nothing reads, with the one that was probably meant."""
    known = known_variables()
    names = sorted(name for name in environment if name.startswith(PREFIX) and not name.startswith(_TESTS))
    return [
        f"{name} is not a setting and does nothing{did_you_mean(name, known)}" for name in names if name not in known
    ]

"""The service that other projects' clients talk to: a process of its own, over a real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from bench.support.process import running_service

MODEL = os.environ.get("JUDGE_TEST_MODEL", "smollm2-135m-instruct")


@dataclass(frozen=True)
class Served:
    """A running service over MODEL: its address and key, which is empty if it wants none."""

    url: str
    key: str

    def post(self, path: str, body: object) -> Any:
        """What the service answers without any client library; raises httpx.HTTPStatusError."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        answer = httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=300)
        return answer.raise_for_status().json()


@contextmanager
def served(*flags: str, key: str = "") -> Iterator[Served]:
    """Run a service over MODEL with these flags; it wants `key`, if there is one."""
    all_flags = ["--model", MODEL, *(["--api-key", key] if key else []), *flags]
    # Tests' own models are tiny and run on one thread each (tests/conftest.py); this one is not.
    with running_service(*all_flags, env={"OMP_NUM_THREADS": str(os.cpu_count())}) as running:
        yield Served(running.url, key)

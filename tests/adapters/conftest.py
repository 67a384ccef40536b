"""Fixtures of the adapters' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from client import Judge
from tests.support.live import Live, live_service


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key, the address and the proxy of whoever runs the tests play no part in them."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.delenv("JUDGE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A real service with the fake engine."""
    with live_service() as service:
        yield service


@pytest.fixture(scope="module")
def judge(live: Live) -> Iterator[Judge]:
    """A client of it."""
    with Judge(live.url) as client:
        yield client

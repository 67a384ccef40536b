"""Fixtures of the client's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key and the proxy of whoever runs the tests play no part in them."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")

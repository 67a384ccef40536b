"""OpenAI's own libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.served import MODEL, Served


@pytest.mark.integrations("openai")
def test_openais_library_lists_the_model(run: Callable[..., Any], service: Served) -> None:
    """It finds the judge by the name that it was started with."""
    assert run("openai_models.py", service.url, service.key) == [MODEL]

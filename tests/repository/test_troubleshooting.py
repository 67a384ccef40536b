"""docs/troubleshooting.md knows every error."""

from __future__ import annotations

import re

from client.errors import ErrorCode
from tests.repository.documents import ROOT


def test_every_error_code_is_explained() -> None:
    """In the table's first column, and no code that there is not."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    table = text.partition("## Errors, by code")[2].partition("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]

    assert set(re.findall(r"`(\w+)`", " ".join(first))) == {str(code) for code in ErrorCode}

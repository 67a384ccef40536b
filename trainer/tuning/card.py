"""The model card (README.md) of a trained model: what it was made from, how, and the run's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

CARD_FILE: Final = "README.md"

_USE: Final = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

`vllm serve FOLDER` and `python -m service --model FOLDER` load it as well.
"""


def model_card(
    name: str, base: str, numbers: Mapping[str, Any], *, adapter: bool = False, tags: Sequence[str] = ("dpo", "trl")
) -> str:
    """The card's text. `numbers` are JSON objects by title (training, pairs, evaluation); each becomes a table.

    The front matter names the base only if it is a hub id: the hub accepts nothing else there.
    """
    front = ["---", "library_name: peft" if adapter else "library_name: transformers", "pipeline_tag: text-generation"]
    if not Path(base).exists() and "/" in base:
        front.append(f"base_model: {base.partition('@')[0]}")
    front += ["tags:", *(f"- {tag}" for tag in (*tags, "judge-as-api")), "---"]
    kind = "A LoRA adapter for" if adapter else "A fine-tuned version of"
    parts = [
        "\n".join(front),
        f"# {name}",
        f"{kind} `{Path(base).name if Path(base).exists() else base}`, by judge-as-api.",
    ]
    if not adapter:
        parts.append(_USE.replace("FOLDER", name).rstrip())
    parts += [f"## {title}\n\n{_table(values)}" for title, values in numbers.items()]
    return "\n\n".join(parts) + "\n"


def _table(values: Any) -> str:
    rows = _flat("", values)
    return "\n".join(["| what | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows)])


def _flat(prefix: str, values: Any) -> list[tuple[str, str]]:
    """The leaves by dotted name. Lists are shown as JSON, long ones not at all."""
    if isinstance(values, Mapping):
        items = ((f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items())
        return [leaf for key, value in items for leaf in _flat(key, value)]
    if isinstance(values, list):
        text = json.dumps(values)
        return [(prefix, _cell(text))] if len(text) <= 100 else []
    return [(prefix, _cell(f"{values:.6g}" if isinstance(values, float) else str(values)))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

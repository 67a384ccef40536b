"""How a model's chat template ends an answer; the service's judges and the trainer's policy share it.

Tokenizers are transformers', which is not imported here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

NO_THINKING: Final[Mapping[str, Any]] = {"enable_thinking": False}
"""Options for rendering templates. Qwen3 and similar models think first unless told not to; others ignore it."""

_ANSWER, _NEXT = "answer7391", "question7392"


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a template ends the assistant's turn: with one of the tokens `ids`, or, if there are none, of the `texts`.

    `closes` says that a token also follows the last answer of a conversation, where training can learn it.
    """

    ids: frozenset[int]
    texts: tuple[str, ...]
    closes: bool


def turn_end(tokenizer: Any) -> TurnEnd:
    """Find the end of a turn by rendering a conversation; empty if there is no template or it fails.

    The token after the last answer counts, e.g. `<|im_end|>`. A template without one there has it before the user's
    next turn, or has text in its place: `</s>` in letters, or "\\nUser:".
    """
    last, followed = _after_answer(tokenizer, []), _after_answer(tokenizer, [{"role": "user", "content": _NEXT}])
    tokens = [_token_at(tokenizer, text) for text in (last, followed)]
    ids = frozenset([token for token in tokens if token is not None][:1])
    texts = [] if ids else [line for text in (last, followed) if (line := _first_visible_line(text))]
    return TurnEnd(ids, tuple(dict.fromkeys(texts)), tokens[0] is not None)


def stop_ids(tokenizer: Any, folder: Path | None = None) -> tuple[int, ...]:
    """The tokens that end a generated text, in ascending order: the tokenizer's end of sequence, the chat template's
    end of turn, and those of generation_config.json in the model's `folder`, or else of its config.json.
    """
    ids = {*turn_end(tokenizer).ids}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    files = [folder / name for name in ("generation_config.json", "config.json")] if folder else []
    for file in filter(Path.is_file, files):
        eos = json.loads(file.read_text("utf-8")).get("eos_token_id")
        if eos is not None:
            ids.update(eos if isinstance(eos, list) else [eos])
            break
    return tuple(sorted(ids))


def own_turn(text: str, ended: bool, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop, and whether it has ended: at a stop, or because `ended` says so."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return (text[: min(places)], True) if places else (text, ended)


def _after_answer(tokenizer: Any, more: list[dict[str, str]]) -> str:
    """What the template writes after an answer, up to the next message or the end."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}, *more]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, **NO_THINKING))
    except Exception:  # no template, or one that raises anything at all, through jinja2
        return ""
    return rendered.rpartition(_ANSWER)[2].partition(_NEXT)[0]


def _token_at(tokenizer: Any, text: str) -> int | None:
    """The id of the added token that the text starts with, ignoring white space."""
    ids = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    candidates = [token for token in ids if token.strip() and text.lstrip().startswith(token.strip())]
    return ids[max(candidates, key=len)] if candidates else None


def _first_visible_line(text: str) -> str:
    """The first line that is not blank, after a line break if the text starts with one; "" if all are blank."""
    lines = text.strip().splitlines()
    if not lines:
        return ""
    broken = "\n" in text[: len(text) - len(text.lstrip())]
    return ("\n" if broken else "") + lines[0].rstrip()

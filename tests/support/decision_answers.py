"""What servers answer to a choice: OpenAI's `/v1/decisions`, and `/v1/systemone` as TypeSafe, vLLM and SGLang do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Body = Mapping[str, Any]


def options_of(body: Body) -> list[str]:
    """The options of a request's only question, in either protocol."""
    if isinstance(body["questions"], list):
        (question,) = body["questions"]
        return [choice["value"] for choice in question["choices"]]
    (question,) = body["questions"].values()
    return list(question["criteria"])


def decisions_answer(body: Body, shares: Sequence[float], mass: float | None = None) -> dict[str, Any]:
    """OpenAI's answer; with `mass` as this service sends it."""
    (question,) = body["questions"]
    listed = [{"value": v, "probability": p} for v, p in zip(options_of(body), shares, strict=True)]
    return {
        "model": body["model"],
        "answers": [
            {
                "type": "choice",
                "name": question["name"],
                "choice": max(listed, key=lambda entry: entry["probability"])["value"],
                "confidence": max(shares),
                "probabilities": listed,
                **({} if mass is None else {"x_label_mass": mass}),
            }
        ],
        "usage": {
            "input_tokens": 30,
            "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 30,
        },
    }


def systemone_answer(body: Body, shares: Sequence[float], mass: float | None = None) -> dict[str, Any]:
    """TypeSafe's answer; with `mass` as SGLang sends it."""
    (name,) = body["questions"]
    by_option = dict(zip(options_of(body), shares, strict=True))
    choice = {
        "type": "choice",
        "choice": max(by_option, key=lambda option: by_option[option]),
        "confidence": max(shares),
        "probabilities": by_option,
        **({} if mass is None else {"x_label_mass": mass}),
    }
    return {"model": body["model"], "answers": {name: choice}, "usage": {"input_tokens": 30, "output_tokens": 0}}


def diagnosed(answer: Mapping[str, Any], mass: float, *, argmax_is_label: bool) -> dict[str, Any]:
    """A System One answer with what vLLM says of the label mass."""
    said = {"label_mass": mass, "argmax_is_label": argmax_is_label}
    return {**answer, "diagnostics": dict.fromkeys(answer["answers"], said)}

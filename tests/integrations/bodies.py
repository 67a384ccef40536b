"""The same three questions in the bodies of both protocols of typed decisions, and their answers in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TICKET = "I was charged twice for my subscription, and nobody has answered my three e-mails."
TEAMS = {"billing": "Payments and subscriptions.", "technical": "Bugs and outages.", "other": None}
LEVELS = ["Calm", "Concerned", "Angry"]

DECISION = {
    "model": "judge",
    "input": TICKET,
    "questions": [
        {"type": "predicate", "name": "urgent", "instructions": "Is this request urgent?"},
        {
            "type": "choice",
            "name": "team",
            "instructions": "Which team should handle this request?",
            "choices": [
                {"value": team, "description": about} if about else {"value": team} for team, about in TEAMS.items()
            ],
        },
        {
            "type": "score",
            "name": "mood",
            "instructions": "How frustrated is the customer?",
            "levels": [{"label": level} for level in LEVELS],
        },
    ],
}

SYSTEM_ONE = {
    "model": "judge",
    "state": {"ticket": TICKET},
    "questions": {
        "urgent": {"type": "noul", "instructions": "Is this request urgent?"},
        "team": {"type": "choice", "instructions": "Which team should handle this request?", "criteria": TEAMS},
        "mood": {"type": "score", "instructions": "How frustrated is the customer?", "criteria": LEVELS},
    },
}


def listed(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """OpenAI's answers, by the questions' names: a probability, or what was chosen with all probabilities."""
    return {
        answer["name"]: _plain(answer, [p["probability"] for p in answer.get("probabilities", [])])
        for answer in answers
    }


def named(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same of TypeSafe's answers, and of the libraries that have a mapping of names to answers."""
    return {name: _plain(answer, list(answer.get("probabilities", {}).values())) for name, answer in answers.items()}


def _plain(answer: Mapping[str, Any], probabilities: list[float]) -> Any:
    value = next(answer[key] for key in ("probability", "noul", "choice", "score") if key in answer)
    return [value, probabilities] if probabilities else value

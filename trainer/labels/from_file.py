"""Labels from a file: what a program, a person or another judge said of the responses (--labels-from).

    {"prompt": "…", "responses": ["…", "…"], "scores": [1, 0]}

A higher score is better. Scores take the place of log-odds, so a minimum margin is in their unit. A response without
a score in the file is a counted failure, never a guess.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from client.labels.labelling import Label, Text
from client.labels.records import ScoreError
from client.stats import sigmoid
from trainer.errors import InputError, RecordError
from trainer.run.files import read_records
from trainer.run.stages import content_digest

LABELER: Final = "file"
NO_LABEL: Final = "no_label"


class LabelledResponses(BaseModel):
    """A line of the file. A response that nobody could judge has null for a score."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str
    responses: list[str]
    scores: list[FiniteFloat | None]

    @model_validator(mode="after")
    def _one_score_each(self) -> LabelledResponses:
        if len(self.responses) != len(self.scores):
            raise ValueError(f"{len(self.responses)} responses with {len(self.scores)} scores")
        return self


class FileLabeler:
    """The scores of a file, by prompt and response. Raises InputError for a file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.model = LABELER
        self.fingerprint: str | None = None
        self._digest = content_digest(path) if path.is_file() else ""
        self._scores = read_labels(path)

    def described(self) -> dict[str, object]:
        """See Labeler."""
        return {"labeler": LABELER, "labels": self._digest}

    async def labels(self, texts: Sequence[Text]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
        """See Labeler."""
        for index, text in enumerate(texts):
            score = self._scores.get((text.prompt, text.response)) if isinstance(text.prompt, str) else None
            if score is None:
                message = "the file of labels has no score for this response: see samples.jsonl for its text"
                yield index, ScoreError(code=NO_LABEL, message=message)
            else:
                yield index, Label(score, sigmoid(score), None, f"{LABELER}@{self._digest[:12]}", LABELER, None)


def read_labels(path: Path) -> dict[tuple[str, str], float | None]:
    """The score of each prompt and response. Raises InputError for broken lines and for scores that contradict."""
    try:
        lines = read_records(path, LabelledResponses)
    except RecordError as error:
        raise InputError(f"--labels-from: {error}") from error
    scores: dict[tuple[str, str], float | None] = {}
    for line in lines:
        for response, score in zip(line.responses, line.scores, strict=True):
            if scores.setdefault((line.prompt, response), score) != score:
                raise InputError(f"--labels-from: {path}: one response has two scores, {response[:80]!r}")
    if not scores:
        raise InputError(f"--labels-from: {path} holds no labels")
    return scores

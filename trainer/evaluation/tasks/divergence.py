"""How far a model is from its base: KL(model ‖ base) per token, on answers of either.

At each position of an answer, the two models' distributions over the whole vocabulary are compared given the same
tokens before it. On the model's own answers the mean estimates the divergence that RLHF and DPO penalise; on the base's
it says how the model now reads what the base writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from client.runs.progress import OnProgress, Progress
from trainer.errors import StageError
from trainer.evaluation.tasks.forward import Reading, next_logits
from trainer.policy.models import release_memory, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.files import appending, read_records
from trainer.run.records import Record

Side: TypeAlias = Literal["base", "own"]
SIDES: Final[tuple[Side, ...]] = ("base", "own")


class AnswerDivergence(Record):
    """One answer: the sum of KL over its positions, in nats, and how many positions there are."""

    side: Side
    id: str
    divergence: float
    tokens: int


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """An answer to a prompt, by one of the two models; `ended` if it was not cut off."""

    side: Side
    id: str
    prompt: str
    response: str
    ended: bool


def same_vocabulary(base: str, other: str) -> bool:
    """Whether two models have the same tokens and the same chat template, without which they cannot be compared."""
    one, two = (load_tokenizer(resolve_model(name)) for name in (base, other))
    vocabularies: Sequence[Mapping[str, int]] = (one.get_vocab(), two.get_vocab())
    return vocabularies[0] == vocabularies[1] and one.chat_template == two.chat_template


def measure_divergence(
    model: str,
    base: str,
    answers: Sequence[GivenAnswer],
    output: Path,
    reading: Reading,
    on_progress: OnProgress,
) -> None:
    """Complete `output` with a line for each answer. Both models are in memory. Raises ModelError, StageError."""
    done = {(line.side, line.id) for line in read_records(output, AnswerDivergence)} if output.exists() else set()
    progress, tokens = Progress(len(answers), len(done), len(done)), 0
    on_progress(progress)
    with appending(output) as append:
        if progress.done == progress.total:
            return
        tokenizer = load_tokenizer(resolve_model(base))
        models = [reading.load(resolve_model(name)) for name in (model, base)]
        for answer in answers:
            if (answer.side, answer.id) in done:
                continue
            prompt = reading.prompt_ids(tokenizer, answer.prompt)
            line = answer_divergence(models[0], models[1], tokenizer, prompt, answer)
            append(line)
            progress.done, tokens = progress.done + 1, tokens + line.tokens
            progress.note = f"{tokens} tokens"
            on_progress(progress)
    del models
    release_memory()


def answer_divergence(
    model: Any, base: Any, tokenizer: Any, prompt: Sequence[int], answer: GivenAnswer
) -> AnswerDivergence:
    """KL over the answer's positions; of one that ended, the decision to end included. Raises StageError."""
    ids = tokenizer(answer.response, add_special_tokens=False)["input_ids"]
    read = ids if answer.ended else ids[:-1]
    total = 0.0
    for ours, theirs in zip(next_logits(model, prompt, read), next_logits(base, prompt, read), strict=True):
        # Checkpoints pad their vocabularies to different sizes.
        width = min(ours.shape[1], theirs.shape[1])
        log_p, log_q = ours[:, :width].log_softmax(dim=1), theirs[:, :width].log_softmax(dim=1)
        # A token that both exclude is -inf minus -inf.
        terms = (log_p.exp() * (log_p - log_q)).nan_to_num(nan=0.0, posinf=math.inf)
        total += float(terms.sum(dim=1).double().sum())
    if not math.isfinite(total):
        raise StageError(f"on {answer.id} the model expects tokens that its base excludes: the distance is infinite")
    return AnswerDivergence(side=answer.side, id=answer.id, divergence=total, tokens=len(read) + 1)

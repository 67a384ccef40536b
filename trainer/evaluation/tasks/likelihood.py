"""Which of an item's options a model finds likeliest as the answer. Needs no generation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.runs.progress import OnProgress, Progress
from trainer.evaluation.tasks.forward import Reading, extend, prefill
from trainer.evaluation.tasks.items import TaskItem
from trainer.policy.models import context_length, release_memory, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.files import appending, read_records
from trainer.run.records import Record


class OptionLikelihoods(Record):
    """The log-likelihood of each option, in nats; empty if the item does not fit into the model's context."""

    id: str
    log_likelihoods: tuple[float, ...]

    @property
    def choice(self) -> int | None:
        """The index of the likeliest option; the first of several that are equal."""
        values = self.log_likelihoods
        return values.index(max(values)) if values else None


def score_options(
    model: str, items: Sequence[TaskItem], output: Path, reading: Reading, on_progress: OnProgress
) -> None:
    """Complete `output` with a line for each item that has options. Raises ModelError, StageError."""
    items = [item for item in items if item.options]
    done = {line.id for line in read_records(output, OptionLikelihoods)} if output.exists() else set()
    progress = Progress(len(items), len(done), len(done))
    on_progress(progress)
    with appending(output) as append:
        if progress.done == progress.total:
            return
        folder = resolve_model(model)
        tokenizer, loaded, room = load_tokenizer(folder), reading.load(folder), context_length(folder)
        for item in items:
            if item.id in done:
                continue
            prompt = reading.prompt_ids(tokenizer, item.question or item.prompt)
            options = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in item.options]
            fits = room is None or len(prompt) + max(map(len, options)) <= room
            values = option_log_likelihoods(loaded, prompt, options) if fits else ()
            append(OptionLikelihoods(id=item.id, log_likelihoods=values))
            progress.done += 1
            on_progress(progress)
    del loaded
    release_memory()


def option_log_likelihoods(model: Any, prompt: Sequence[int], options: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """log P(option | prompt) of each option as the beginning of the answer, in nats: the sum over its tokens."""
    cache, first = prefill(model, prompt)
    return tuple(_log_likelihood(model, cache, first, ids) for ids in options)


def _log_likelihood(model: Any, cache: Any, first: Any, ids: Sequence[int]) -> float:
    import torch

    rows = first
    if len(ids) > 1:  # a copy, because the other options continue from the same prompt
        rows = torch.cat([first, extend(model, copy.deepcopy(cache), ids[:-1])])
    chosen = torch.tensor(ids, device=rows.device)[:, None]
    return float(rows.log_softmax(dim=1).gather(1, chosen).double().sum())

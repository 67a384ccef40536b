"""From token ids to log-odds and label mass, by the service's rule, with gradients.

Only the last position of a prompt is read, so the output layer costs next to nothing; it is computed in fp32 over the
whole vocabulary, as in the service. Prompts are packed where the model allows it (packed.py), which is tried first and
compared with the model's own forward; else each goes through that forward alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from service.engine.torch.decoder import decoder_of
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.heads import linear_in_fp32, logit_scaling, softcapped
from service.engine.torch.packing import PackedBatch
from service.prompts.builder import JudgePrompt
from trainer.errors import ModelError
from trainer.run.progress import echo
from trainer.tuning.judge.packed import ATTENTION, inputs_of, register
from trainer.tuning.judge.prompts import Example

# Mean difference of packed and own logits, as a share of their spread. bf16 gives some 0.01, a wrong mask far more.
_TOLERANCE: Final = 0.05
_PROBES: Final = 3
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Readings:
    """For each prompt, in fp32, [prompts]: the log-odds of Yes, and the logarithm of the label mass."""

    log_odds: Tensor
    log_mass: Tensor


class LogitReader(Protocol):
    """Next-token logits of prompts."""

    packs: bool

    def logits(self, prompts: Sequence[JudgePrompt]) -> Tensor:
        """[prompts, vocabulary] in fp32."""


def read_prompts(reader: LogitReader, prompts: Sequence[JudgePrompt]) -> Readings:
    """Log-odds and label mass of each prompt. `service.judge.scoring` has the same rule for a single answer."""
    logits = reader.logits(prompts)
    every = logits.logsumexp(dim=1)
    sides = [_sides(row, prompt) for row, prompt in zip(logits, prompts, strict=True)]
    yes, no = (torch.stack(side) for side in zip(*sides, strict=True))
    return Readings(yes - no, torch.logaddexp(yes, no) - every)


def _sides(logits: Tensor, prompt: JudgePrompt) -> tuple[Tensor, Tensor]:
    """logsumexp over the spellings of Yes, and over those of No; of a choice, the first option is Yes."""
    count = prompt.spellings[0]
    labels = logits[torch.tensor(prompt.label_ids, device=logits.device)]
    return labels[:count].logsumexp(0), labels[count:].logsumexp(0)


def packing_problem(model: Any, longest: int) -> str | None:
    """Why prompts of up to `longest` tokens cannot be packed, as far as the model's description tells.

    Layers with a memory of their own (convolutions, recurrences) would read across prompts; rotary positions of some
    families change with the length. The service knows which families have nothing of the kind. To be asked before
    there are adapters in the model.
    """
    try:
        decoder_of(model, longest)
    except UnsupportedModelError as error:
        return str(error)
    return None


def choose_reader(model: Any, prompts: Sequence[JudgePrompt], problem: str | None) -> LogitReader:
    """The packed reader if it gives the logits of the model's own forward on some of the prompts, else the own one.

    `model` is transformers', with or without adapters in it, `problem` what `packing_problem` said. Says so on stderr
    if the slow one is taken. Raises ModelError for a model whose logits are not finite.
    """
    own = OwnReader(model)
    probes = sorted(prompts, key=lambda prompt: prompt.tokens)[:_PROBES]
    with torch.inference_mode():
        expected = own.logits(probes)
    if not expected.isfinite().all():
        raise ModelError("the model gives NaN or infinity: its weights are broken, or --dtype does not suit it")
    problem = problem or _difference(model, probes, expected)
    if problem is None:
        return PackedReader(model)
    own.activate()
    echo(f"prompts are read one at a time, which is slower: packing does not work with this model ({problem})")
    return own


def _difference(model: Any, probes: Sequence[JudgePrompt], expected: Tensor) -> str | None:
    """What packing does wrong on the probes, if anything."""
    try:
        with torch.inference_mode():
            off = (PackedReader(model).logits(probes) - expected).abs().mean() / expected.std()
    except Exception as error:  # whatever a family's own code makes of an attention that it does not know
        return f"{type(error).__name__}: {error}"
    return None if off <= _TOLERANCE else f"other logits, off by {float(off):.2g} of their spread"


class OwnReader:
    """The model's own forward, one prompt at a time."""

    packs = False

    def __init__(self, model: Any) -> None:
        self._model, self._attention = model, model.config._attn_implementation

    def activate(self) -> None:
        """Undo what a PackedReader has set since this reader was made."""
        self._model.set_attn_implementation(self._attention)

    def logits(self, prompts: Sequence[JudgePrompt]) -> Tensor:
        """See LogitReader."""
        return torch.cat([self._last(prompt) for prompt in prompts])

    def _last(self, prompt: JudgePrompt) -> Tensor:
        ids = torch.tensor([prompt.token_ids], device=self._model.device)
        logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits[:, -1].float()


class PackedReader:
    """All prompts of a call in one packed batch."""

    packs = True

    def __init__(self, model: Any) -> None:
        register()
        model.set_attn_implementation(ATTENTION)
        self._decoder, self._head = model.get_decoder(), model.get_output_embeddings()
        self._scale, self._softcap = logit_scaling(model.config)
        self._device = model.device

    def logits(self, prompts: Sequence[JudgePrompt]) -> Tensor:
        """See LogitReader."""
        batch = PackedBatch()
        for index, prompt in enumerate(prompts):
            batch.add(index, prompt)
        hidden = self._decoder(**inputs_of(batch, self._device)).last_hidden_state[0]
        last = hidden[torch.tensor([batch.last_token[index] for index in range(len(prompts))], device=self._device)]
        logits: Any = _Head.apply(last.float(), self._head.weight, self._head.bias)  # type: ignore[no-untyped-call]
        return softcapped(logits * self._scale, self._softcap)


class _Head(torch.autograd.Function):
    """A frozen linear layer in fp32. Its 16-bit weight is cast chunk by chunk, also for the gradient."""

    @staticmethod
    def forward(context: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.weight = weight
        return linear_in_fp32(weight, bias, states)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), weight = gradients, context.weight
        rows = max(1, _CHUNK // weight.shape[1])
        parts = zip(torch.split(gradient, rows, dim=1), torch.split(weight, rows), strict=True)
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for part, chunk in parts:
            total.addmm_(part, chunk.float())
        return total, None, None


def passes(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """The examples in groups that one forward reads: of at most `tokens` computed tokens, or a single example.

    Examples of one template and of like length come together, so that they share the template's head.
    """
    group: list[Example] = []
    batch = PackedBatch()
    for example in sorted(examples, key=lambda example: (example.template.id, example.tokens)):
        if group and batch.num_tokens + batch.added_tokens(example.prompts) > tokens:
            yield group
            group, batch = [], PackedBatch()
        for prompt in example.prompts:
            batch.add(len(batch.last_token), prompt)
        group.append(example)
    if group:
        yield group


def by_example(values: Sequence[float], examples: Sequence[Example]) -> list[list[float]]:
    """A value for each prompt of the examples, one after the other, put back into a list for each example."""
    ends = [*accumulate(len(example.prompts) for example in examples)]
    starts = [0, *ends[:-1]]
    return [list(values[start:end]) for start, end in zip(starts, ends, strict=True)]

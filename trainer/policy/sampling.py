"""Instructions to responses: k samples of the policy for each, in its chat template, batch by batch.

A response depends on the seed, its instruction's id and its number, not on the other responses, except through rounding
(see service/engine/torch/decoding.py). Batches are fixed by the instructions' lengths, so that a resumed run makes the
same batches as an undisturbed one: a batch is on disk as a whole, or is generated again. Equal responses to one
instruction are kept once, and counted in `copies`. A response ends at the model's end-of-sequence tokens, and where its
chat template ends a turn (client/chat.py). A model without a chat template gets a plain one (load_tokenizer), and its
response is cut before the next "User:".
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.chat import own_turn, turn_end
from client.runs.progress import OnProgress, Progress
from client.schema import Message
from client.texts import is_blank
from trainer.errors import InputError, ModelError
from trainer.policy.models import context_length, release_memory, resolve_model
from trainer.policy.samplers import Generated, Sampler, SampleSettings, SamplingRequest, make_sampler, response_seed
from trainer.policy.tokenizers import BASE_STOPS, chat_ids, has_base_template, load_tokenizer
from trainer.run.files import appending, read_records, write_records
from trainer.run.progress import ignore_progress
from trainer.run.records import Instruction, Sample


class Sampled(Sample):
    """A line of samples.jsonl: `copies` samples of the instruction had this text; `sample` is the number of one."""

    copies: int = 1


@dataclass(frozen=True, slots=True)
class SampleStats:
    """The outcome of sampling. `samples = written + duplicates`; `tokens` and `seconds` are this process's only."""

    instructions: int
    too_long: int
    samples: int
    written: int
    duplicates: int
    cut_off: int
    empty: int
    tokens: int
    seconds: float


def sample_responses(
    model: str | Path,
    instructions: Sequence[Instruction],
    output: Path,
    settings: SampleSettings | None = None,
    on_progress: OnProgress = ignore_progress,
) -> SampleStats:
    """Complete `output` (samples.jsonl): all samples of all instructions, keeping those it holds already.

    An instruction that leaves no room for a response in the model's context is counted in `too_long` and gets no lines.
    Raises InputError for repeated ids, ModelError, RecordError, StageError for a model whose logits are NaN, and
    ImportError for missing packages.
    """
    settings = settings or SampleSettings()
    _require_distinct_ids(instructions)
    folder = resolve_model(str(model))
    tokenizer = load_tokenizer(folder)
    requests = [sampling_request(tokenizer, instruction, settings) for instruction in instructions]
    fitting = _fitting(requests, folder, settings.max_new_tokens)
    done = _resume(output, fitting, settings.samples)
    started, tokens = time.monotonic(), 0
    if len(done) < len(fitting):
        rows, sampler = make_sampler(folder, tokenizer, settings)
        batches = _batches(fitting, max(1, (settings.rows or rows) // settings.samples))
        tokens = _sample_batches(batches, done, sampler, tokenizer, output, on_progress)
        del sampler  # it holds the model
        release_memory()
    lines = read_records(output, Sampled) if fitting else []
    return _stats(lines, len(requests) - len(fitting), tokens, time.monotonic() - started)


def sampling_request(tokenizer: Any, instruction: Instruction, settings: SampleSettings) -> SamplingRequest:
    """The instruction as the policy is asked, with a seed for each sample."""
    turns = [Message(role="user", content=instruction.prompt)]
    if settings.system is not None:
        turns.insert(0, Message(role="system", content=settings.system))
    seeds = [response_seed(settings.seed, instruction.id, sample) for sample in range(settings.samples)]
    return SamplingRequest(instruction.id, chat_ids(tokenizer, turns), seeds)


def distinct_samples(instruction_id: str, responses: Sequence[Generated], tokenizer: Any) -> list[Sampled]:
    """One instruction's samples, equal texts merged: of these the first that ended stands for all."""
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for number, response in enumerate(responses):
        text, ended = _own_text(response, tokenizer)
        groups[text].append(
            Sample(
                id=instruction_id,
                sample=number,
                response=text,
                tokens=len(response.token_ids),
                finish="stop" if ended else "length",
            )
        )
    firsts = ((min(same, key=lambda one: (one.finish != "stop", one.sample)), len(same)) for same in groups.values())
    return [Sampled(**first.model_dump(), copies=copies) for first, copies in firsts]


def _own_text(response: Generated, tokenizer: Any) -> tuple[str, bool]:
    """The policy's own turn, without further turns it may have gone on to generate, and whether it ended."""
    base = has_base_template(tokenizer)
    stops = BASE_STOPS if base else turn_end(tokenizer).texts
    text, ended = own_turn(tokenizer.decode(response.token_ids, skip_special_tokens=True), response.ended, stops)
    if base:  # the space after "Assistant:" is not part of the response
        text = text.strip() if ended else text.lstrip()
    return text, ended


def _require_distinct_ids(instructions: Sequence[Instruction]) -> None:
    repeated = [name for name, count in Counter(one.id for one in instructions).items() if count > 1]
    if repeated:
        raise InputError(
            f"{len(repeated)} instructions share their id with another, {repeated[0]!r} first: give each one its own"
        )


def _fitting(requests: Sequence[SamplingRequest], folder: Path, max_new_tokens: int) -> list[SamplingRequest]:
    """The requests that leave room for a response in the model's context. Raises ModelError if none does."""
    room = (context_length(folder) or sys.maxsize) - max_new_tokens
    fitting = [request for request in requests if len(request.token_ids) <= room]
    if requests and not fitting:
        raise ModelError(f"no instruction leaves room for {max_new_tokens} tokens in {folder}: ask for fewer")
    return fitting


def _resume(output: Path, requests: Sequence[SamplingRequest], samples: int) -> set[str]:
    """The ids of the instructions whose samples are complete; lines of all others are removed from the file."""
    lines = read_records(output, Sampled) if output.exists() else []
    copies: Counter[str] = Counter()
    for line in lines:
        copies[line.id] += line.copies
    done = {request.id for request in requests if copies[request.id] == samples}
    kept = [line for line in lines if line.id in done]
    if len(kept) < len(lines):
        write_records(output, kept)
    return done


def _batches(requests: Sequence[SamplingRequest], size: int) -> list[list[SamplingRequest]]:
    """Longest prompts first, so that a lack of memory shows at once and the time left is over-estimated."""
    ordered = sorted(requests, key=lambda request: (-len(request.token_ids), request.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _sample_batches(
    batches: Sequence[Sequence[SamplingRequest]],
    done: Set[str],
    sampler: Sampler,
    tokenizer: Any,
    output: Path,
    on_progress: OnProgress,
) -> int:
    """Append the samples of all instructions that are not `done`; the number of tokens generated.

    A batch with anything missing is generated whole, because its shape decides the rounding, and so the texts.
    """
    progress = Progress(sum(map(len, batches)), len(done), len(done))
    started, tokens = time.monotonic(), 0
    on_progress(progress)
    with appending(output) as append:
        for batch in batches:
            missing = {request.id for request in batch} - done
            if not missing:
                continue
            for request, responses in zip(batch, sampler(batch), strict=True):
                tokens += sum(len(response.token_ids) + response.ended for response in responses)
                for sample in distinct_samples(request.id, responses, tokenizer) if request.id in missing else ():
                    append(sample)
            progress.done += len(missing)
            progress.note = f"{tokens / (time.monotonic() - started):.0f} tokens/s"
            on_progress(progress)
    return tokens


def _stats(lines: Sequence[Sampled], too_long: int, tokens: int, seconds: float) -> SampleStats:
    samples = sum(line.copies for line in lines)
    return SampleStats(
        instructions=len({line.id for line in lines}),
        too_long=too_long,
        samples=samples,
        written=len(lines),
        duplicates=samples - len(lines),
        cut_off=sum(line.finish == "length" for line in lines),
        empty=sum(is_blank(line.response) for line in lines),
        tokens=tokens,
        seconds=seconds,
    )

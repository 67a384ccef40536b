"""Instructions to responses: k samples of the policy for each, in its chat template.

A response depends on the seed, its instruction's id and its number, not on the other responses, except through rounding
(see service/engine/torch/decoding.py). In this process batches are fixed by the instructions' lengths, so that a
resumed run makes the same batches as an undisturbed one: a batch is on disk as a whole, or is generated again. A server
(server.py) makes batches of its own, and its responses are on disk instruction by instruction. Equal responses to one
instruction are kept once, and counted in `copies`. A response ends at the model's end-of-sequence tokens, and where its
chat template ends a turn (client/chat.py). A model without a chat template gets a plain one (load_tokenizer), and its
response is cut before the next "User:".
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client.chat import own_turn, stop_ids, turn_end
from client.runs.progress import OnProgress, Progress
from client.schema import Message
from client.texts import is_blank
from trainer.errors import InputError, ModelError
from trainer.policy.completions import Reply
from trainer.policy.models import context_length, release_memory, resolve_model
from trainer.policy.requests import (
    Generated,
    Sampler,
    SamplerServer,
    SampleSettings,
    SamplingRequest,
    response_seed,
)
from trainer.policy.samplers import make_sampler, serving_policy, uses_vllm
from trainer.policy.server import Policy, sample_from_server
from trainer.policy.tokenizers import BASE_STOPS, chat_ids, has_base_template, load_tokenizer
from trainer.run.files import appending, read_records, write_records
from trainer.run.progress import ignore_progress
from trainer.run.records import Instruction, Sample

SERVER_LOG: Final = "sampler.log"


class Sampled(Sample):
    """A line of samples.jsonl: `copies` samples of the instruction had this text; `sample` is the number of one."""

    copies: int = 1


@dataclass(frozen=True, slots=True)
class SampleStats:
    """The outcome of sampling. `samples = written + duplicates`; `tokens` and `seconds` are this process's only.

    `instructions` have samples; `too_long` have none as they leave no room, `failed` as a server gave none.
    """

    instructions: int
    too_long: int
    failed: int
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
    started, writer = time.monotonic(), _Writer(output, tokenizer, len(fitting), done, on_progress)
    failed = _sample_missing(str(model), folder, fitting, settings, writer) if len(done) < len(fitting) else 0
    lines = read_records(output, Sampled) if fitting else []
    left_out = len(requests) - len(fitting)
    return _stats(lines, left_out, failed, writer.tokens, time.monotonic() - started)


def sampling_request(tokenizer: Any, instruction: Instruction, settings: SampleSettings) -> SamplingRequest:
    """The instruction as the policy is asked, with a seed for each sample."""
    turns = [Message(role="user", content=instruction.prompt)]
    if settings.system is not None:
        turns.insert(0, Message(role="system", content=settings.system))
    seeds = [response_seed(settings.seed, instruction.id, sample) for sample in range(settings.samples)]
    return SamplingRequest(instruction.id, chat_ids(tokenizer, turns), seeds, tuple(turns))


def distinct_samples(instruction_id: str, responses: Sequence[Generated | Reply], tokenizer: Any) -> list[Sampled]:
    """One instruction's samples, equal texts merged: of these the first that ended stands for all."""
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for number, response in enumerate(responses):
        text, ended = _own_text(response, tokenizer)
        groups[text].append(
            Sample(
                id=instruction_id,
                sample=number,
                response=text,
                tokens=_length(response, tokenizer),
                finish="stop" if ended else "length",
            )
        )
    firsts = ((min(same, key=lambda one: (one.finish != "stop", one.sample)), len(same)) for same in groups.values())
    return [Sampled(**first.model_dump(), copies=copies) for first, copies in firsts]


def _length(response: Generated | Reply, tokenizer: Any) -> int:
    """In tokens, without the one that ended it; counted here if the server did not say."""
    if isinstance(response, Generated):
        return len(response.token_ids)
    return len(tokenizer(response.text)["input_ids"]) if response.tokens is None else response.tokens


def _own_text(response: Generated | Reply, tokenizer: Any) -> tuple[str, bool]:
    """The policy's own turn, without further turns it may have gone on to generate, and whether it ended."""
    base = has_base_template(tokenizer)
    stops = BASE_STOPS if base else turn_end(tokenizer).texts
    if isinstance(response, Generated):
        text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
    else:
        text = response.text
    text, ended = own_turn(text, response.ended, stops)
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


def _sample_missing(
    name: str, folder: Path, requests: Sequence[SamplingRequest], settings: SampleSettings, writer: _Writer
) -> int:
    """Write the samples of all requests that are not done; how many failed."""
    # Longest prompts first, so that a lack of memory shows at once and the time left is over-estimated.
    ordered = sorted(requests, key=lambda request: (-len(request.token_ids), request.id))
    if settings.server is not None:
        return _sample_remotely(settings.server, name, folder, ordered, settings, writer)
    if uses_vllm(settings):
        with serving_policy(folder, settings, writer.output.with_name(SERVER_LOG)) as server:
            return _sample_remotely(server, name, folder, ordered, settings, writer)
    rows, sampler = make_sampler(folder, writer.tokenizer, settings, writer.count_step)
    size = max(1, (settings.rows or rows) // settings.samples)
    _sample_batches([ordered[start : start + size] for start in range(0, len(ordered), size)], sampler, writer)
    del sampler  # it holds the model
    release_memory()
    return 0


def _sample_batches(batches: Sequence[Sequence[SamplingRequest]], sampler: Sampler, writer: _Writer) -> None:
    """A batch with anything missing is generated whole, because its shape decides the rounding, and so the texts."""
    with writer:
        for batch in batches:
            if any(writer.is_missing(request) for request in batch):
                for request, responses in zip(batch, sampler(batch), strict=True):
                    writer.write(request, responses)
                writer.report()


def _sample_remotely(
    server: SamplerServer,
    name: str,
    folder: Path,
    requests: Sequence[SamplingRequest],
    settings: SampleSettings,
    writer: _Writer,
) -> int:
    tokenizer = writer.tokenizer
    policy = Policy(name, folder, stop_ids(tokenizer, folder), renders=not has_base_template(tokenizer))
    missing = [request for request in requests if writer.is_missing(request)]

    def on_responses(request: SamplingRequest, replies: list[Reply]) -> None:
        writer.write(request, replies)
        writer.report()

    with writer:
        failed = sample_from_server(server, policy, missing, settings, on_responses)
    # Answers come in any order: the finished file is in that of the requests.
    places = {request.id: place for place, request in enumerate(requests)}
    lines = sorted(read_records(writer.output, Sampled), key=lambda line: (places[line.id], line.sample))
    write_records(writer.output, lines)
    return failed


class _Writer:
    """Appends the samples of the instructions that have none yet to the file, and counts all tokens generated."""

    def __init__(self, output: Path, tokenizer: Any, total: int, done: Set[str], on_progress: OnProgress) -> None:
        self.output, self.tokenizer, self.tokens = output, tokenizer, 0
        self._done, self._on_progress, self._unwritten = set(done), on_progress, 0
        self._progress = Progress(total, len(done), len(done))
        self._started = time.monotonic()
        self._files = ExitStack()

    def __enter__(self) -> _Writer:
        """Open the file."""
        self._started = time.monotonic()
        self._append = self._files.enter_context(appending(self.output))
        self._on_progress(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._files.close()

    def is_missing(self, request: SamplingRequest) -> bool:
        """Whether its samples are not in the file."""
        return request.id not in self._done

    def write(self, request: SamplingRequest, responses: Sequence[Generated | Reply]) -> None:
        """Append the request's samples unless the file has them."""
        samples = distinct_samples(request.id, responses, self.tokenizer)
        self.tokens += sum(_length(response, self.tokenizer) + response.ended for response in responses)
        if self.is_missing(request):
            for sample in samples:
                self._append(sample)
            self._done.add(request.id)
            self._progress.done += 1

    def count_step(self, tokens: int) -> None:
        """Show that a step of the batch in progress drew so many tokens: a batch takes minutes on a CPU."""
        self._unwritten += tokens
        self._show()

    def report(self) -> None:
        """Show how far it is after a batch, whose tokens are now those that were written."""
        self._unwritten = 0
        self._show()

    def _show(self) -> None:
        tokens = self.tokens + self._unwritten
        self._progress.note = f"{tokens:,} tokens, {tokens / (time.monotonic() - self._started):.0f}/s"
        self._on_progress(self._progress)


def _stats(lines: Sequence[Sampled], too_long: int, failed: int, tokens: int, seconds: float) -> SampleStats:
    samples = sum(line.copies for line in lines)
    return SampleStats(
        instructions=len({line.id for line in lines}),
        too_long=too_long,
        failed=failed,
        samples=samples,
        written=len(lines),
        duplicates=samples - len(lines),
        cut_off=sum(line.finish == "length" for line in lines),
        empty=sum(is_blank(line.response) for line in lines),
        tokens=tokens,
        seconds=seconds,
    )

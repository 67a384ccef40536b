"""Instructions to responses: k samples of the policy for each, in its chat template, written batch by batch.

A response depends on the seed, its instruction's id and its number, not on the other responses (but for rounding: see
trainer.policy.generation). Batches are fixed by the instructions' lengths, so that a resumed run makes the very
batches that an undisturbed one makes: a batch is on disk as a whole, or is done again. Equal responses of one
instruction are kept once, and counted in `copies`. A response ends at the model's end-of-sequence tokens, and where
its chat template ends a turn (client/chat.py). A model without a chat template is asked as
trainer.policy.models.load_tokenizer says; what such a model writes from the next "User:" on is cut away.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m trainer.sample", "trainer")

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client.chat import own_turn, turn_end
from client.schema import Message
from client.texts import is_blank
from trainer.errors import InputError, ModelError
from trainer.flags import add_flags, given
from trainer.policy.generation import Generated, row_seed
from trainer.policy.models import context_length, model_identity, release_memory, resolve_model
from trainer.policy.samplers import Asked, SampleSettings, make_sampler
from trainer.policy.tokenizers import BASE_STOPS, chat_ids, has_base_template, load_tokenizer
from trainer.programs import perform_stage, reading_input, run_program
from trainer.run.bars import Advance, Tell, silent
from trainer.run.files import appending, read_records, write_records
from trainer.run.records import SAMPLES_FILE, Instruction, Sample
from trainer.run.stages import Stage, content_digest


class Sampled(Sample):
    """A line of samples.jsonl: `copies` samples of the instruction had this text, of which this is number `sample`."""

    copies: int = 1


@dataclass(frozen=True, slots=True)
class SampleStats:
    """What came of sampling. `samples = written + duplicates`; `tokens` and `seconds` are this process's."""

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
    tell: Tell = silent,
) -> SampleStats:
    """Have `output` (samples.jsonl) hold all samples of all instructions, going on with what it holds already.

    An instruction that leaves no room for a response in the model's context is counted in `too_long` and has no lines.
    Raises ModelError, RecordError, InputError for ids
    that repeat, and ImportError where packages are missing.
    """
    settings = settings or SampleSettings()
    repeated = [name for name, count in Counter(one.id for one in instructions).items() if count > 1]
    if repeated:
        raise InputError(
            f"{len(repeated)} instructions share their id with another, {repeated[0]!r} first: give each one"
        )
    folder = resolve_model(str(model))
    tokenizer = load_tokenizer(folder)
    asked = [_ask(tokenizer, instruction, settings) for instruction in instructions]
    room = (context_length(folder) or sys.maxsize) - settings.max_new_tokens
    fitting = [one for one in asked if len(one.token_ids) <= room]
    if asked and not fitting:
        raise ModelError(f"no instruction leaves room for {settings.max_new_tokens} tokens in {folder}: ask for fewer")
    done = _resume(output, fitting, settings.samples)
    started, tokens = time.monotonic(), 0
    if len(done) < len(fitting):
        rows, draw = make_sampler(folder, tokenizer, settings)
        # The longest first: what does not fit the memory shows at once, and the time left is over-estimated.
        ordered = sorted(fitting, key=lambda one: (-len(one.token_ids), one.id))
        width = max(1, (settings.rows or rows) // settings.samples)
        advance = Advance(len(fitting), len(done), len(done))
        tell(advance)
        with appending(output) as append:
            for batch in (ordered[start : start + width] for start in range(0, len(ordered), width)):
                if all(one.id in done for one in batch):
                    continue
                drawn = draw(batch)
                for one, responses in zip(batch, drawn, strict=True):
                    if one.id not in done:
                        for sample in _distinct(one.id, responses, tokenizer):
                            append(sample)
                tokens += sum(len(response.token_ids) + response.ended for row in drawn for response in row)
                advance.done += sum(one.id not in done for one in batch)
                advance.note = f"{tokens / (time.monotonic() - started):.0f} tokens/s"
                tell(advance)
        del draw
        release_memory()
    too_long = len(asked) - len(fitting)
    return _stats(read_records(output, Sampled) if fitting else [], too_long, tokens, time.monotonic() - started)


def _ask(tokenizer: Any, instruction: Instruction, settings: SampleSettings) -> Asked:
    turns = [Message(role="user", content=instruction.prompt)]
    if settings.system is not None:
        turns.insert(0, Message(role="system", content=settings.system))
    seeds = [row_seed(settings.seed, instruction.id, sample) for sample in range(settings.samples)]
    return Asked(instruction.id, chat_ids(tokenizer, turns), seeds)


def _resume(output: Path, asked: Sequence[Asked], samples: int) -> set[str]:
    """The ids whose samples are all there; lines of any other are taken out of the file."""
    lines = read_records(output, Sampled) if output.exists() else []
    copies: Counter[str] = Counter()
    for line in lines:
        copies[line.id] += line.copies
    known = {one.id for one in asked}
    done = {name for name, count in copies.items() if count == samples and name in known}
    whole = [line for line in lines if line.id in done]
    if len(whole) < len(lines):
        write_records(output, whole)
    return done


def _distinct(name: str, responses: Sequence[Generated], tokenizer: Any) -> list[Sampled]:
    """The instruction's samples, equal texts once; of several with the same text the one that ended counts."""
    base = has_base_template(tokenizer)
    stops = BASE_STOPS if base else turn_end(tokenizer).texts
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for number, response in enumerate(responses):
        text, ended = tokenizer.decode(response.token_ids, skip_special_tokens=True), response.ended
        text, ended = own_turn(text, ended, stops)
        if base:
            # Without the space after "Assistant:".
            text = text.strip() if ended else text.lstrip()
        finish: Literal["stop", "length"] = "stop" if ended else "length"
        groups[text].append(
            Sample(id=name, sample=number, response=text, tokens=len(response.token_ids), finish=finish)
        )
    found = []
    for same in groups.values():
        first = min(same, key=lambda sample: (sample.finish != "stop", sample.sample))
        found.append(Sampled(**first.model_dump(), copies=len(same)))
    return found


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


def main(argv: Sequence[str] | None = None) -> int:
    """Sample; see trainer.programs.run_program for the exit codes."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    settings = SampleSettings(**given(args, SampleSettings))
    with reading_input():
        instructions = read_records(args.instructions, Instruction)[: args.limit]
    if not instructions:
        raise InputError(f"{args.instructions}: holds no instructions")
    config = {
        "stage": "sample",
        "model": model_identity(args.model),
        "instructions": content_digest(args.instructions),
        "limit": args.limit,
        **settings.described(),
    }
    perform_stage(
        Stage(args.output, "samples", (SAMPLES_FILE,), config),
        config,
        "sampling",
        lambda tell: sample_responses(args.model, instructions, args.output / SAMPLES_FILE, settings, tell),
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sample",
        description="Responses of a model to each instruction of a file, into OUTPUT/samples.jsonl.",
        epilog="Written batch by batch; after an interruption the same command goes on where it stopped.",
    )
    parser.add_argument("--model", required=True, help="a folder, or a hub id (org/name, org/name@revision)")
    parser.add_argument(
        "--instructions", type=Path, required=True, metavar="FILE", help="JSON lines with id, prompt, category"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--limit", type=int, help="only the first so many instructions (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="make anew what another configuration left there")
    add_flags(parser.add_argument_group("sampling"), SampleSettings)
    return parser


if __name__ == "__main__":
    program.finish(main)

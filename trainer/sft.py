"""Supervised fine-tuning of a base model on answers, by TRL and PEFT, before it can be asked for its own.

Only the assistant's turns are trained on; a conversation with several of them gives an example for each. A base model
without a chat template gets a plain one ("User: …", "Assistant: …", see trainer.policy.models.load_tokenizer), which
is saved with what is trained. An example longer than `max_length` is counted and left out, never cut.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m trainer.sft", "trainer")

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from client.benchmarks.data.tables import Record as TableRow
from client.benchmarks.data.tables import read_table
from client.schema import Message
from client.texts import is_blank, messages_in, said
from trainer.errors import InputError
from trainer.flags import add_flags, given
from trainer.policy.models import model_identity, needs_trainer, quiet_libraries, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.programs import perform_stage, run_program
from trainer.run.files import write_json, write_whole
from trainer.run.progress import ReportProgress, ignore_progress
from trainer.run.records import ADAPTER_FOLDER, MODEL_FOLDER, Record
from trainer.run.stages import Stage, content_digest
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.settings import TuneSettings, is_main, load_base, training_arguments
from trainer.tuning.training import Usable, begun_with, data_digest, is_changed, run_trainer, save_result

SFT_LOG: Final = "sft_log.jsonl"
SFT_FILE: Final = "sft.json"
_FULL_LR: Final = 2e-5


@dataclass(frozen=True, kw_only=True)
class SFTSettings(TuneSettings):
    """How answers are trained on. The rate is LoRA's; `sft_settings` lowers it for full fine-tuning."""

    lr: float = field(default=2e-4, metadata={"help": f"peak learning rate (AdamW; for --method full {_FULL_LR:g})"})
    epochs: float = field(default=2.0, metadata={"help": "passes over the data"})


class Example(Record):
    """A conversation up to the user's turn, and the assistant's turn to learn, in TRL's format."""

    prompt: list[Message]
    completion: list[Message]


@dataclass(frozen=True, slots=True)
class SFTResult:
    """What was trained, on how much, and the last numbers of the log; `seconds`, `changed` and `unlike` as in
    DPOResult.
    """

    output: str
    base: str
    method: str
    settings: dict[str, Any]
    examples: int
    too_long: int
    steps: int
    seconds: float
    numbers: dict[str, float]
    changed: bool = True
    unlike: int = 0


def sft_settings(**changes: Any) -> SFTSettings:
    """The defaults with changes. Raises ValueError."""
    if changes.get("method") == "full":
        changes.setdefault("lr", _FULL_LR)
    return SFTSettings(**changes)


def load_examples(path: Path) -> list[Example]:
    """The examples of a file (.jsonl, .json, .csv, .parquet), at least one.

    Columns `messages`, a conversation, or `prompt` (or `instruction`, with `context` or `input` below it) and
    `response` (or `completion`, `output`), as texts. Raises SampleError, which names the record.
    """
    return [example for row in read_table(path) for example in _examples(row)]


def _examples(row: TableRow) -> list[Example]:
    if "messages" in row.fields:
        return _of_conversation(row)
    prompt, response = _text(row, "prompt", "instruction"), _text(row, "response", "completion", "output")
    if prompt is None or response is None:
        raise row.problem(f"has neither messages, nor prompt and response; it has {', '.join(row.fields) or 'nothing'}")
    context = _text(row, "context", "input")
    asked = f"{prompt}\n\n{context}" if context else prompt
    if is_blank(asked) or is_blank(response):
        raise row.problem("the prompt or the response is empty")
    return [Example(prompt=[_said("user", asked)], completion=[_said("assistant", response)])]


def _said(role: str, text: str) -> Message:
    return Message.model_validate({"role": role, "content": text})


def _text(row: TableRow, *names: str) -> str | None:
    """The first of these columns that is there and not null."""
    name = next((name for name in names if row.fields.get(name) is not None), None)
    if name is None:
        return None
    text = _unpacked(row, name)
    if not isinstance(text, str):
        raise row.problem(f"{name} is not a text (a conversation goes into a column messages)")
    return text


def _unpacked(row: TableRow, name: str) -> object:
    try:
        return messages_in(row.fields[name], name)
    except ValueError as error:
        raise row.problem(str(error)) from error


def _of_conversation(row: TableRow) -> list[Example]:
    messages = _unpacked(row, "messages")
    if not isinstance(messages, list):
        raise row.problem("messages is not a list of messages")
    turns = [turn for number, message in enumerate(messages, start=1) for turn in _turn(row, number, message)]
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index]
    if not answers:
        raise row.problem("messages hold no turn of the assistant after another's")
    return [Example(prompt=turns[:index], completion=[turns[index]]) for index in answers]


def _turn(row: TableRow, number: int, message: object) -> list[Message]:
    """The message; none for an empty one of the system's, as data sets write that there is none."""
    try:
        role, text = said(message)
    except ValueError as error:
        raise row.problem(f"message {number} {error}") from error
    if not is_blank(text):
        return [_said(role, text)]
    if role != "system":
        raise row.problem(f"message {number}, of role {role}, is empty")
    return []


def train_sft(
    model: str | Path,
    examples: Sequence[Example],
    folder: Path,
    settings: SFTSettings | None = None,
    tell: ReportProgress = ignore_progress,
) -> SFTResult:
    """Train, and leave adapter/ (or model/), sft_log.jsonl and sft.json in `folder`.

    A rerun with the same arguments goes on from the last complete checkpoint. Raises ModelError, InputError where no
    example can be used, TrainingError, and ImportError.
    """
    settings = settings or sft_settings()
    with needs_trainer():
        # By name: neither has types for strict checks.
        datasets, trl = import_module("datasets"), import_module("trl")
    source = resolve_model(str(model))
    tokenizer = load_tokenizer(source)
    usable = Usable(tokenizer, settings.max_length)
    data = usable.of("examples", examples, ("completion",))
    if not data:
        raise InputError(f"no example to train on: {usable.told}")
    folder.mkdir(parents=True, exist_ok=True)
    made_from = {
        **begun_with(str(model), source, settings),
        "data": data_digest(data),
    }
    from trainer.tuning.watcher import trainer_class

    with quiet_libraries():
        base = load_base(source, settings)
        trainer = trainer_class("SFTTrainer")(
            model=base.model,
            args=trl.SFTConfig(**training_arguments(folder, settings, base, evaluates=False)),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            peft_config=base.peft_config,
        )
        metrics = run_trainer(trainer, folder, folder / SFT_LOG, made_from, tell)
        output = save_result(trainer, folder, base.method, str(model))
        changed = is_changed(source, output)
    result = SFTResult(
        output=output.name,
        base=str(model),
        method=base.method,
        settings=asdict(settings),
        examples=len(data),
        too_long=usable.too_long,
        unlike=usable.unlike,
        steps=metrics["steps"],
        seconds=metrics["train_runtime"],
        numbers=metrics["last"],
        changed=changed,
    )
    if is_main():
        card = model_card(folder.name, str(model), {"SFT": asdict(result)}, adapter=base.method != "full")
        write_whole(output / CARD_FILE, card.encode())
        write_json(folder / SFT_FILE, asdict(result))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Train; see trainer.programs.run_program for the exit codes."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    settings = sft_settings(**given(args, SFTSettings))
    examples = load_examples(args.data)[: args.limit]
    inputs = {"model": model_identity(args.model), "data": content_digest(args.data), "limit": args.limit}
    config = {"stage": "sft", **inputs, **settings.described()}
    output = MODEL_FOLDER if settings.method == "full" else ADAPTER_FOLDER
    stage = Stage(args.output, "sft", (output, SFT_LOG, SFT_FILE), config)
    if not is_main():  # the first process holds the folder and writes
        if not stage.done:
            train_sft(args.model, examples, args.output, settings)
        return
    perform_stage(
        stage,
        config,
        "SFT",
        lambda tell: train_sft(args.model, examples, args.output, settings, tell),
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sft",
        description="Teach a base model to answer (SFT): OUTPUT/adapter (LoRA) or OUTPUT/model, and sft_log.jsonl.",
        epilog="Checkpoints are kept while it trains: after an interruption the same command goes on from the last. "
        "python -m trainer.merge makes a model of the adapter. For several GPUs see python -m trainer.dpo --help.",
    )
    parser.add_argument("--model", required=True, help="a folder, or a hub id (org/name, org/name@revision)")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="messages, or prompt and response, in each record"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--limit", type=int, help="only the first so many examples (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="make anew what another configuration left there")
    add_flags(parser.add_argument_group("training"), SFTSettings)
    return parser


if __name__ == "__main__":
    program.finish(main)

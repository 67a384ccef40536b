"""Blank texts, and conversations in the forms of data sets: the same rules for everything that reads them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from client import Judge
from client.adapters.trl import JudgeReward, RewardOptions
from client.benchmarks.questions import Question
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.calibrate.evidence import EvidenceError, read_pairs
from client.data.samples import Sample
from client.data.sources import load_pairs, load_rewardbench
from client.data.tables import DataError
from client.judge import AsyncJudge
from client.labels.pairs import PairOptions
from client.labels.records import Score
from client.load.bodies import UsageError, bodies
from client.schema import Message
from client.texts import is_blank, messages_in
from tests.support.fake_judge import SCORE, Service, batch_answer
from tests.support.live import Live, live_service
from trainer.errors import RecordError
from trainer.instructions.reading import read_instructions
from trainer.labels.labelers import RandomLabeler
from trainer.labels.labeling import Labelling, label_samples
from trainer.labels.pairs import make_pairs
from trainer.run.files import read_records
from trainer.run.records import Instruction
from trainer.run.records import Sample as Sampled
from trainer.tuning.preferences import load_preferences
from trainer.tuning.sft import load_examples

BLANK = ["", " ", "  \n", "\t\r\n", "\u00a0\u3000", "\u200b", "\ufeff", "\u2028", "\x00\x1b", "\u2800", "\u3164\ufe0f"]
TURNS = [{"role": "user", "content": "2+2?"}]
ANSWERED = [*TURNS, {"role": "assistant", "content": "4"}]


def say(role: str, content: object) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content}


def write(path: Path, *records: dict[str, Any]) -> Path:
    """The records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# Blank texts.


@pytest.mark.parametrize("text", BLANK, ids=ascii)
def test_a_text_without_anything_visible_is_blank(text: str) -> None:
    """White space of any script, controls and zero-width characters are invisible; one letter or symbol is not."""
    assert is_blank(text)
    assert not any(is_blank(text + more) for more in ("a", ".", "\u4e2d", "\U0001f642", "\u0301", "<"))


@pytest.mark.parametrize("text", BLANK, ids=ascii)
def test_a_blank_completion_has_no_reward(text: str) -> None:
    """Texts and conversations alike: it counts as empty, does not stop the training, and the judge is not asked."""
    with Judge("http://judge", transport=httpx.MockTransport(refuse)) as judge:
        reward = JudgeReward(judge, RewardOptions(max_failures=0.0))
        rewards = reward(["p", TURNS], [text, [say("assistant", [{"type": "text", "text": text}])]])

    assert rewards == [None, None]
    assert reward.failures == {"empty_response": 2}


def refuse(request: httpx.Request) -> httpx.Response:
    """The judge must not be asked."""
    raise AssertionError(request.url)


def test_a_blank_prompt_has_no_reward() -> None:
    """It is counted under its own code."""
    with Judge("http://judge", transport=httpx.MockTransport(refuse)) as judge:
        reward = JudgeReward(judge, RewardOptions(max_failures=1.0))
        rewards = reward(["\n"], ["a"])

    assert rewards == [None]
    assert reward.failures == {"empty_prompt": 1}


def test_unjudged_replaces_none_as_the_reward() -> None:
    """OnlineDPO reads None as 0, which is a good reward in log-odds; `unjudged` takes its place."""
    with Judge("http://judge", transport=httpx.MockTransport(Service(batch_answer(1)))) as judge:
        rewards = JudgeReward(judge, RewardOptions(unjudged=-20.0))(["p"] * 2, ["a", "\n"])

    assert rewards == [SCORE["log_odds"], -20.0]
    with pytest.raises(ValueError, match="finite"):
        RewardOptions(unjudged=float("nan"))


async def test_a_blank_answer_is_an_empty_response_of_a_benchmark(tmp_path: Path) -> None:
    """A sample with a blank answer or prompt counts as failed, like one with an empty text."""
    samples = [Sample("1", "all", "p", ("a",), ("\u200b\n",)), Sample("2", "all", " ", ("a",), ("b",))]
    asking = Asking({"all": Question()}, max_failures=1.0)
    async with AsyncJudge("http://judge", transport=httpx.MockTransport(refuse)) as judge:
        rows = await judge_samples(judge, samples, asking, RunFolder(tmp_path, {}))

    assert [row.error.code for row in rows if row.error] == ["empty_response", "empty_prompt"]


async def test_a_blank_response_is_labelled_as_empty_and_never_paired(tmp_path: Path) -> None:
    """Not even by the labeller without a judge, and whatever its score in the file is."""
    instructions = [Instruction(id="i", prompt="p")]
    samples = [
        Sampled(id="i", sample=n, response=text, tokens=1, finish="stop") for n, text in enumerate(["a", "\u200b", "b"])
    ]
    scores = await label_samples(RandomLabeler(0), Labelling(instructions, samples, tmp_path / "scores.jsonl"))
    stored = [Score(id="i", sample=n, log_odds=n, score=0.5) for n in range(3)]

    assert [score.error and score.error.code for score in scores] == [None, "empty_response", None]
    assert make_pairs(instructions, samples, stored, PairOptions())[1].empty == 1


def test_the_service_judges_blank_texts() -> None:
    """On the wire an answer of spaces is a text like any other; only an empty one is refused."""
    with live_service() as live:
        statuses = [post(live, text).status_code for text in ("  \n", "")]

    assert statuses == [200, 422]


def post(live: Live, text: str) -> httpx.Response:
    """POST /score with this response."""
    return live.http.post("/score", json={"prompt": "p", "response": text})


# Conversations as JSON text, and in parts.


@pytest.mark.parametrize(
    "value",
    ["[1, 2]", "[]", '["role"]', '[{"a": 1}]', "[{x}] in sets", "[{", '{"role": "x"}', "Why?", ["a"], None, 3],
    ids=ascii,
)
def test_other_values_are_left_alone(value: object) -> None:
    """Only a list of messages is read as one; other JSON stays a text."""
    assert messages_in(value, "prompt") == value


NOT_JSON = [
    str(ANSWERED),
    "[{'content': '2+2?', 'role': 'user'}\n {'content': '4', 'role': 'assistant'}]",
    "array([{'role': 'user', 'content': '2+2?'}], dtype=object)",
    '[{"role": "user", "content": "2+2?"',
]


@pytest.mark.parametrize("text", NOT_JSON)
@pytest.mark.parametrize(
    "load",
    [
        lambda path: load_pairs(path),
        lambda path: load_preferences(str(path)),
        lambda path: read_instructions(str(path)),
        lambda path: read_pairs([path]),
        lambda path: bodies("compare", path),
        load_examples,
    ],
    ids=["benchmark", "preferences", "instructions", "calibrate", "load", "sft"],
)
def test_messages_that_are_not_json_are_refused(tmp_path: Path, load: Callable[[Path], object], text: str) -> None:
    """Python's and numpy's notation, as in CSV files from pandas, is refused, not taken literally."""
    file = write(tmp_path / "a.jsonl", {"prompt": text, "chosen": "a", "rejected": "b", "response": "c"})

    with pytest.raises((DataError, EvidenceError, UsageError), match=r"line 1: .*prompt.*looks like a list of mess"):
        load(file)


def test_a_benchmark_reads_conversations_that_are_text(tmp_path: Path) -> None:
    """In CSV, a prompt and answers that are JSON of messages mean the same as lists."""
    record = {"prompt": TURNS, "chosen": ANSWERED, "rejected": [*TURNS, say("assistant", "5")], "subset": "all"}
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([record, [json.dumps(value) if value != "all" else value for value in record.values()]])

    (sample,) = load_pairs(tmp_path / "a.csv")

    assert (sample.prompt, sample.chosen, sample.rejected) == ("2+2?", ("4",), ("5",))
    with pytest.raises(DataError, match="row 1: chosen is a list of objects, not a text"):
        load_rewardbench(tmp_path / "a.csv")


def test_the_trainer_reads_conversations_that_are_text(tmp_path: Path) -> None:
    """Instructions, examples and preferences are read from JSON text as from lists."""
    texts = [json.dumps(TURNS), json.dumps(ANSWERED)]
    asked = write(tmp_path / "a.jsonl", {"messages": texts[1]})
    pairs = write(tmp_path / "b.jsonl", {"prompt": texts[0], "chosen": texts[1], "rejected": "5"})

    assert [one.instruction.prompt for one in read_instructions(str(asked)).instructions] == ["2+2?"]
    assert [example.model_dump() for example in load_examples(asked)] == [
        {"prompt": TURNS, "completion": [ANSWERED[1]]}
    ]
    assert [one.model_dump()["prompt"] for one in load_preferences(str(pairs))[0]] == [TURNS]


def test_calibration_and_load_read_conversations_that_are_text(tmp_path: Path) -> None:
    """Prompts may be conversations; an answer must be a plain text."""
    file = write(tmp_path / "a.jsonl", {"prompt": json.dumps(TURNS), "chosen": "4", "rejected": "5"})

    assert [pair.prompt for pair in read_pairs([file])] == [[Message(role="user", content="2+2?")]]
    assert json.loads(bodies("score", file)(0))["prompt"] == TURNS
    for chosen in (json.dumps(ANSWERED), " \n"):
        bad = write(tmp_path / "b.jsonl", {"prompt": "p", "chosen": chosen, "rejected": "5"})
        with pytest.raises(EvidenceError, match="line 1: not a pair: chosen"):
            read_pairs([bad])


@pytest.mark.parametrize("content", ["", " \n", [{"type": "text", "text": ""}]], ids=ascii)
def test_an_empty_system_turn_is_dropped(tmp_path: Path, content: object) -> None:
    """Data sets write "no system message" as an empty one; nothing of it precedes the question."""
    turns = [say("system", content), *ANSWERED]
    file = write(tmp_path / "a.jsonl", {"messages": turns, "prompt": turns[:2], "chosen": "4", "rejected": "5"})
    bare = write(tmp_path / "b.jsonl", {"messages": turns})

    assert load_pairs(file)[0].prompt == "2+2?"
    assert [len(pair.prompt) for pair in read_pairs([file])] == [1]
    assert [len(example.prompt) for example in load_examples(file)] == [1]
    assert [one.instruction.prompt for one in read_instructions(str(bare)).instructions] == ["2+2?"]


def test_an_empty_system_turn_costs_no_reward() -> None:
    """The question is judged without it, as TRL's data sets have them too."""
    service = Service(batch_answer(1))
    with Judge("http://judge", transport=httpx.MockTransport(service)) as judge:
        rewards = JudgeReward(judge)([[say("system", ""), *TURNS]], ["4"])

    assert rewards == [SCORE["log_odds"]]
    assert service.sent["items"][0]["prompt"] == TURNS


def test_the_text_parts_of_a_content_are_joined(tmp_path: Path) -> None:
    """Parts of type text, as in chat APIs, make one text."""
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?", "image_url": None}]
    file = write(tmp_path / "a.jsonl", {"prompt": [say("user", parts)], "chosen": "4", "rejected": "5"})

    assert (load_pairs(file)[0].prompt, len(read_pairs([file]))) == ("2+2?", 1)
    assert read_instructions(str(file)).instructions[0].instruction.prompt == "2+2?"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (say("user", None), "has no text as its content"),
        (say("user", 3), "has no text as its content"),
        (say("user", [{"type": "image_url", "image_url": "x"}]), "has a part of type image_url"),
        ({**say("assistant", ""), "tool_calls": [{"name": "f"}]}, "has tool_calls"),
        (say("tool", "5"), "is of role tool"),
        ({"from": "human", "value": "hi"}, "has no text as its content"),
    ],
    ids=ascii,
)
def test_a_message_without_text_is_refused(tmp_path: Path, message: dict[str, Any], said: str) -> None:
    """Tool calls, images, null and other layouts are refused with a reason, from a list or from JSON text."""
    for number, turns in enumerate(([message, *TURNS], json.dumps([message, *TURNS]))):
        record = {"prompt": turns, "messages": turns, "chosen": "4", "rejected": "5"}
        file = write(tmp_path / f"{number}.jsonl", record)
        for load in (load_pairs, load_examples, lambda path: read_instructions(str(path))):
            with pytest.raises(DataError, match=rf"line 1: .*message.*{said}"):
                load(file)


def test_an_instruction_is_not_a_list_of_messages(tmp_path: Path) -> None:
    """The same holds for files of instructions written by others, which sampling and labelling accept."""
    file = write(tmp_path / "instructions.jsonl", {"id": "a", "prompt": json.dumps(TURNS)})

    with pytest.raises(RecordError, match=r"line 1: .*list of messages"):
        read_records(file, Instruction)


# Files with misleading names.

RECORDS = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.json", LINES),
        ("lines.json", b"\xef\xbb\xbf" + LINES),
        ("lines.json.gz", gzip.compress(LINES)),
        ("list.jsonl", json.dumps(RECORDS).encode()),
        ("list.jsonl", b"\xef\xbb\xbf\n " + json.dumps(RECORDS, indent=1).encode()),
        ("zipped.jsonl", gzip.compress(LINES)),
        ("zipped.json", gzip.compress(json.dumps(RECORDS).encode())),
    ],
    ids=["lines.json", "with a mark", "lines.json.gz", "list.jsonl", "indented", "zipped.jsonl", "zipped.json"],
)
def test_a_file_is_read_by_its_content(tmp_path: Path, name: str, content: bytes) -> None:
    """JSON Lines in .json, a list in .jsonl, and compressed files without .gz give the same samples everywhere."""
    (tmp_path / name).write_bytes(content)

    assert [sample.prompt for sample in load_pairs(tmp_path / name)] == ["p", "q"]
    assert [one.instruction.prompt for one in read_instructions(str(tmp_path / name)).instructions] == ["p", "q"]
    assert [pair.prompt for pair in read_pairs([tmp_path / name])] == ["p", "q"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", LINES + b'{"prompt": \n', "line 3: broken JSON"),
        ("a.json", LINES[:50], "one line must be named|broken JSON"),
        ("a.jsonl", json.dumps([*RECORDS, 3]).encode(), "line 1: not a JSON object"),
        ("a.csv", b"prompt,chosen,chosen\np,a,b\n", "two columns are named 'chosen'"),
        ("a.csv", b"prompt;chosen;rejected\np;a;b\n", "no column chosen .*there: prompt;chosen;rejected"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """The message has the place, and what is wrong there."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=said):
        load_pairs(tmp_path / name)


def test_parquet_columns_of_structs_are_conversations(tmp_path: Path) -> None:
    """Lists of structs, with the nulls that Parquet fills in, are messages; a null prompt is refused with its row."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = [{**say("system", ""), "tool_calls": None}, {**TURNS[0], "tool_calls": None}]
    pq.write_table(pa.Table.from_pylist([{"prompt": turns, "chosen": "4", "rejected": "5"}]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": None, "chosen": "4", "rejected": "5"}]), tmp_path / "b.parquet")

    assert load_pairs(tmp_path / "a.parquet")[0].prompt == "2+2?"
    with pytest.raises(DataError, match=r"row 1: .*prompt is null"):
        load_pairs(tmp_path / "b.parquet")

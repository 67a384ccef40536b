"""Reading samples from files and data sets, and taking a part of them."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.benchmarks.catalog import BENCHMARKS
from client.benchmarks.flags import DataOptions
from client.data.samples import Sample, choose, digest, halves
from client.data.sources import hub_source, load_hub, load_pairs, load_rewardbench, load_rmbench
from client.data.tables import DataError
from client.schema import Message

DATA = Path(__file__).parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the data folder")

PAIR = {"id": "x/1", "subset": "x", "prompt": "2+2?", "chosen": "4", "rejected": "5"}
STYLED = {"id": 7, "domain": "chat", "prompt": "Hi?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"]}


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_one(tmp_path: Path, record: object, load: Callable[[Path], list[Sample]] = load_pairs) -> Sample:
    return load(jsonl(tmp_path / "one.jsonl", record))[0]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def made(subset: str, count: int, prompt: str = "") -> list[Sample]:
    return [Sample(f"{subset}/{n}", subset, prompt or f"{subset} {n}", ("good",), ("bad",)) for n in range(count)]


def sizes(samples: Iterable[Sample]) -> dict[str, int]:
    return dict(Counter(sample.subset for sample in samples))


def test_a_rewardbench_line_becomes_a_sample(tmp_path: Path) -> None:
    """The columns go where they belong; a textual id stays as it is."""
    assert read_one(tmp_path, PAIR, load_rewardbench) == Sample("x/1", "x", "2+2?", ("4",), ("5",))


def test_official_ids_are_made_unique_by_their_subset(tmp_path: Path) -> None:
    """RewardBench's whole-number ids repeat across subsets, so the subset becomes part of them."""
    file = jsonl(tmp_path / "r.jsonl", {**PAIR, "id": 30}, {**PAIR, "id": 30, "subset": "y"})

    assert [sample.id for sample in load_rewardbench(file)] == ["x/30", "y/30"]


def test_rmbench_keeps_three_answers_a_side(tmp_path: Path) -> None:
    """The domain is the subset, the styles stay in their order."""
    sample = read_one(tmp_path, STYLED, load_rmbench)

    assert sample == Sample("chat/7", "chat", "Hi?", ("a", "b", "c"), ("d", "e", "f"))


def test_a_file_of_one_rmbench_domain_is_known_by_its_name(tmp_path: Path) -> None:
    """The official per-domain files have no domain column."""
    record = {key: value for key, value in STYLED.items() if key != "domain"}
    file = jsonl(tmp_path / "safety-refuse_filtered.jsonl", record)

    assert load_rmbench(file)[0].subset == "safety-refuse"


@needs_data
def test_the_official_data_reads_whole() -> None:
    """The development halves of both benchmarks, and the GSM8K pairs, load with every sample they hold."""
    loaded = [
        load_rewardbench(DATA / "rewardbench_dev.jsonl"),
        load_rmbench(DATA / "rmbench_dev.json"),
        load_pairs(DATA / "gsm8k_pairs_dev.jsonl"),
    ]

    assert [len(samples) for samples in loaded] == [1490, 402, 364]
    assert len(sizes(loaded[0])) == 23


def write_json(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records), encoding="utf-8")


def write_columns(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({key: [record[key] for record in records] for key in records[0]}), encoding="utf-8")


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_gzip(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", write_json),
        ("columns.json", write_columns),
        ("a.csv", write_csv),
        ("a.jsonl.gz", write_gzip),
        ("a.parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_samples(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], None]
) -> None:
    """What the file is written as makes no difference, long cells and line breaks in them included."""
    records = [{**PAIR, "id": 1}, {**PAIR, "id": 2, "prompt": 'a\n"b", c', "chosen": "x" * 200_000}]
    write(tmp_path / name, records)

    assert load_pairs(tmp_path / name) == load_pairs(jsonl(tmp_path / "same.jsonl", *records))


def test_a_mark_windows_line_ends_and_blank_lines_are_fine(tmp_path: Path) -> None:
    """What editors leave in a file does not matter."""
    file = tmp_path / "w.jsonl"
    line = json.dumps({**PAIR, "prompt": "a\u2028b"}, ensure_ascii=False)
    file.write_bytes(f"\ufeff{line}\r\n\r\n   \r\n".encode())

    assert [sample.prompt for sample in load_pairs(file)] == ["a\u2028b"]


def test_an_empty_text_is_kept(tmp_path: Path) -> None:
    """Whether an empty answer can be judged is the run's business: no sample is dropped here."""
    empty = {**PAIR, "prompt": "", "chosen": "", "rejected": ""}

    assert read_one(tmp_path, empty, load_rewardbench) == Sample("x/1", "x", "", ("",), ("",))


def test_missing_id_and_subset_have_defaults(tmp_path: Path) -> None:
    """A pair without id is known by its line, one without subset belongs to `all`."""
    bare = {"prompt": "p", "chosen": "a", "rejected": "b"}
    file = jsonl(tmp_path / "bare.jsonl", bare, {**bare, "id": 9}, {**bare, "id": None, "subset": None})

    assert [(sample.id, sample.subset) for sample in load_pairs(file)] == [("1", "all"), ("9", "all"), ("3", "all")]


def test_best_of_n_keeps_all_answers(tmp_path: Path) -> None:
    """RewardBench 2: lists of answers, and the ids that its subset Ties needs."""
    record = {"id": "tied:3", "subset": "Ties", "prompt": "A colour?", "chosen": ["red", "blue"], "rejected": ["dog"]}

    assert read_one(tmp_path, record) == Sample("tied:3", "Ties", "A colour?", ("red", "blue"), ("dog",))


def test_conversations_give_prompt_and_answers(tmp_path: Path) -> None:
    """With the prompt inside chosen and rejected, the turns before the last are the prompt."""
    turns = [say("user", "Hi"), say("assistant", "Hello"), say("user", "2+2?")]
    record = {"chosen": [*turns, say("assistant", "4")], "rejected": [*turns, say("assistant", "5")]}
    sample = read_one(tmp_path, record)

    assert sample.prompt == tuple(Message.model_validate(turn) for turn in turns)
    assert (sample.chosen, sample.rejected) == (("4",), ("5",))


def test_the_prompt_column_is_used_where_it_is_the_whole_prompt(tmp_path: Path) -> None:
    """UltraFeedback repeats a single turn; a multi-turn conversation says more than a text column can."""
    short = [say("user", "Q (as sent)")]
    long = [say("user", "Q"), say("assistant", "A"), say("user", "R")]

    def prompt_with(turns: list[dict[str, str]]) -> Any:
        sides = {side: [*turns, say("assistant", side)] for side in ("chosen", "rejected")}
        return read_one(tmp_path, {"prompt": "Q", **sides}).prompt

    assert prompt_with(short) == "Q"
    assert [message.content for message in prompt_with(long)] == ["Q", "A", "R"]


def test_a_lone_user_message_is_its_text(tmp_path: Path) -> None:
    """As the service renders it; an empty system message is no message, an empty user turn no prompt."""
    prompts = [
        [say("user", "Hi")],
        [say("system", ""), say("user", "Hi")],
        [say("user", "Hi"), say("assistant", "Yes?"), say("user", "")],
    ]

    assert [read_one(tmp_path, {**PAIR, "prompt": prompt}).prompt for prompt in prompts] == ["Hi", "Hi", ""]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chosen": 4}, "line 2: chosen is a number, not a text"),
        ({"chosen": ["a"]}, "line 2: chosen is a list of texts, not a text"),
        ({"rejected": None}, "line 2: rejected is null, not a text"),
        ({"prompt": {"q": 1}}, "line 2: prompt is an object, not a text or a list of messages"),
        ({"prompt": [say("robot", "Hi")]}, "line 2: a message of prompt is of role robot"),
        ({"prompt": [say("assistant", "Hi")]}, "line 2: the last message of the prompt must be the user's"),
        ({"prompt": ["Hi"]}, "line 2: a message of prompt is not"),
        ({"prompt": "\ud800"}, "line 2: prompt is no valid Unicode text"),
        ({"id": 1.5}, "line 2: id is a number, not a text or a whole number"),
        ({"id": "x/1"}, "line 2: id x/1 is already that of line 1"),
        ({"subset": ""}, "line 2: subset is empty"),
    ],
)
def test_a_bad_value_is_named_with_its_line(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    """The error says where and what; the samples before it are not silently used alone."""
    file = jsonl(tmp_path / "bad.jsonl", PAIR, {**PAIR, "id": "x/2", **change})

    with pytest.raises(DataError) as caught:
        load_rewardbench(file)
    assert str(caught.value).startswith(f"{file}, {problem}")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"chosen": ["a", "b"]}, "chosen holds 2 answers; RM-Bench has three"),
        ({"rejected": ["a", "b", "c", "d"]}, "rejected holds 4 answers"),
        ({"rejected": ["a", "b", None]}, "rejected holds null, not three texts"),
        ({"chosen": "a"}, "chosen is a text, not a list of three texts"),
    ],
)
def test_rmbench_needs_three_texts_a_side(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    """The 3 x 3 table has no place for fewer or more."""
    with pytest.raises(DataError, match=problem):
        read_one(tmp_path, {**STYLED, **change}, load_rmbench)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({**PAIR, "chosen": []}, "chosen is an empty list"),
        ({**PAIR, "chosen": 3}, "chosen is a number, not a text, a list of texts or a conversation"),
        ({**PAIR, "rejected": [3]}, "rejected is a number, not a text or a list of messages"),
        ({**PAIR, "chosen": [say("user", "x")]}, "the last message of chosen is of role user"),
        ({"chosen": "a", "rejected": "b"}, r"no column prompt \(there: chosen, rejected\)"),
        ({"prompt": "a"}, r"no column chosen and no column rejected \(there: prompt\)"),
        (
            {side: [say("user", side), say("assistant", "x")] for side in ("chosen", "rejected")},
            "chosen and rejected differ before their last message",
        ),
    ],
)
def test_pairs_that_make_no_sense_are_refused(tmp_path: Path, record: dict[str, object], problem: str) -> None:
    """Above all, answers to different prompts are never compared."""
    with pytest.raises(DataError, match=f"line 1: {problem}"):
        read_one(tmp_path, record)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": 2\n', "line 2: broken JSON: Expecting ',' delimiter"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"id": 1}\n{"p": "\xe9"}\n', r"line 2: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b"\n\n", "holds no samples"),
        ("a.json", b'[{"id": 1},\n {"id": }]', r"broken JSON: Expecting value \(line 2, column 9\)"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        ("a.json", b"[]", "holds no samples"),
        ("a.json", b"3", "must hold a list of objects"),
        ("a.json", b'[{"id": 1}, 3]', "row 2: not a JSON object"),
        ("a.json", b'{"id": "x"}', "every value must be a list"),
        ("a.json", b'{"id": [1], "prompt": []}', "columns of different lengths"),
        ("a.csv", b"id,prompt\n1,a\n2,a,b\n", "row 2: 3 cells under a header of 2"),
        ("a.csv", b'id,prompt\n1,"a\n', "row 1: not CSV"),
        ("a.csv", b"", "holds no samples"),
        ("a.parquet", b"PAR1", "not a Parquet file|Parquet needs more packages"),
        ("a.jsonl.gz", b"{}", "cannot be read"),
        ("a.txt", b"", "not a known kind of file"),
        ("a", b"", "not a known kind of file"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    """Each kind of damage has its own message, with the file and the place in it."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=problem) as caught:
        load_pairs(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """So is one that is not there."""
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        load_pairs(tmp_path / "gone.jsonl")


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as a data set of two splits; the hub itself is out of reach, and caches are the test's."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data-set"
    folder.mkdir()
    jsonl(folder / "test.jsonl", {**PAIR, "id": 1, "chosen": ["4"], "rejected": ["5", "6", "7"]})
    return folder


def test_a_data_set_of_one_split_needs_no_split(offline_hub: Path) -> None:
    """Best-of-N rows of a data set become the same samples as those of a file."""
    samples = load_hub(str(offline_hub))

    assert samples == load_pairs(offline_hub / "test.jsonl")
    assert samples[0].rejected == ("5", "6", "7")


@pytest.mark.parametrize("source", ["hub:", "hub: ", "hub:@train"])
def test_a_data_set_has_a_name(source: str) -> None:
    """Without one, it says what a name looks like."""
    with pytest.raises(DataError, match="hub:ORG/NAME@SPLIT"):
        hub_source(source)


def test_a_data_set_of_several_splits_wants_one(offline_hub: Path) -> None:
    """None is chosen in silence; a wrong one is answered with those that exist."""
    jsonl(offline_hub / "train.jsonl", {**PAIR, "chosen": ["4"], "rejected": ["5"]})

    with pytest.raises(DataError, match=r"several splits: give hub:\S+@SPLIT, one of (train, test|test, train)"):
        load_hub(str(offline_hub))
    with pytest.raises(DataError, match=r"\(dev\): cannot be loaded from the hub: .*train"):
        load_hub(str(offline_hub), "dev")
    assert load_hub(str(offline_hub), "train")[0].rejected == ("5",)


def test_rmbench_is_known_by_its_columns(offline_hub: Path) -> None:
    """A data set with domains and no subsets is read as RM-Bench."""
    jsonl(offline_hub / "test.jsonl", STYLED)

    assert load_hub(str(offline_hub)) == [Sample("chat/7", "chat", "Hi?", ("a", "b", "c"), ("d", "e", "f"))]


def test_a_hub_out_of_reach_is_a_sample_error(offline_hub: Path) -> None:
    """What went wrong stands in the message, whichever library raised it."""
    assert offline_hub.exists()
    with pytest.raises(DataError, match=r"allenai/reward-bench: cannot be loaded from the hub: \w+: "):
        load_hub("allenai/reward-bench")


def test_a_benchmark_takes_its_official_split(offline_hub: Path) -> None:
    """That is the benchmarks' alone: to train on, a split has to be chosen."""
    assert offline_hub.exists()
    entry = BENCHMARKS["rewardbench"]
    for source in ("hub", "hub:allenai/reward-bench"):
        with pytest.raises(DataError, match=r"allenai/reward-bench \(filtered\): cannot be loaded"):
            DataOptions(source, None, None, 0).samples(entry)


def test_subsets_are_chosen_by_name_or_pattern() -> None:
    """In the order of the file, each once."""
    samples = [*made("hep-go", 1), *made("math", 1), *made("hep-cpp", 1)]

    assert [each.subset for each in choose(samples, ["hep-*", "hep-go"])] == ["hep-go", "hep-cpp"]
    with pytest.raises(DataError, match="no subset chat; there are hep-go, math, hep-cpp"):
        choose(samples, ["math", "chat"])


def test_a_subset_whose_name_looks_like_a_pattern_is_found() -> None:
    """A name is a name first."""
    assert sizes(choose([*made("a[1]", 1), *made("b", 1)], ["a[1]"])) == {"a[1]": 1}


def test_a_limit_is_shared_in_proportion() -> None:
    """By largest remainder: of 10, shares of 5.45, 3.18 and 1.36 are 6, 3 and 1, in the order of the file."""
    samples = [*made("a", 12), *made("b", 7), *made("c", 3)]
    chosen = choose(samples, limit=10)

    assert sizes(chosen) == {"a": 6, "b": 3, "c": 1}
    assert chosen == [sample for sample in samples if sample in chosen]


def test_every_subset_has_one_where_the_limit_allows() -> None:
    """A small subset is not lost beside a large one; with fewer seats than subsets the large ones come first."""
    samples = [*made("small", 1), *made("large", 100), *made("tiny", 1)]

    assert sizes(choose(samples, limit=3)) == {"small": 1, "large": 1, "tiny": 1}
    assert sizes(choose(samples, limit=1)) == {"large": 1}


def test_the_seed_decides_who_is_chosen() -> None:
    """The same seed takes the same samples, another seed others; a limit below one is refused."""
    samples = made("a", 50)

    assert choose(samples, limit=10, seed=1) == choose(samples, limit=10, seed=1)
    assert choose(samples, limit=10, seed=1) != choose(samples, limit=10, seed=2)
    with pytest.raises(DataError, match="a limit of 0"):
        choose(samples, limit=0)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=6), limit=st.integers(1, 100))
def test_a_limit_is_met_exactly(counts: list[int], limit: int) -> None:
    """As many as asked for or all there are, and no subset further than one from its share, or at its one seat."""
    samples = [sample for n, count in enumerate(counts) for sample in made(f"s{n}", count)]
    taken = sizes(choose(samples, limit=limit))
    seats = [taken.get(f"s{n}", 0) for n in range(len(counts))]

    assert sum(seats) == min(limit, len(samples))
    assert min(seats) >= (limit >= len(counts))
    assert all(seat <= max(1, limit * count / len(samples) + 1) for seat, count in zip(seats, counts, strict=True))


def test_halves_share_no_prompt() -> None:
    """Samples of one prompt stay together, also across subsets, and each subset is halved."""
    samples = [*made("a", 20), *made("b", 20), *made("c", 5, "the same"), *made("d", 4, "the same")]
    train, held_out = halves(samples, seed=3)

    assert not {sample.prompt for sample in train} & {sample.prompt for sample in held_out}
    assert {name: sizes(train)[name] for name in "ab"} == {"a": 10, "b": 10}
    assert sorted(train + held_out, key=samples.index) == samples


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_of_many_samples_is_made_up_for(seed: int) -> None:
    """Ten samples of one prompt on one side are weighed against ten of other prompts on the other."""
    samples = [*made("a", 10), *(Sample(f"same/{n}", "a", "the same", ("x",), ("y",)) for n in range(10))]

    assert [len(part) for part in halves(samples, seed)] == [10, 10]


def test_halves_depend_on_the_seed_and_not_on_the_order() -> None:
    """The same samples in another order fall on the same sides; another seed deals anew."""
    samples = made("a", 40)
    train, _ = halves(samples, seed=1)

    assert {sample.id for sample in halves(samples[::-1], seed=1)[0]} == {sample.id for sample in train}
    assert {sample.id for sample in halves(samples, seed=2)[0]} != {sample.id for sample in train}


@given(counts=st.lists(st.integers(0, 15), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_subsets_of_distinct_prompts_are_halved_exactly(counts: list[int], seed: int) -> None:
    """Where no prompt is shared, the parts of a subset differ by its odd one at most."""
    samples = [sample for n, count in enumerate(counts) for sample in made(f"s{n}", count)]
    parts = [sizes(part) for part in halves(samples, seed)]

    assert all(abs(parts[0].get(f"s{n}", 0) - parts[1].get(f"s{n}", 0)) <= 1 for n in range(len(counts)))


@needs_data
def test_halves_of_rewardbench_are_balanced() -> None:
    """The real data, with AlpacaEval's prompts in three subsets and HumanEval's in six, splits to within two."""
    train, held_out = (sizes(part) for part in halves(load_rewardbench(DATA / "rewardbench_dev.jsonl"), seed=0))

    assert all(abs(train[name] - held_out[name]) <= 2 for name in train)


@pytest.mark.parametrize(
    "other",
    [
        Sample("b", "s", "p", ("x",), ("y",)),
        Sample("a", "t", "p", ("x",), ("y",)),
        Sample("a", "s", "q", ("x",), ("y",)),
        Sample("a", "s", "p", ("x", "y"), ()),
        Sample("a", "s", (Message(role="user", content="p"),), ("x",), ("y",)),
    ],
)
def test_the_digest_covers_everything_judged(other: Sample) -> None:
    """Any other id, subset, prompt or answer is another set of samples; another order is not."""
    sample, last = Sample("a", "s", "p", ("x",), ("y",)), Sample("z", "s", "p", ("x",), ("y",))

    assert digest([sample, last]) == digest([last, sample])
    assert digest([sample]) != digest([other])
    assert len(digest([])) == 64

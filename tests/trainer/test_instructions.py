"""Instructions are read from any format, deduplicated, categorised by the judge if needed, and chosen by seed."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client import Judge
from client.data.tables import DataError
from client.labels.records import Score, ScoreError
from tests.support.live import live_service
from trainer.errors import StageError
from trainer.instructions.categories import DESCRIPTIONS, EXAMPLES, classify, question_template
from trainer.instructions.reading import read_instructions
from trainer.instructions.selection import (
    CATEGORIES_FILE,
    INSTRUCTION_OUTPUTS,
    InstructionOptions,
    choose_instructions,
    equal_shares,
    prepare_instructions,
)
from trainer.labels.labelers import JudgeOptions
from trainer.run.files import read_records
from trainer.run.records import HELD_OUT_FILE, INSTRUCTIONS_FILE, Instruction

DATA = Path(__file__).parents[2] / "../shared/data/instructions.jsonl"


def jsonl(path: Path, *rows: Mapping[str, Any] | str) -> Path:
    """A file of these rows; strings are written as they are."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prompts(source: Path | str, **options: bool) -> list[str]:
    """The prompts read from `source`."""
    return [given.instruction.prompt for given in read_instructions(str(source), **options).instructions]


def many(sizes: Mapping[str, int]) -> list[Instruction]:
    """This many instructions of each category."""
    return [
        Instruction(id=f"{category}{n}", prompt=f"{category} {n}", category=category)
        for category, size in sizes.items()
        for n in range(size)
    ]


def sizes_of(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many of each category."""
    return dict(Counter(instruction.category for instruction in instructions))


def options(limit: int | None, held_out: int, **more: Any) -> InstructionOptions:
    """Options for `choose_instructions`."""
    return InstructionOptions("some.jsonl", limit, held_out, **more)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": " Why? "}, " Why? "),
        ({"prompt": "Why?", "messages": []}, "Why?"),
        ({"instruction": "Add.", "input": "2 and 2"}, "Add.\n\n2 and 2"),
        ({"instruction": "Add.", "input": "", "context": "2 and 2"}, "Add.\n\n2 and 2"),
        ({"instruction": "Add.", "input": None}, "Add."),
        ({"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}]}, "A?"),
        (
            {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}]},
            "Be brief.\n\nA?",
        ),
    ],
)
def test_known_columns(tmp_path: Path, fields: dict[str, Any], prompt: str) -> None:
    """Prompts, instructions with an input, and conversations all become the text that the policy is asked."""
    assert prompts(jsonl(tmp_path / "a.jsonl", fields)) == [prompt]


def test_every_kind_of_file_reads_the_same(tmp_path: Path) -> None:
    """JSON lines, compressed or not, JSON, CSV and Parquet."""
    rows = [{"id": f"{n}", "prompt": f"Question {n}?", "category": "math"} for n in range(3)]
    plain = jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "category"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    first = read_instructions(str(plain)).instructions
    assert [given.instruction.model_dump() for given in first] == rows
    for name in ("a.jsonl.gz", "a.json", "a.csv", "a.parquet"):
        assert read_instructions(str(tmp_path / name)).instructions == first


def test_a_data_set_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hub:NAME@SPLIT reads that split, which is required for a data set with several."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", {"instruction": "A?"}, {"instruction": "B?"})
    jsonl(folder / "test.jsonl", {"instruction": "C?"})

    assert prompts(f"hub:{folder}@train") == ["A?", "B?"]
    with pytest.raises(DataError, match=r"several splits.*@SPLIT, one of"):
        prompts(f"hub:{folder}")
    with pytest.raises(DataError, match="cannot be loaded from the hub"):
        prompts(f"hub:{tmp_path / 'missing'}")


BAD = [
    ("{", r"line 2: broken JSON"),
    ("[]", r"line 2: not a JSON object"),
    ({"prompt": "  "}, r"line 2: the prompt is empty"),
    ({"prompt": None}, r"line 2: the prompt is empty"),
    ({"instruction": "", "input": "2"}, r"line 2: the prompt is empty"),
    ({"text": "A?"}, r"line 2: none of the columns prompt, instruction and messages; there are text"),
    ({"prompt": 7}, r"line 2: prompt is not a text or a list of messages"),
    ({"messages": "A?"}, r"line 2: messages is not a list of messages"),
    ({"messages": [{"role": "assistant", "content": "B"}]}, r"line 2: the conversation begins with .*assistant"),
    ({"messages": [{"role": "system", "content": "B"}]}, r"line 2: no message of the user"),
    ({"messages": [{"content": None}]}, r"line 2: a message has no text"),
    ({"prompt": "A?", "category": 3}, r"line 2: category must be a text"),
    ({"prompt": "A?", "id": 1.5}, r"line 2: id must be"),
    ({"prompt": "A?", "id": "first"}, r"line 2: id first is already that of .*line 1"),
    ('{"prompt": "\\ud800"}', r"line 2: the prompt is not Unicode"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, row: dict[str, Any] | str, message: str) -> None:
    """An empty or broken line is an error that names it; with --skip-bad it is counted and the others are read."""
    file = jsonl(tmp_path / "a.jsonl", {"id": "first", "prompt": "Why?"}, row, {"prompt": "How?"})

    with pytest.raises(DataError, match=message + ".*--skip-bad"):
        read_instructions(str(file))
    read = read_instructions(str(file), skip_bad=True)
    assert (read.records, read.bad, len(read.problems)) == (3, 1, 1)
    assert [given.instruction.prompt for given in read.instructions] == ["Why?", "How?"]


def test_a_file_of_bad_lines_is_an_error(tmp_path: Path) -> None:
    """If nothing usable is left, the error names the first problem."""
    with pytest.raises(DataError, match=r"no usable instructions; the first problem: .*the prompt is empty"):
        read_instructions(str(jsonl(tmp_path / "a.jsonl", {"prompt": ""})), skip_bad=True)


def test_repeated_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    """A prompt that equals an earlier one up to white space is dropped, whatever its id."""
    file = jsonl(tmp_path / "a.jsonl", {"id": 1, "prompt": "Why so?"}, {"id": 2, "prompt": " Why\n so? "})
    read = read_instructions(str(file))

    assert (read.records, read.duplicates, len(read.instructions)) == (2, 1, 1)


def test_derived_ids_do_not_depend_on_the_order(tmp_path: Path) -> None:
    """Without an id, a prompt gets the same id in every file."""
    one = read_instructions(str(jsonl(tmp_path / "a.jsonl", {"prompt": "A?"}, {"prompt": "B?"}))).instructions
    other = read_instructions(str(jsonl(tmp_path / "b.jsonl", {"prompt": "B?"}, {"prompt": "A?"}))).instructions

    assert one == other[::-1]


def test_choice_is_stratified_seeded_and_disjoint() -> None:
    """Categories keep their shares, a seed always gives the same choice, and nothing held out is trained on."""
    pool = many({"math": 60, "code": 30, "chat": 10})
    chosen, held_out = choose_instructions(pool, options(40, 20))

    assert sizes_of(chosen) == {"math": 24, "code": 12, "chat": 4}
    assert sizes_of(held_out) == {"math": 12, "code": 6, "chat": 2}
    assert not {one.id for one in chosen} & {one.id for one in held_out}
    assert choose_instructions(pool, options(40, 20)) == (chosen, held_out)
    assert choose_instructions(pool, options(40, 20, seed=1)) != (chosen, held_out)


def test_the_held_out_part_does_not_depend_on_the_limit() -> None:
    """Runs of different sizes are evaluated on the same instructions."""
    pool = many({"math": 60, "code": 30})

    assert choose_instructions(pool, options(10, 20))[1] == choose_instructions(pool, options(None, 20))[1]


def test_a_balanced_choice_takes_equal_parts() -> None:
    """If a category is too small, the others make up for it."""
    chosen, _ = choose_instructions(many({"math": 60, "code": 30, "chat": 4}), options(30, 0, balanced=True))

    assert sizes_of(chosen) == {"math": 13, "code": 13, "chat": 4}
    assert equal_shares(5, {"b": 9, "a": 9}) == {"a": 3, "b": 2}


def test_too_few_instructions_are_an_error() -> None:
    """The error says how many there are and how many are wanted."""
    with pytest.raises(DataError, match="10 usable instructions, and 12 are wanted, 4 of them held out"):
        choose_instructions(many({"math": 10}), options(8, 4))


def test_given_categories_need_no_judge(tmp_path: Path) -> None:
    """The files are written, with statistics that add up, and a category's case does not matter."""
    file = jsonl(tmp_path / "in.jsonl", *({"prompt": f"{n}?", "category": "Math"} for n in range(9)), {"prompt": ""})
    stats = prepare_instructions(InstructionOptions(str(file), 4, 2, skip_bad=True), tmp_path)

    assert (stats.records, stats.bad, stats.by_category) == (10, 1, {"math": 9})
    assert (stats.chosen, stats.held_out, stats.categorised) == ({"math": 4}, {"math": 2}, 0)
    assert len(read_records(tmp_path / INSTRUCTIONS_FILE, Instruction)) == 4
    assert all((tmp_path / name).exists() for name in INSTRUCTION_OUTPUTS)


def test_missing_categories_need_a_judge(tmp_path: Path) -> None:
    """Without a judge the error says what to give; nothing is guessed."""
    file = jsonl(tmp_path / "in.jsonl", {"prompt": "Why?"})

    with pytest.raises(StageError, match=r"1 instructions have no category.*--judge-url"):
        prepare_instructions(InstructionOptions(str(file)), tmp_path)


def test_the_judge_chooses_missing_categories(tmp_path: Path) -> None:
    """It is asked one question per category, and only about instructions without one."""
    rows = [{"prompt": f"Question {n}?"} for n in range(6)]
    file = jsonl(tmp_path / "in.jsonl", *rows, {"prompt": "Given", "category": "code"})
    with live_service() as live, Judge(live.url) as judge:
        stats = prepare_instructions(InstructionOptions(str(file), judge=JudgeOptions(live.url)), tmp_path)
        asked = judge.score("Question 0?", DESCRIPTIONS["math"], template=question_template("chat")).log_odds

    scores = read_records(tmp_path / CATEGORIES_FILE, Score)
    first = read_records(tmp_path / INSTRUCTIONS_FILE, Instruction)[0]
    assert (stats.categorised, stats.uncategorised, sum(stats.by_category.values())) == (6, 0, 7)
    assert len(scores) == 4 * (6 + sum(map(len, EXAMPLES.values())))
    assert {score.key: score.log_odds for score in scores}[first.id, 1] == asked


def test_an_interrupted_categorisation_resumes(tmp_path: Path) -> None:
    """Answered questions are not asked again, and the choice is that of an undisturbed run."""
    file = jsonl(tmp_path / "in.jsonl", *({"prompt": f"Question {n}?"} for n in range(20)))
    with live_service(cache_entries=0) as live:
        how = InstructionOptions(str(file), 8, 4, judge=JudgeOptions(live.url))
        prepare_instructions(how, tmp_path / "whole")
        (tmp_path / "parts").mkdir()
        whole = (tmp_path / "whole" / CATEGORIES_FILE).read_bytes()
        (tmp_path / "parts" / CATEGORIES_FILE).write_bytes(whole[: len(whole) // 2])
        first: list[int] = []
        prepare_instructions(how, tmp_path / "parts", lambda progress: first.append(progress.done))

    assert first[0] == whole[: len(whole) // 2].count(b"\n")
    for name in INSTRUCTION_OUTPUTS:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_only_a_pool_is_asked_about(tmp_path: Path) -> None:
    """Of many uncategorised instructions the judge sees four times as many as are wanted."""
    file = jsonl(tmp_path / "in.jsonl", *({"prompt": f"Question {n}?"} for n in range(50)))
    with live_service() as live:
        how = InstructionOptions(str(file), 4, 2, judge=JudgeOptions(live.url))
        stats = prepare_instructions(how, tmp_path)

    assert (stats.categorised, stats.passed_over) == (24, 26)
    assert len(read_records(tmp_path / HELD_OUT_FILE, Instruction)) == 2


def answers(instructions: Sequence[Instruction], log_odds: Mapping[str, Sequence[float]]) -> list[Score]:
    """Scores in which each category's examples get a yes to their own question, and the instructions `log_odds`."""
    # A yes to the first question is ten times as strong as the others'.
    strengths = [50.0, 5.0, 5.0, 5.0]
    of_category = {
        name: [strength * (name == asked) for strength, asked in zip(strengths, DESCRIPTIONS, strict=True)]
        for name in EXAMPLES
    }
    by_id = {f"<example {name} {n}>": of_category[name] for name in EXAMPLES for n in range(len(EXAMPLES[name]))}
    by_id |= {instruction.id: list(log_odds[instruction.id]) for instruction in instructions}
    return [
        Score(id=name, sample=index, log_odds=value, score=0.5)
        for name, values in by_id.items()
        for index, value in enumerate(values)
    ]


def test_the_category_is_that_of_the_nearest_examples() -> None:
    """Answers like those about a category's examples give that category, answers without a yes `general`."""
    asked = [Instruction(id=name, prompt=name) for name in ("a", "b", "c")]
    code, math, *_ = DESCRIPTIONS
    scores = answers(asked, {"a": [40, 1, 0, 0], "b": [30, 5, 0, 0], "c": [10, 1, 1, 0]})

    assert classify(asked, scores).by_id == {"a": code, "b": math, "c": "general"}


def test_a_failed_question_leaves_no_category() -> None:
    """A failed question is counted, and no category is guessed; a failed example stops everything."""
    asked = [Instruction(id=name, prompt=name) for name in ("a", "b")]
    scores = answers(asked, {"a": [4, 0, 0, 0], "b": [4, 0, 0, 0]})
    broken = Score(id="b", sample=2, error=ScoreError(code="bad_label", message="m"))
    result = classify(asked, [broken if score.key == ("b", 2) else score for score in scores])

    assert (list(result.by_id), result.failures) == (["a"], {"bad_label": 1})
    with pytest.raises(StageError, match="about an example"):
        classify(asked, scores[1:])


@pytest.mark.skipif(not DATA.exists(), reason="the project's data folder is not here")
def test_the_projects_instructions_are_read_completely() -> None:
    """All 2,010, in five categories, none of them bad."""
    read = read_instructions(str(DATA))

    assert len(read.instructions) + read.duplicates == read.records == 2010
    assert all(given.categorised for given in read.instructions)

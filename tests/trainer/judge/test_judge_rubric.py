"""--from-rubric: from a TOML file and good answers to labels that are said to be synthetic, and to a judge."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from client.data.tables import DataError
from tests.trainer.judge.makers import TOY_FLAGS, toy_file
from tests.trainer.judge.test_judge_contrasts import LONG, PYTHON
from trainer.errors import InputError
from trainer.tune_judge import main
from trainer.tuning.judge.rubric import Rubric, read_rubric, rubric_labels

ONE = '[[contrast]]\nkind = "cut_off"\n'


def rubric(folder: Path, text: str, rows: Sequence[dict[str, Any]] = ()) -> Path:
    """A rubric beside its data, answers.jsonl."""
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "rubric.toml"
    file.write_text(text)
    return file


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    """Good answers in prose."""
    return [{"prompt": f"How does bread {n} rise?", "response": LONG, "category": "chat", **more} for n in range(count)]


def labels(file: Path) -> dict[str, Any]:
    """The labels that a rubric makes, by id."""
    made, _ = rubric_labels(read_rubric(file), "category", 1)
    return {label.id: label for label in made}


def test_data_of_all_contrasts_and_of_one(tmp_path: Path) -> None:
    """A contrast takes its own data where it names some; paths are beside the rubric; rows say response or chosen."""
    code = [{"id": "sum", "prompt": "Write it.", "chosen": PYTHON, "rejected": "x"}]
    (tmp_path / "code.json").write_text(json.dumps(code))
    text = f'data = "answers.jsonl"\n{ONE}[[contrast]]\nkind = "broken_code"\ndata = "code.json"\neach = 3\n'

    made = labels(rubric(tmp_path, text, rows(4)))

    assert {label.kind for label in made.values()} == {"cut_off", "broken_code"}
    assert [label.prompt for label in made.values() if label.kind == "broken_code"] == ["Write it."] * 3
    assert {label.category for label in made.values()} == {"chat", None}


def test_bad_answers_and_blank_ones_are_not_used(tmp_path: Path) -> None:
    """A row whose label says no, in words or as a probability, is no good answer."""
    data = [
        *rows(1, label="no"),
        *rows(1, label=0.3),
        *rows(1, label="0.00"),
        {"prompt": "Why?", "response": LONG, "label": 1},
        {"prompt": " ", "response": LONG},
    ]

    assert [label.prompt for label in labels(rubric(tmp_path, f'data = "answers.jsonl"\n{ONE}', data)).values()] == [
        "Why?"
    ]


@pytest.mark.parametrize("more", ['harmful = ["safety"]\n', ""])
def test_harmful_by_category_or_by_column(tmp_path: Path, more: str) -> None:
    """Either way the refusal is the better answer."""
    data = rows(2, harmful="true") if not more else [{**row, "category": "safety"} for row in rows(2)]
    text = f'data = "answers.jsonl"\n{more}[[contrast]]\nkind = "refusal"\n'

    assert all(label.answers[1] == LONG for label in labels(rubric(tmp_path, text, data)).values())


def test_files_with_the_same_ids(tmp_path: Path) -> None:
    """Labels of several files have different ids."""
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "Which?", "response": LONG}) + "\n")

    made = labels(rubric(tmp_path, f'data = ["answers.jsonl", "more.jsonl"]\n{ONE}', rows(1)))

    assert sorted(made) == ["cut_off/1", "cut_off/1#2"]


def test_contrasts_of_a_kind_with_rows_numbered_alike(tmp_path: Path) -> None:
    """None is lost for its number; a label that two of them make is one label."""
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "Which?", "response": LONG}) + "\n")
    text = f'data = "answers.jsonl"\n{ONE}{ONE}{ONE}data = "more.jsonl"\n'

    made = labels(rubric(tmp_path, text, rows(2)))

    assert {name: label.prompt for name, label in made.items()} == {
        "cut_off/1": "How does bread 0 rise?",
        "cut_off/2": "How does bread 1 rise?",
        "cut_off/1#2": "Which?",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "contrast: Field required"),
        ("contrast = []", "contrast: "),
        ("[[contrast]", "not TOML"),
        ('[[contrast]]\nkind = "spelling"\n', r"contrast\.0\.kind: Input should be 'other_request'"),
        (f'data = "answers.jsonl"\n{ONE}count = 0\n', r"contrast\.0\.count"),
        (f'data = "answers.jsonl"\n{ONE}often = 1\n', r"contrast\.0\.often: Extra inputs"),
        (f'data = "answers.jsonl"\n{ONE}count = {10**32}\n', r"contrast\.0\.count"),
        (f'data = "answers.jsonl"\n{ONE}each = true\n', r"contrast\.0\.each"),
        (f"harmful = {'[' * 5000}\n", "nested too deeply"),
        (f"harmful = {'9' * 5000}\n", "not TOML"),
        (f'data = "~nobody-here/a.jsonl"\n{ONE}', "is no path of a file"),
        (f'data = "a\\u0000b"\n{ONE}', "there is no such file|is no path of a file"),
        (ONE, r"contrast 1 \(cut_off\) has no data"),
        (f'data = "missing.jsonl"\n{ONE}', r"missing\.jsonl: there is no such file"),
    ],
)
def test_rubrics_that_cannot_be_used(tmp_path: Path, text: str, problem: str) -> None:
    """Each is refused with the file and the field at fault."""
    with pytest.raises(InputError, match=problem):
        read_rubric(rubric(tmp_path, text))


@pytest.mark.parametrize(
    ("kind", "data", "problem"),
    [
        ("broken_code", rows(3), "nothing can be made of 3 answers: none has code"),
        ("broken_number", rows(3), "none is a solution that calculates"),
        ("refusal", rows(2, response="I'm sorry, but no."), "all of them refuse"),
        ("other_request", rows(2), "no answer to another, similar request"),
        ("cut_off", rows(1, response=" "), "has no good answers"),
        ("cut_off", [], "holds no samples"),
        ("cut_off", [{"prompt": "Why?"}], "line 1: neither response nor chosen"),
    ],
)
def test_answers_of_which_nothing_can_be_made(
    tmp_path: Path, kind: str, data: Sequence[dict[str, Any]], problem: str
) -> None:
    """A contrast that cannot be made once is an error that says what the answers lack."""
    file = rubric(tmp_path, f'data = "answers.jsonl"\n[[contrast]]\nkind = "{kind}"\n', data)

    with pytest.raises(ValueError, match=problem):
        labels(file)


def test_fewer_than_asked_for_are_told(tmp_path: Path) -> None:
    """A contrast that falls short is used, and said to fall short."""
    file = rubric(tmp_path, f'data = "answers.jsonl"\n{ONE}count = 9\n', rows(4))

    made, notes = rubric_labels(read_rubric(file), "category", 1)

    assert len(made) == 4
    assert notes == ["cut_off: 4 of 9 could be made of 4 answers"]


def test_a_rubric_is_data_only() -> None:
    """Its sources are listed, so that a run can tell whether one has changed."""
    made = Rubric.model_validate({"data": ["a.jsonl", "hub:x/y"], "contrast": [{"kind": "cut_off"}]})

    assert made.sources(made.contrast[0]) == ("a.jsonl", "hub:x/y")


TWO = 'data = "answers.jsonl"\n[[contrast]]\nkind = "cut_off"\n[[contrast]]\nkind = "repeated"\ncount = 30\n'


def test_a_judge_from_a_rubric_and_given_labels(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels, evidence, report, card and the program's output say how many labels are synthetic, by kind."""
    file, pairs, output = rubric(tmp_path, TWO, rows(40)), toy_file(tmp_path / "pairs.jsonl", 20), tmp_path / "run"
    flags = ["--model", str(tiny_model), "--pairs", str(pairs), "--from-rubric", str(file), "--held-out", "0.5"]
    flags += ["--output", str(output), *TOY_FLAGS, "--epochs", "1"]

    assert main([*flags, "--dry-run"]) == 0
    said = "synthetic: 70 of them were made, and given by nobody: cut_off 40, repeated 30"
    assert said in capsys.readouterr().out
    assert main(flags) == 0
    assert main(flags) == 0

    err = capsys.readouterr().err
    assert said in err
    assert re.search(r"accuracy on \d+ labels held out \(\d+ synthetic\)", err)
    assert json.loads((output / "labels.json").read_text())["synthetic"] == {"cut_off": 40, "repeated": 30}
    by_kind = json.loads((output / "evidence.json").read_text())["after"]["by_kind"]
    assert set(by_kind) == {"cut_off", "given", "repeated"}
    assert "Synthetic: 70 of these labels were made" in (output / "report.html").read_text()
    assert "| synthetic.cut_off | 40 |" in (output / "merged" / "README.md").read_text()


def test_other_answers_are_another_run(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run belongs to the rubric and to the data that it names; without labels of any kind there is none."""
    file, output = rubric(tmp_path, TWO, rows(12)), tmp_path / "run"
    flags = ["--model", str(tiny_model), "--output", str(output), *TOY_FLAGS, "--epochs", "1"]
    assert main([*flags, "--from-rubric", str(file)]) == 0
    rubric(tmp_path, TWO, rows(13))

    assert main([*flags, "--from-rubric", str(file)]) == 1
    assert "another configuration (other labels: rubric)" in capsys.readouterr().err
    assert main(flags) == 2
    assert "give --pairs, or --from-rubric" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["perhaps", "nan", 2])
def test_a_label_that_says_neither_is_refused(label: object, tmp_path: Path) -> None:
    """With its row, rather than taken for a good answer."""
    with pytest.raises(DataError, match="neither yes, no nor a number"):
        labels(rubric(tmp_path, f'data = "answers.jsonl"\n{ONE}', rows(1, label=label)))

"""--teacher-url: a service's judge labels the data; interrupted anywhere, the same labels in the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from client import stats
from client.bulk import BulkOptions
from client.runs.progress import Progress
from tests.support.live import Live, live_service
from tests.trainer.judge.makers import TOY_FLAGS, Reports, same_adapter, toy_file, toy_labels
from trainer import judge_stages
from trainer.errors import InputError, StageError
from trainer.labels.labelers import JudgeOptions
from trainer.tune_judge import main
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.teacher import TeacherLine, TeacherOptions, ask_teacher, summarize, taught
from trainer.tuning.judge.unlabelled import read_questions


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    """A teacher with the fake engine."""
    with live_service() as live:
        yield live


def options(live: Live, **more: Any) -> TeacherOptions:
    """The teacher at this service."""
    return TeacherOptions(JudgeOptions(live.url, flag="--teacher-url"), **more)


def ask(live: Live, labels: Sequence[Label], path: Path, **more: Any) -> list[TeacherLine]:
    """Its answers."""
    return ask_teacher(options(live, **more), labels, path)


def test_pairs_and_single_answers(service: Live, tmp_path: Path) -> None:
    """A pair's margin is the difference of the log-odds that /score gives, a single answer's its log-odds."""
    pair, other = toy_labels(2)
    single = other.model_copy(update={"answers": other.answers[:1]})

    lines = ask(service, [pair, single], tmp_path / "teacher.jsonl")

    bodies = [{"prompt": pair.prompt, "response": answer, "category": "math"} for answer in pair.answers]
    first, second = (service.http.post("/score", json=body).json() for body in bodies)
    assert lines[0].margin == pytest.approx(first["log_odds"] - second["log_odds"])
    assert lines[1].margin is not None
    assert [line.judgements for line in lines] == [2, 1]
    assert [len(line.label_mass) for line in lines] == [2, 1]
    assert all(line.prompt_tokens > 0 and line.template == first["template"] for line in lines)


def test_a_labels_own_template_is_the_teachers_too(service: Live, tmp_path: Path) -> None:
    """Beside labels of the same category without one, and one that the options name wins over both."""
    plain, other = toy_labels(2)
    own = other.model_copy(update={"template": "general@1"})

    lines = ask(service, [plain, own], tmp_path / "teacher.jsonl")
    fixed = ask(service, [plain, own], tmp_path / "fixed.jsonl", template="safety@2")

    assert plain.category == own.category
    assert [line.template for line in lines] == ["math@2", "general@1"]
    assert [line.template for line in fixed] == ["safety@2", "safety@2"]


def test_a_panels_templates_are_counted(service: Live, tmp_path: Path) -> None:
    """Two answers by two templates are four judgements."""
    [line] = ask(service, toy_labels(1), tmp_path / "teacher.jsonl", template="general@3,math@2")

    assert line.judgements == 4


def test_a_pairwise_judge_compares(tmp_path: Path) -> None:
    """Its own log-odds are the margin; it cannot say whether one answer is good."""
    pair = toy_labels(1)[0]
    with live_service(judge="pairwise") as live:
        [line] = ask(live, [pair], tmp_path / "teacher.jsonl")
        body = {"prompt": pair.prompt, "responses": pair.answers, "category": "math"}
        won = live.http.post("/compare", json=body).json()["win_probability"][0][1]
        single = pair.model_copy(update={"answers": pair.answers[:1]})
        with pytest.raises(InputError, match="compares two answers"):
            ask(live, [single], tmp_path / "other.jsonl")

    assert line.margin is not None
    assert stats.sigmoid(line.margin) == pytest.approx(won)


def test_what_is_known_is_not_asked_again(service: Live, tmp_path: Path) -> None:
    """Ctrl-C after some answers: they are in the file, and the next pass asks for the others; both give the same."""
    labels, path = toy_labels(40), tmp_path / "teacher.jsonl"
    whole = ask(service, labels, tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        ask_teacher(options(service), labels, path, Reports(KeyboardInterrupt(), at=10))
    known = len(path.read_text().splitlines())

    reports = Reports()
    lines = ask_teacher(options(service), labels, path, reports)

    assert 0 < known == reports.known < 40
    assert [(line.id, line.margin) for line in lines] == [(line.id, line.margin) for line in whole]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [label.id for label in labels]


def test_a_teacher_that_goes_away(tmp_path: Path) -> None:
    """Its answers so far stay, and the error says what to do; another judge in its place is refused."""
    labels, path = toy_labels(200), tmp_path / "teacher.jsonl"
    with live_service() as live:

        def leave(progress: Progress) -> None:
            if progress.done >= 32:
                live.server.should_exit = True

        bulk = BulkOptions(batch_items=4, max_in_flight=1, patience=0)
        gone = TeacherOptions(JudgeOptions(live.url, bulk=bulk))
        with pytest.raises(StageError, match="Its answers so far are kept"):
            ask_teacher(gone, labels, path, leave)
    known = path.read_text()
    path.write_text(re.sub(r'"fingerprint":"[^"]*"', '"fingerprint":"another"', known))
    with live_service() as live, pytest.raises(StageError, match="the judge changed in mid-run"):
        ask(live, labels, path)

    assert 32 <= len(known.splitlines()) < 200


def test_failures_are_counted_and_never_labels(service: Live, tmp_path: Path) -> None:
    """An answer that is too long for the teacher has an error in place of a margin; too many of them stop the run."""
    long = Label(id="long", prompt="What?", answers=("word " * 60_000, "no"))
    labels = [*toy_labels(3), long]

    with pytest.raises(StageError, match="1 of 4 samples could not be judged"):
        ask(service, labels, tmp_path / "few.jsonl")
    lines = ask(service, labels, tmp_path / "many.jsonl", max_failures=0.5)

    summary = summarize(labels, lines)
    assert lines[3].margin is None
    assert sum(summary.failed.values()) == 1
    assert (summary.labels, summary.answered, summary.judgements) == (4, 3, 6)
    assert [label.id for label in taught(labels, {line.id: line for line in lines}, 1.0)] == ["0", "1", "2"]


def line(name: str, margin: float | None) -> TeacherLine:
    """An answer."""
    return TeacherLine(id=name, margin=margin, label_mass=(0.9, 0.8), judgements=2, prompt_tokens=10, seconds=0.5)


def test_targets_are_soft_and_mixed_by_weight() -> None:
    """Weight 1 takes the teacher's probability, 0.5 the mean with the given label; open questions take it."""
    given, other = toy_labels(2)
    lines = {"0": line("0", -1.0), "1": line("1", None)}
    open_ = given.model_copy(update={"target": 0.5})

    assert taught([given], lines, 1.0)[0].target == pytest.approx(stats.sigmoid(-1.0))
    assert taught([given], lines, 0.5)[0].target == pytest.approx((1 + stats.sigmoid(-1.0)) / 2)
    assert taught([open_], lines, 0.5)[0].target == pytest.approx(stats.sigmoid(-1.0))
    assert taught([other], lines, 1.0) == []
    assert taught([other], lines, 0.5) == [other]


def test_agreement_and_cost_are_summed() -> None:
    """Agreement is over the labels that were given; a tie counts half."""
    labels = [*toy_labels(3), toy_labels(4)[3].model_copy(update={"target": 0.5})]
    lines = [line("0", 1.0), line("1", -1.0), line("2", 0.0), line("3", 2.0)]

    summary = summarize(labels, lines)

    assert summary.agreement is not None
    assert (summary.agreement.value, summary.agreement.count) == (0.5, 3)
    assert summary.agreement_by["math"].count == 3
    assert (summary.judgements, summary.prompt_tokens, summary.seconds) == (8, 40, 2.0)
    assert summary.label_mass == pytest.approx(0.85)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_data_without_labels(tmp_path: Path) -> None:
    """Each response is compared with the next; a lone one is asked about by itself; labels that are there stay."""
    rows = [
        {"id": "many", "prompt": "A?", "responses": ["x", "y", "y", "z"], "category": "code"},
        {"id": "two", "prompt": "B?", "responses": ["x", "y"]},
        {"id": "again", "prompt": "B?", "responses": ["y", "x"]},
        {"id": "one", "prompt": "C?", "response": "x"},
        {"id": "given", "prompt": "D?", "chosen": "x", "rejected": "y"},
    ]

    labels, left_out = read_questions(str(write_rows(tmp_path / "data.jsonl", rows)))

    assert {label.id: label.answers for label in labels if not label.is_decided} == {
        "many#1": ("x", "y"),
        "many#3": ("y", "z"),
        "two": ("x", "y"),
        "one": ("x",),
    }
    assert [label.id for label in labels if label.is_decided] == ["given"]
    assert left_out == {"equal answers": 1, "duplicates": 1}


def test_names_are_read_as_those_of_labelled_rows(tmp_path: Path) -> None:
    """A number is a name, 0 too; an empty cell is none."""
    names = [{"category": 0, "template": "math@1"}, {"category": "", "template": None}]
    rows = [{"prompt": f"{number}?", "response": "x", **one} for number, one in enumerate(names)]

    labels, _ = read_questions(str(write_rows(tmp_path / "data.jsonl", rows)))
    labelled, _ = read_questions(str(write_rows(tmp_path / "labelled.jsonl", [{**row, "label": 1} for row in rows])))

    assert [(label.category, label.template) for label in labels] == [("0", "math@1"), (None, None)]
    assert [(label.category, label.template) for label in labelled] == [("0", "math@1"), (None, None)]


def test_a_row_without_responses_is_an_error(tmp_path: Path) -> None:
    """An empty list is named with its line."""
    with pytest.raises(ValueError, match="line 1: responses is an empty list"):
        read_questions(str(write_rows(tmp_path / "data.jsonl", [{"prompt": "A?", "responses": []}])))


def flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """The command line of a small run, half of whose labels are held out."""
    where = ["--model", str(model), "--pairs", str(data), "--output", str(output), "--held-out", "0.5"]
    return [*where, *TOY_FLAGS, "--epochs", "1", "--teacher-patience", "1", *more]


def targets(folder: Path, file: str) -> list[float]:
    """The targets of a file of labels."""
    return [json.loads(line)["target"] for line in (folder / file).read_text().splitlines()]


def test_a_judge_taught_by_another(
    service: Live, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training labels are the teacher's, those held out stay; agreement and cost are told; a rerun needs no teacher."""
    data, output = toy_file(tmp_path / "pairs.jsonl", 40), tmp_path / "run"
    command = flags(tiny_model, data, output, "--teacher-url")

    assert main([*command, service.url, "--dry-run"]) == 0
    assert "teacher: asked about 40 labels" in capsys.readouterr().out
    assert main([*command, service.url]) == 0
    assert re.search(r"40 of 40 labels answered, agrees with .*80 judgements", capsys.readouterr().err)
    asked = service.value("judge_requests_total")
    assert main([*command, service.url]) == 0
    assert main([*command, "http://127.0.0.1:9"]) == 0

    assert service.value("judge_requests_total") == asked
    assert "All of its answers are here" in capsys.readouterr().err
    assert all(0 < target < 1 for target in targets(output, "train.jsonl"))
    assert set(targets(output, "held_out.jsonl")) == {1.0}
    summary = json.loads((output / "teacher.json").read_text())
    assert summary["agreement"]["count"] == 40
    assert "<h2>Teacher</h2>" in (output / "report.html").read_text()
    assert "teacher" in (output / "merged" / "README.md").read_text()


def test_interrupted_at_the_teacher_the_result_is_the_same(
    service: Live, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while or after it answers: 130, and the next run has the labels and weights of a run without it."""
    rows = [{"prompt": f"Question {n}", "responses": [f"Paris is {n}", f"fox {n} dog"]} for n in range(30)]
    data = write_rows(tmp_path / "open.jsonl", rows)
    whole = flags(tiny_model, data, tmp_path / "whole", "--teacher-url", service.url)
    cut = flags(tiny_model, data, tmp_path / "cut", "--teacher-url", service.url)

    def interrupted(teacher: TeacherOptions, labels: Sequence[Label], path: Path, _: object) -> None:
        ask_teacher(teacher, labels, path, Reports(KeyboardInterrupt(), at=8))

    assert main(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(judge_stages, "ask_teacher", interrupted)
        assert main(cut) == 130
    assert main(cut) == 0

    assert same_adapter(tmp_path / "cut", tmp_path / "whole")
    for file in ("train.jsonl", "held_out.jsonl", "labels.json", "evidence.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert all(0 < target < 1 for target in targets(tmp_path / "whole", "held_out.jsonl"))


def test_a_teacher_that_cannot_be_used(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody at the address, a weight that is none, data without labels and no teacher: each in plain words."""
    data = toy_file(tmp_path / "pairs.jsonl", 20)
    open_ = write_rows(tmp_path / "open.jsonl", [{"prompt": "A?", "responses": ["x", "y"]}])

    assert main(flags(tiny_model, data, tmp_path / "run", "--teacher-url", "http://127.0.0.1:9")) == 1
    assert "or give another --teacher-url" in capsys.readouterr().err
    assert main(flags(tiny_model, data, tmp_path / "a", "--teacher-url", "http://x", "--teacher-weight", "0")) == 2
    assert "--teacher-weight must be above 0" in capsys.readouterr().err
    assert main(flags(tiny_model, open_, tmp_path / "b")) == 2
    assert "neither chosen and rejected" in capsys.readouterr().err

"""The judge's reliability: what the numbers mean, and the loop's stage that measures them and leaves pairs out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from client.labels.records import Pair, Score
from client.schema import TemplateInfo, TemplatesResult
from tests.support.live import Live
from trainer.errors import StageError
from trainer.labels.measuring import second_templates
from trainer.labels.reliability import Concordance, Reliability, Share, concordance
from trainer.run.files import read_record, read_records
from trainer.self_improve import main


def json_of(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_bytes())


@pytest.fixture(scope="module")
def measured(loop_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without evaluation that trains on reliable pairs only."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    more = ["--held-out", "0", "--reliable-pairs", "--reliability-pairs", "5"]
    assert main(["--output", str(folder), *loop_flags, *more]) == 0
    return folder


def test_concordance_counts_within_prompts() -> None:
    """Two prompts, whose levels differ: only the order inside each counts for tau, the levels for rho too."""
    found = concordance([[(0.0, 10.0), (1.0, 11.0)], [(5.0, 3.0), (6.0, 2.0), (6.0, 1.0)]])

    assert (found.responses, found.comparisons) == (5, 3)
    assert found.alike == pytest.approx(1 / 3)
    # One pair of equal first numbers: tau-b divides by sqrt(3 * 4).
    assert found.tau == pytest.approx(-1 / 12**0.5)
    assert found.rho == pytest.approx(-8.5 / 95**0.5)  # ranks 1, 2, 3, 4.5, 4.5 against 4, 5, 3, 2, 1


def test_concordance_of_unrelated_numbers_is_near_chance() -> None:
    """Half of the comparisons alike, tau and rho about 0; and nothing to say of nothing."""
    draw = random.Random(1)
    found = concordance([[(draw.random(), draw.random()) for _ in range(4)] for _ in range(400)])

    assert found.alike == pytest.approx(0.5, abs=0.03)
    assert found.tau == pytest.approx(0, abs=0.06)
    assert concordance([]) == Concordance(responses=0, comparisons=0, alike=None, tau=None, rho=None)


def template(name: str, version: int, mode: Any = "pointwise") -> TemplateInfo:
    """A template of a service."""
    return TemplateInfo(name=name, version=version, mode=mode, format="chat", layout="{response}", instruction="Good?")


OFFERED = TemplatesResult(
    templates=[
        *(template("chat", 1), template("chat", 2), template("math", 1), template("general", 1)),
        template("pairwise-chat", 1, "pairwise"),
    ],
    categories=["chat", "math", "general"],
)


def test_the_second_wording_is_another_template_of_the_category() -> None:
    """Another version of the same template, else general's; none where there is no other."""
    firsts = {"chat": "chat@1", "math": "math@1", "general": "general@1"}

    assert second_templates(firsts, OFFERED) == {"chat": "chat@2", "math": "general@1"}
    assert second_templates(firsts, OFFERED, "math") == dict.fromkeys(firsts, "math@1")
    with pytest.raises(StageError, match=r"the service has no code, only chat@1, chat@2, math@1, general@1"):
        second_templates(firsts, OFFERED, "code")


def reliability(agreeing: int, flips: int = 0, both_orders: int = 80) -> Reliability:
    """Of 100 pairs, so many on which a second wording agrees, or both orders together, and so many that flip."""
    nothing = concordance([])
    return Reliability.model_validate(
        {
            "labeler": "ipo",
            "pairs": 100,
            "orders": {
                "failed": 0,
                "flips": Share.among(flips, 100),
                "agrees": Share.among(both_orders, 100),
                "first_log_odds": 0.0,
            },
            "wording": {
                "templates": {"chat": "chat@2"},
                "failed": 0,
                "agrees": Share.among(agreeing, 100),
                "scores": nothing,
                "label_mass": None,
            },
            "length": nothing,
            "label_mass": None,
        }
    )


@pytest.mark.parametrize(
    ("agreeing", "both_orders", "said"),
    [
        (
            80,
            80,
            "chance would; the judge, shown both responses in both orders, prefers the chosen responses more often",
        ),
        (80, 50, "no more often than chance would. Only one of the two shows that these labels are more than chance"),
        (80, 20, "prefers the rejected responses. The judge contradicts itself: expect little of these labels"),
        (55, 55, "no more often than chance would: nothing here shows that these labels are better than random ones"),
        (20, 50, "Another wording of the question prefers the rejected responses; the judge, shown both"),
    ],
)
def test_the_conclusion_is_what_the_intervals_allow(agreeing: int, both_orders: int, said: str) -> None:
    """Another wording and both orders are told from chance by their 95% intervals, and have to agree."""
    found = reliability(agreeing, both_orders=both_orders).sentences[0]

    assert said in found
    assert ("contradicts" in found) == ({agreeing, both_orders} == {80, 20})
    assert ("nothing here" in found) == (80 not in (agreeing, both_orders))


def test_order_that_decides_is_said() -> None:
    """A preference that mostly follows the order of the responses is no preference."""
    assert any("decides more pairs than their contents" in line for line in reliability(80, flips=88).sentences)
    assert not any("decides more" in line for line in reliability(80, flips=50).sentences)


def test_the_run_measures_its_judge_before_it_trains(measured: Path) -> None:
    """Both orders of so many pairs, and every sample under another template of its category."""
    part = measured / "round-1"
    found = read_record(part / "reliability.json", Reliability)
    reworded = read_records(part / "reworded.jsonl", Score)
    scored = read_records(part / "scores.jsonl", Score)

    assert found.pairs == 5
    assert found.orders is not None
    assert found.wording is not None
    assert found.orders.flips.of == found.orders.agrees.of == found.wording.agrees.of == 5
    assert found.wording.templates == {"chat": "chat@1", "math": "math@1"}
    assert [score.key for score in reworded] == [score.key for score in scored]
    assert {score.template for score in reworded} == {"chat@1", "math@1"}
    assert found.length.responses == 15
    assert found.label_mass is not None


def test_unreliable_pairs_are_left_out_and_counted(measured: Path) -> None:
    """Both wordings prefer the chosen response of every pair that is left."""
    part = measured / "round-1"
    stats = json_of(part / "pairs_stats.json")
    second = {score.key: score.log_odds or 0.0 for score in read_records(part / "reworded.jsonl", Score)}
    texts = {(row["id"], row["response"]): (row["id"], row["sample"]) for row in json_lines(part / "samples.jsonl")}
    margins = [
        second[texts[pair.id, pair.chosen[0].content]] - second[texts[pair.id, pair.rejected[0].content]]
        for pair in read_records(part / "pairs.jsonl", Pair)
    ]

    assert stats["pairs"] == len(margins)
    assert stats["unreliable"] > 0
    assert stats["pairs"] + stats["unreliable"] == stats["instructions"]
    assert min(margins) > 0


def json_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_measurement_that_was_killed_asks_for_the_rest(
    measured: Path, loop_flags: list[str], loop_judge: Live
) -> None:
    """Of the second wording's answers only the missing ones, of the orders none that is known."""
    part = measured / "round-1"
    whole = {name: (part / name).read_bytes() for name in ("reworded.jsonl", "reliability.json")}
    (part / "reliability.done").rename(part / "reliability.begun")
    (part / "reliability.json").unlink()
    (part / "reworded.jsonl").write_bytes(b"".join(whole["reworded.jsonl"].splitlines(keepends=True)[:-3]) + b'{"id"')
    before = loop_judge.value("judge_judgements_total")
    more = ["--held-out", "0", "--reliable-pairs", "--reliability-pairs", "5"]
    code = main(["--output", str(measured), *loop_flags, *more])

    assert code == 0
    assert loop_judge.value("judge_judgements_total") - before == 3
    assert {name: (part / name).read_bytes() for name in whole} == whole


def test_labels_from_a_file_need_no_judge(
    measured: Path, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An oracle: a program scores another run's samples, and the pairs follow them; a missing score is a failure."""
    prompts = {row["id"]: row["prompt"] for row in json_lines(measured / "instructions.jsonl")}
    rows: dict[str, list[str]] = {}
    for sample in json_lines(measured / "round-1" / "samples.jsonl"):
        rows.setdefault(prompts[sample["id"]], []).append(sample["response"])
    file = tmp_path / "oracle.jsonl"
    labels = [{"prompt": name, "responses": own, "scores": [len(text) for text in own]} for name, own in rows.items()]
    file.write_text("".join(json.dumps(label) + "\n" for label in labels))
    command = [*loop_flags, "--held-out", "0", "--samples-from", str(measured), "--labels-from", str(file)]
    code = main([*command, "--output", str(tmp_path / "run"), "--judge-url", "http://127.0.0.1:9"])
    file.write_text("".join(json.dumps(label) + "\n" for label in labels[1:]))
    refused = main([*command, "--output", str(tmp_path / "other")])

    pairs = read_records(tmp_path / "run" / "round-1" / "pairs.jsonl", Pair)
    found = read_record(tmp_path / "run" / "round-1" / "reliability.json", Reliability)
    assert (code, refused) == (0, 1)
    assert all(len(pair.chosen[0].content) > len(pair.rejected[0].content) for pair in pairs)
    assert (found.labeler, found.orders, found.wording, found.length.alike) == ("file", None, None, 1.0)
    assert "no score for this response" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "responses": ["a", "b"], "scores": [1]}', "2 responses with 1 scores"),
        ('{"prompt": "p", "responses": ["a"], "scores": [NaN]}', "finite"),
        ('{"prompt": "p", "responses": ["a", "a"], "scores": [1, 2]}', "one response has two scores"),
        ("", "holds no labels"),
    ],
)
def test_a_file_of_labels_that_cannot_be_used_is_usage(
    line: str, message: str, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With file, line and reason, before anything is sampled."""
    file = tmp_path / "labels.jsonl"
    file.write_text(line + "\n" if line else "")

    assert main(["--output", str(tmp_path / "run"), *loop_flags, "--labels-from", str(file)]) == 2
    assert message in capsys.readouterr().err

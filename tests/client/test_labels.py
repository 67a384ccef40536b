"""`python -m client label`: every response scored, pairs that training reads, and nothing asked twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from client import CompareRequest, Judge, ScoreRequest
from client.__main__ import main as client_main
from client.labels.candidates import CandidatePair, ScoredSample
from client.labels.pairs import RankLimits, within_limits
from client.labels.reading import Response
from service.engine.fake import FakeEngine
from tests.support.html import EVIL, Page
from tests.support.live import Live, live_service, wait_for


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests."""
    with live_service() as service:
        yield service


def sets(count: int, each: int = 3) -> list[dict[str, Any]]:
    """Prompts with so many responses each."""
    return [{"prompt": f"Question {n}?", "responses": [f"Answer {n} {k}" for k in range(each)]} for n in range(count)]


def preference(count: int) -> list[dict[str, Any]]:
    """Pairs that are labelled already."""
    return [{"prompt": f"Question {n}?", "chosen": f"Good {n}", "rejected": f"Bad {n}"} for n in range(count)]


def write(folder: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    """The rows as JSON lines; a text is a line as it is."""
    file = folder / "data.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def label(url: str, folder: Path, rows: Sequence[dict[str, Any] | str], *flags: str) -> int:
    """Label the rows into `folder`/out; the exit code."""
    data, out = write(folder, rows), folder / "out"
    return client_main(["label", "--data", str(data), "--judge-url", url, "--out", str(out), *flags])


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file that was written."""
    return [json.loads(line) for line in (folder / "out" / name).read_text("utf-8").splitlines()]


def stats(folder: Path) -> dict[str, Any]:
    """stats.json."""
    found: dict[str, Any] = json.loads((folder / "out" / "stats.json").read_text())
    return found


def texts(pair: dict[str, Any]) -> tuple[str, str]:
    """The chosen and the rejected response."""
    return pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]


def asked(live: Live) -> float:
    """How many judgements the service has given so far."""
    return live.value("judge_judgements_total")


def test_every_response_has_a_score_and_the_best_meets_the_worst(live: Live, tmp_path: Path) -> None:
    """Scores are the service's own, by the column `category`; other columns are carried into the pairs."""
    rows = [{**row, "category": "code", "note": {"n": n}} for n, row in enumerate(sets(4))]
    assert label(live.url, tmp_path, rows) == 0
    with Judge(live.url) as judge:
        wanted = [judge.score("Question 2?", f"Answer 2 {k}", category="code").log_odds for k in range(3)]
    pair = lines(tmp_path, "pairs.jsonl")[2]

    assert [line["log_odds"] for line in lines(tmp_path, "scores.jsonl")[6:9]] == wanted
    best, worst = wanted.index(max(wanted)), wanted.index(min(wanted))
    assert texts(pair) == (f"Answer 2 {best}", f"Answer 2 {worst}")
    assert pair["margin"] == max(wanted) - min(wanted)
    assert (pair["id"], pair["category"], pair["note"]) == ("3", "code", {"n": 2})


# What the libraries warn about while they train is not tested here.
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_the_pairs_as_they_are(live: Live, tmp_path: Path, tiny_model: Path) -> None:
    """`datasets` loads the file and DPOTrainer prepares it and makes a step, whatever the data's other columns."""
    rows = [{**row, "messages": [], "label": n, "note": "n"} for n, row in enumerate(sets(4))]
    assert label(live.url, tmp_path, rows) == 0
    data = load_dataset("json", data_files=str(tmp_path / "out" / "pairs.jsonl"), split="train")
    settings = DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=1,
        per_device_train_batch_size=2,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )

    assert trainer.train().global_step == 1
    assert len(trainer.train_dataset) == 4


def test_formats_hold_the_same_pairs(live: Live, tmp_path: Path) -> None:
    """Parquet the conversations, `plain` the texts; a rerun renews files of the other formats too."""
    rows = [{**row, "note": None if n % 2 else f"n{n}"} for n, row in enumerate(sets(4))]
    codes = [label(live.url, tmp_path, rows, "--format", "parquet", "--format", "plain")]
    codes.append(label(live.url, tmp_path, rows, "--format", "trl", "--top", "3"))
    trl = lines(tmp_path, "pairs.jsonl")
    parquet = load_dataset("parquet", data_files=str(tmp_path / "out" / "pairs.parquet"), split="train").to_list()
    plain = lines(tmp_path, "pairs-plain.jsonl")

    assert codes == [0, 0]
    assert parquet == trl
    assert [(pair["chosen"], pair["rejected"]) for pair in plain] == [texts(pair) for pair in trl]
    assert plain[0]["prompt"] == "Question 0?"


def test_a_rerun_asks_what_is_missing(live: Live, tmp_path: Path) -> None:
    """After a kill in the middle of a line the file ends up the same, byte for byte."""
    assert label(live.url, tmp_path, sets(6)) == 0
    file = tmp_path / "out" / "scores.jsonl"
    whole, before = file.read_bytes(), asked(live)
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]) + b'{"id": "3", "sam')

    assert label(live.url, tmp_path, sets(6)) == 0
    assert file.read_bytes() == whole
    assert asked(live) <= before + 11


def test_a_labelling_killed_by_the_system_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """SIGKILL while answers come in, then the same command: every file as without the kill."""
    with live_service(FakeEngine(delay=0.05), max_batch_items=2) as slow:
        assert label(slow.url, tmp_path, sets(30)) == 0
        whole = {name: (tmp_path / "out" / name).read_bytes() for name in ("scores.jsonl", "pairs.jsonl", "stats.json")}
        killed = tmp_path / "killed"
        command = ["--data", str(tmp_path / "data.jsonl"), "--judge-url", slow.url, "--out", str(killed)]
        process = subprocess.Popen([sys.executable, "-m", "client", "label", *command], cwd=Path(__file__).parents[2])
        assert wait_for(lambda: (killed / "scores.jsonl").exists() and (killed / "scores.jsonl").stat().st_size > 0, 60)
        process.kill()
        ended = process.wait()
        begun = len((killed / "scores.jsonl").read_bytes().splitlines())
        again = client_main(["label", *command])

    assert (ended, again) == (-signal.SIGKILL, 0)
    assert 0 < begun < 90
    assert {name: (killed / name).read_bytes() for name in whole} == whole


def test_a_data_set_is_labelled_by_name(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """hub:NAME@SPLIT, here a folder: the rows of that split."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sets(count)))
    out = tmp_path / "out"
    code = client_main(["label", "--data", f"hub:{folder}@test", "--judge-url", live.url, "--out", str(out)])

    assert code == 0
    assert [pair["prompt"][0]["content"] for pair in lines(tmp_path, "pairs.jsonl")] == ["Question 0?", "Question 1?"]


def test_other_pairs_of_the_same_scores_ask_nothing(live: Live, tmp_path: Path) -> None:
    """--min-margin and --top are not part of what a folder was begun with."""
    assert label(live.url, tmp_path, sets(6)) == 0
    before = asked(live)
    code = label(live.url, tmp_path, sets(6), "--top", "2", "--bottom", "2", "--min-margin", "0.5")
    pairs = lines(tmp_path, "pairs.jsonl")

    assert (code, asked(live)) == (0, before)
    assert len(pairs) > stats(tmp_path)["paired"]
    assert min(pair["margin"] for pair in pairs) >= 0.5


def test_ranks_decide_who_is_paired() -> None:
    """Each of the best with each of the worst that ranks lower."""
    scored = [ScoredSample(Response("p", n, f"r{n}"), float(-n), 0.5) for n in range(4)]
    candidates = sorted(
        (CandidatePair(one, other) for one in scored for other in scored if one.log_odds > other.log_odds),
        key=lambda pair: -pair.margin,
    )
    found = [
        {(pair.chosen.sample.sample, pair.rejected.sample.sample) for pair in within_limits(candidates, limits)}
        for limits in (RankLimits(), RankLimits(bottom=2), RankLimits(top=2), RankLimits(3, 3))
    ]

    assert found[:3] == [{(0, 3)}, {(0, 3), (0, 2)}, {(0, 3), (1, 3)}]
    assert found[3] == {(0, 3), (0, 2), (0, 1), (1, 3), (1, 2), (2, 3)}


def test_unequal_single_repeated_and_empty_responses_are_counted(live: Live, tmp_path: Path) -> None:
    """None of them ends the run, and none becomes a score or half a pair."""
    rows = [
        *sets(1, each=5),
        {"prompt": "one", "responses": ["x"]},
        {"prompt": "same", "responses": ["x", "x ", "x"]},
        {"prompt": "empty", "responses": ["x", "", None, " "]},
        {"prompt": "none", "responses": []},
    ]
    assert label(live.url, tmp_path, rows) == 0
    found = stats(tmp_path)

    assert (found["prompts"], found["without_responses"], found["responses"], found["scored"]) == (5, 1, 13, 10)
    assert found["failures"] == {"empty_response": 3}
    assert {name: found["pairs"][name] for name in ("pairs", "too_few", "empty", "duplicates")} == {
        "pairs": 1,
        "too_few": 3,
        "empty": 3,
        "duplicates": 2,
    }


def test_a_failure_is_no_score(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt that cannot be judged is listed with its code; too many end the run with exit code 1."""
    rows = [*sets(3), {"prompt": " ", "responses": ["a", "b"]}]
    refused = label(live.url, tmp_path, rows)
    said = capsys.readouterr().err
    allowed = label(live.url, tmp_path, rows, "--max-failures", "0.5")

    assert (refused, allowed) == (1, 0)
    assert "--max-failures" in said
    assert [line["error"]["code"] for line in lines(tmp_path, "scores.jsonl")[-2:]] == ["empty_prompt"] * 2
    assert stats(tmp_path)["pairs"]["failures"] == {"empty_prompt": 2}


def test_given_labels_are_held_against_the_judge(live: Live, tmp_path: Path) -> None:
    """Chosen and rejected are labelled anew; what the judge turns round is listed and counted."""
    rows = [{**row, "score_chosen": 7, "chosen_cut_off": True} for row in preference(12)]
    assert label(live.url, tmp_path, rows) == 0
    agreement, flips, pairs = (
        stats(tmp_path)["agreement"],
        lines(tmp_path, "flips.jsonl"),
        lines(tmp_path, "pairs.jsonl"),
    )
    turned = [pair["id"] for pair in pairs if texts(pair)[0].startswith("Bad")]

    assert [flip["id"] for flip in flips] == turned
    assert turned
    assert agreement["agreed"] + len(turned) == agreement["compared"] == 12
    assert agreement["low"] < agreement["share"] == agreement["agreed"] / 12 < agreement["high"]
    assert {(pair["given_score_chosen"], pair["given_chosen_cut_off"]) for pair in pairs} == {(7, True)}
    assert not any("chosen_cut_off" in pair for pair in pairs)


def test_conversations_are_prompts(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several turns stay several turns; a format that has room for one text refuses them before anything is asked."""
    turns = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"))]
    rows = [{"prompt": turns, "responses": ["4", [{"role": "assistant", "content": "5"}]]}]
    before = asked(live)
    refused = label(live.url, tmp_path, rows, "--format", "plain")

    assert (refused, asked(live)) == (2, before)
    assert "conversation" in capsys.readouterr().err
    assert label(live.url, tmp_path, rows) == 0
    assert lines(tmp_path, "pairs.jsonl")[0]["prompt"] == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "responses": ["b"', "line 3: broken JSON"),
        ({"prompt": "a"}, "no column responses"),
        ({"prompt": "a", "responses": "b"}, "not a list"),
        ({"prompt": "a", "responses": 3}, "not a list"),
        ({"prompt": "a", "responses": ["b", 3]}, "responses is a number"),
        ({"prompt": None, "responses": ["b", "c"]}, "prompt is null"),
        ({"prompt": "a", "responses": ["b", "c"], "id": "1"}, "two rows have the id 1"),
        ({"prompt": "a", "responses": ["b", "c"], "category": 3}, "category is 3"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_or_counted(
    row: dict[str, Any] | str, message: str, live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 before anything is asked; with --skip-bad the others are labelled."""
    rows = [*sets(2), row]

    assert label(live.url, tmp_path, rows) == 2
    assert message in capsys.readouterr().err
    assert label(live.url, tmp_path, rows, "--skip-bad") == 0
    assert (stats(tmp_path)["bad_rows"], stats(tmp_path)["prompts"]) == (1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top", "0"], "at least one response"),
        (["--min-margin", "-1"], "minimum margin"),
        (["--length-balance", "--top", "2"], "leave --top"),
        (["--limit", "0"], "limit of 0"),
        (["--category", "nope"], "no category nope"),
        (["--category-column", "nope"], "no column nope"),
        (["--max-failures", "2"], "--max-failures"),
    ],
)
def test_flags_that_cannot_work_are_usage(
    flags: list[str], message: str, live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, with the reason."""
    assert label(live.url, tmp_path, sets(2), *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("judge", "flags", "message"),
    [("pairwise", [], "--judge yes-no"), ("reward-model", ["--template", "general"], "leave --template")],
)
def test_a_judge_that_cannot_do_it_is_refused(
    judge: str, flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that compares gives no scores of single responses; one without templates is given none."""
    with live_service(judge=judge) as service:
        assert label(service.url, tmp_path, sets(2), *flags) == 2

    assert message in capsys.readouterr().err


def test_other_data_are_another_run(live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of two data sets never mix in a folder."""
    assert label(live.url, tmp_path, sets(2)) == 0
    assert label(live.url, tmp_path, sets(3)) == 1
    assert "another configuration (other data_digest" in capsys.readouterr().err


def test_no_pairs_is_an_error_that_counts_the_reasons(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores stay, and no pairs of an earlier run."""
    assert label(live.url, tmp_path, sets(3)) == 0
    assert label(live.url, tmp_path, sets(3), "--min-margin", "1000") == 1
    assert "3 below the minimum margin" in capsys.readouterr().err
    assert (len(lines(tmp_path, "scores.jsonl")), lines(tmp_path, "pairs.jsonl")) == (9, [])


def test_balanced_pairs_are_equally_long(live: Live, tmp_path: Path) -> None:
    """Where best against worst favours a length, other pairs even it out."""
    rows = [{"prompt": f"{n}", "responses": [f"{n} {'x' * 40 * k}" for k in range(4)]} for n in range(30)]
    codes = [label(live.url, tmp_path, rows)]
    plain = stats(tmp_path)["pairs"]["length_difference"]
    codes.append(label(live.url, tmp_path, rows, "--length-balance"))

    assert codes == [0, 0]
    assert abs(stats(tmp_path)["pairs"]["length_difference"]) <= abs(plain)


def test_texts_cannot_break_out_of_the_report(live: Live, tmp_path: Path) -> None:
    """The page shows them as text, half a surrogate pair in a column included."""
    rows = [*preference(6), {"prompt": EVIL, "chosen": EVIL, "rejected": f"{EVIL} no", "id": EVIL, "c": "\ud800"}]
    assert label(live.url, tmp_path, rows) == 0
    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))

    assert (page.of("script"), page.of("img"), page.open) == ([], [], [])
    assert lines(tmp_path, "pairs.jsonl")[-1]["c"] == "\ud800"


def test_requests_are_imported_with_the_client(live: Live) -> None:
    """`score_many` and its kind take them."""
    with Judge(live.url) as judge:
        scores = judge.score_many([ScoreRequest(prompt="p", response=f"r{n}") for n in range(3)])
        (ranked,) = judge.compare_many([CompareRequest(prompt="p", responses=["a", "b"])])

    assert [type(score).__name__ for score in scores] == ["ScoreResult"] * 3
    assert type(ranked).__name__ == "CompareResult"

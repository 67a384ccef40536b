"""Two models through the whole evaluation, with a service that has no model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Judge
from service.engine.fake import FakeEngine, fake_tokenizer
from tests.support.live import Live, live_service
from tests.support.tiny import make_tiny_model
from tests.support.training import with_nan
from trainer.evaluate import main
from trainer.policy.sampling import Sampled
from trainer.run.files import read_records
from trainer.run.records import Instruction

SMALL = ["--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def judge() -> Iterator[Live]:
    """A service with the fake engine."""
    with live_service(cache_entries=0) as live:
        yield live


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def command(tiny_model: Path, other_model: Path, judge: Live, tmp_path: Path) -> list[str]:
    """The tiny model against the other one on eight instructions, in tmp_path/out."""
    file = tmp_path / "held_out.jsonl"
    rows = [Instruction(id=f"{n}", prompt=f"What is {n}?", category=("chat", "poems")[n % 2]) for n in range(8)]
    file.write_text("".join(one.model_dump_json() + "\n" for one in rows))
    models = ["--base", str(tiny_model), "--new", str(other_model)]
    where = ["--instructions", str(file), "--out", str(tmp_path / "out"), "--judge-url", judge.url]
    return [*models, *where, *SMALL]


def metrics_of(folder: Path) -> Any:
    """The metrics in the run's folder."""
    return json.loads((folder / "metrics.json").read_bytes())


def by_id(samples: list[Sampled]) -> list[Sampled]:
    """In the order of the ids."""
    return sorted(samples, key=lambda sample: sample.id)


def judgements(live: Live) -> float:
    """How many judgements the service has given so far."""
    return live.value("judge_judgements_total")


def test_the_win_rate_is_what_the_judge_says(command: list[str], judge: Live, tmp_path: Path) -> None:
    """Each comparison is the service's own, in both orders, with the category's template if there is one."""
    out = tmp_path / "out"

    assert main(command) == 0

    base, new = (read_records(out / f"{side}.jsonl", Sampled) for side in ("base", "new"))
    with Judge(judge.url) as client:
        best = [
            client.compare(
                instruction.prompt,
                [first.response, second.response],
                mode="pairwise",
                category={"poems": "general"}.get(instruction.category, instruction.category),
            ).best
            for instruction, first, second in zip(
                read_records(tmp_path / "held_out.jsonl", Instruction), by_id(base), by_id(new), strict=True
            )
        ]
    assert metrics_of(out)["pairwise"]["wins"] == sum(best)
    assert metrics_of(out)["instructions"] == metrics_of(out)["compared"] == 8


def test_a_finished_evaluation_asks_nothing_more(command: list[str], judge: Live, tmp_path: Path) -> None:
    """Two judgements for each comparison and mode, once; only lost verdicts are asked for again."""
    before = judgements(judge)
    codes = [main(command), main(command)]
    first = judgements(judge) - before
    items = tmp_path / "out" / "pairwise" / "items.jsonl"
    items.write_bytes(b"".join(items.read_bytes().splitlines(keepends=True)[:5]))
    (tmp_path / "out" / "verdicts.done").rename(tmp_path / "out" / "verdicts.begun")
    again = main(command)

    assert [*codes, again] == [0, 0, 0]
    assert first == 8 * 4
    assert judgements(judge) - before - first == 3 * 2


def test_a_model_against_itself_has_no_win_rate(
    command: list[str], tiny_model: Path, judge: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights and random numbers give the same answers: no judge is asked, and the summary says why."""
    before = judgements(judge)
    same = Path(shutil.copytree(tiny_model, tmp_path / "same"))

    code = main([*command, "--new", str(same)])

    metrics = metrics_of(tmp_path / "out")
    assert code == 0
    assert judgements(judge) == before
    assert (metrics["pairwise"], metrics["identical"], metrics["same_weights"]) == (None, 8, True)
    assert "has the weights of" in capsys.readouterr().err


def test_a_model_with_nan_weights_is_not_evaluated(
    command: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The evaluation stops at the first token: exit code 1, and no metrics."""
    code = main([*command, "--new", str(with_nan(tiny_model, tmp_path / "nan", "model.norm.weight"))])

    assert code == 1
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_another_judge_may_evaluate(command: list[str], tmp_path: Path) -> None:
    """--eval-judge-url is asked instead of --judge-url."""
    with live_service() as other:
        code = main([*command, "--judge-url", "http://127.0.0.1:9", "--eval-judge-url", other.url])

    assert code == 0
    assert metrics_of(tmp_path / "out")["judge"]["model"] == "fake"


def test_failed_comparisons_are_counted_and_limited(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above --max-failures the evaluation stops; below, they are left out and counted."""
    poison = fake_tokenizer().encode("5")[0]
    with live_service(FakeEngine(poison_token=poison)) as broken:
        strict = main([*command, "--judge-url", broken.url])
        lenient = main([*command, "--judge-url", broken.url, "--max-failures", "0.9"])

    metrics = metrics_of(tmp_path / "out")
    assert (strict, lenient) == (1, 0)
    assert "--max-failures" in capsys.readouterr().err
    assert 1 <= metrics["failed"] < 8
    assert metrics["compared"] == 8 - metrics["failed"]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--lm-eval", "all"], 2, "pip install 'lm_eval"),
        (["--new", "nowhere"], 2, "neither a folder here nor a hub id"),
        (["--judge-url", "http://127.0.0.1:9"], 1, "the judge at http://127.0.0.1:9 cannot be used"),
    ],
)
def test_impossible_evaluations_stop_before_anything_is_sampled(
    more: list[str], code: int, message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing harness, an unknown model, an unreachable judge."""
    assert main([*command, *more]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_evaluation_in_the_folder_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the settings that differ."""
    codes = [main(command), main([*command, "--temperature", "0"])]

    assert codes == [0, 1]
    assert "another configuration (other temperature)" in capsys.readouterr().err

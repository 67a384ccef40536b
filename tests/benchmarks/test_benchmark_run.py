"""Samples to rows: nothing asked twice, nothing lost, nothing made up."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from client import AsyncJudge, Judge
from client.benchmarks.questions import Plan, Question
from client.benchmarks.rows import ITEMS_FILE, Row
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.bulk import BulkOptions
from client.data.samples import Sample
from client.runs.config import judge_identity
from client.runs.progress import Progress
from client.runs.resumable import JudgeChangedError, RunError
from client.runtime.jsonl import appending
from client.schema import InlineTemplate
from service.engine.fake import FakeEngine
from tests.support.fake_judge import SCORE
from tests.support.live import Live, live_service

PLAN: Plan = {"a": Question(category="chat"), "b": Question(category="code")}
ASKING = Asking(PLAN, bulk=BulkOptions(batch_items=4, patience=5), max_failures=1.0)


def samples(count: int, *, sides: int = 1) -> list[Sample]:
    """`count` samples of two subsets, with `sides` answers on each side."""
    return [
        Sample(
            id=f"{n}",
            subset="ab"[n % 2],
            prompt=f"Question {n}?",
            chosen=tuple(f"Right {n} {i}" for i in range(sides)),
            rejected=tuple(f"Wrong {n} {i}" for i in range(sides)),
        )
        for n in range(count)
    ]


def config_of(url: str, asking: Asking = ASKING) -> dict[str, object]:
    """The configuration of a run against the service at `url`."""
    with Judge(url) as judge:
        return {"samples": "some", **asking.described(), "judge": judge_identity(judge.models().data[0])}


def run(
    url: str,
    folder: Path,
    wanted: Sequence[Sample],
    asking: Asking = ASKING,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Judge `wanted` into `folder` with the service at `url`."""

    async def judged() -> list[Row]:
        async with AsyncJudge(url) as judge:
            return await judge_samples(judge, wanted, asking, RunFolder(folder, config_of(url, asking)), on_progress)

    return asyncio.run(judged())


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """The rows without their cost, which differs from run to run."""
    return [row.model_copy(update={"usage": None, "seconds": None}) for row in rows]


def judgements(live: Live) -> float:
    """How many judgements the service has been asked for."""
    return sum(
        sample.value
        for metric in live.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "judge_judgements_total"
    )


def test_rows_hold_what_the_judge_says(tmp_path: Path) -> None:
    """Each margin is the difference of the log-odds that /score gives for the same answers."""
    with live_service() as live, Judge(live.url) as judge:
        rows = run(live.url, tmp_path, samples(5))
        good = judge.score("Question 3?", "Right 3 0", category="code").log_odds
        bad = judge.score("Question 3?", "Wrong 3 0", category="code").log_odds

    assert [row.id for row in rows] == ["0", "1", "2", "3", "4"]
    assert rows[3].margins == [[good - bad]]
    assert rows[3].template == "code@2"


def test_rows_say_what_they_cost(tmp_path: Path) -> None:
    """The tokens of all their judgements; their seconds add up to no more than the run took."""
    started = time.monotonic()
    with live_service() as live, Judge(live.url) as judge:
        rows = run(live.url, tmp_path, samples(3))
        asked = [judge.score("Question 2?", text, category="chat").usage for text in ("Right 2 0", "Wrong 2 0")]

    assert rows[2].usage is not None
    assert rows[2].usage.prompt_tokens == sum(usage.prompt_tokens for usage in asked)
    assert 0 < sum(row.seconds or 0.0 for row in rows) < time.monotonic() - started


def test_texts_without_a_grade_are_failures_of_their_samples(tmp_path: Path) -> None:
    """They are counted, have the tokens of the answer that was graded, and are not asked for again."""
    asking = replace(ASKING, plan={"a": Question(), "b": Question()})
    with live_service(FakeEngine(unparseable=0.5), judge="self-reward", self_reward_mode="parsed") as live:
        first = run(live.url, tmp_path, samples(20), asking)
        asked = judgements(live)
        again = run(live.url, tmp_path, samples(20), asking)

        assert judgements(live) == asked
    failed = [row for row in first if row.error is not None]
    assert {row.error.code for row in failed if row.error is not None} == {"unparseable"}
    assert 0 < len(failed) < 20
    assert any(row.usage is not None and row.usage.completion_tokens > 0 for row in failed)
    assert again == first


def test_three_answers_a_side_make_a_table(tmp_path: Path) -> None:
    """margins[i][j] is chosen answer i against rejected answer j."""
    with live_service() as live:
        (row,) = run(live.url, tmp_path, samples(1, sides=3))

    chosen, rejected = row.chosen_answers, row.rejected_answers
    assert row.margins == [[good.log_odds - bad.log_odds for bad in rejected] for good in chosen]
    assert [len(row.margins or []), len(chosen), len(rejected)] == [3, 3, 3]


def test_pairwise_margins_come_from_both_orders(tmp_path: Path) -> None:
    """In pairwise mode a margin is the log-odds that the chosen answer is better, and the order's effect is kept."""
    asking = replace(ASKING, mode="pairwise")
    with live_service() as live, Judge(live.url) as judge:
        (row,) = run(live.url, tmp_path, samples(1), asking)
        asked = judge.compare("Question 0?", ["Right 0 0", "Wrong 0 0"], mode="pairwise", category="chat")

    assert asked.position_bias is not None
    assert row.margins == [[asked.scores[0].log_odds]]
    assert (row.flips, row.first_log_odds) == (asked.position_bias.flips, asked.position_bias.first_log_odds)


def test_an_interrupted_run_goes_on_without_asking_twice(tmp_path: Path) -> None:
    """After a stop in the middle, a rerun asks for the rest alone and ends with the rows of an undisturbed run."""

    def stop_half_way(progress: Progress) -> None:
        if progress.done >= 20:
            raise KeyboardInterrupt

    with live_service(cache_entries=0) as live:
        undisturbed = run(live.url, tmp_path / "whole", samples(40))
        with pytest.raises(KeyboardInterrupt):
            run(live.url, tmp_path / "parts", samples(40), on_progress=stop_half_way)
        known = len((tmp_path / "parts" / ITEMS_FILE).read_text().splitlines())
        first: list[Progress] = []
        resumed = run(
            live.url,
            tmp_path / "parts",
            samples(40),
            on_progress=lambda p: first.append(replace(p)) if not first else None,
        )

    assert verdicts(resumed) == verdicts(undisturbed)
    assert first == [Progress(40, known=known, done=known)]
    assert len((tmp_path / "parts" / ITEMS_FILE).read_text().splitlines()) == 40


def test_a_complete_run_asks_nothing(tmp_path: Path) -> None:
    """A rerun of a finished run leaves its file as it is."""
    with live_service() as live:
        first = run(live.url, tmp_path, samples(6))
        before = (tmp_path / ITEMS_FILE).read_bytes()
        again = run(live.url, tmp_path, samples(6))

    assert again == first
    assert (tmp_path / ITEMS_FILE).read_bytes() == before


def test_a_line_cut_off_by_a_kill_is_judged_again(tmp_path: Path) -> None:
    """Half a last line is dropped, and the file is whole again afterwards."""
    with live_service() as live:
        first = run(live.url, tmp_path, samples(6))
        file = tmp_path / ITEMS_FILE
        file.write_bytes(file.read_bytes()[:-40])
        again = run(live.url, tmp_path, samples(6))

    assert verdicts(again) == verdicts(first)
    assert [json.loads(line)["margins"] for line in file.read_text().splitlines()]


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """Rows of two configurations are never mixed: what differs is named."""
    with live_service() as live:
        run(live.url, tmp_path, samples(2))

        with pytest.raises(RunError, match=r"another configuration.*truncation"):
            run(live.url, tmp_path, samples(2), replace(ASKING, truncation="prompt_left"))


def test_two_processes_cannot_write_the_same_run(tmp_path: Path) -> None:
    """The second one is refused."""
    with live_service() as live:
        run(live.url, tmp_path, samples(1))

        with appending(tmp_path / ITEMS_FILE), pytest.raises(RunError, match="another process"):
            run(live.url, tmp_path, samples(2))


def test_an_empty_response_is_counted_and_never_sent(tmp_path: Path) -> None:
    """It has an error of its own, and its neighbours their verdicts."""
    mixed = [*samples(2), Sample("empty", "a", "Why?", ("Because.",), ("",))]
    with live_service() as live:
        rows = run(live.url, tmp_path, mixed)

    assert rows[2].error is not None
    assert rows[2].error.code == "empty_response"
    assert [row.error for row in rows[:2]] == [None, None]


def test_an_item_over_the_models_length_is_counted_as_such(tmp_path: Path) -> None:
    """With truncation left at `error` it fails with its own code for good, and no other sample fails."""
    mixed = [*samples(2), Sample("long", "a", "Why?", ("Because. " * 200,), ("No.",))]
    with live_service(max_tokens=200) as live:
        rows = run(live.url, tmp_path, mixed)
        again: list[Progress] = []
        run(live.url, tmp_path, mixed, on_progress=lambda progress: again.append(replace(progress)))

    assert rows[2].error is not None
    assert rows[2].error.code == "context_length_exceeded"
    assert again == [Progress(3, known=3, done=3, failed=1)]


def test_a_passing_failure_is_asked_again_by_a_rerun(tmp_path: Path) -> None:
    """A failure of the service may pass; a fault of the sample will not."""
    failed = {"id": "0", "subset": "a", "error": {"code": "inference_failed", "message": "it broke"}}
    with live_service() as live:
        RunFolder(tmp_path, config_of(live.url))
        (tmp_path / ITEMS_FILE).write_text(json.dumps(failed) + "\n")
        rows = run(live.url, tmp_path, samples(2))

    assert [row.error for row in rows] == [None, None]


def test_too_many_failures_end_the_run(tmp_path: Path) -> None:
    """More than the allowed share stops it with the last failure's reason; what was judged stays."""
    broken = [Sample(f"{n}", "a", "Why?", ("",), ("No.",)) for n in range(3)]
    with live_service() as live, pytest.raises(RunError, match=r"3 of 5 samples.*40\.0%.*empty_response"):
        run(live.url, tmp_path, [*broken, *samples(8)[6:]], replace(ASKING, max_failures=0.4))

    assert len((tmp_path / ITEMS_FILE).read_text().splitlines()) == 3


def changing_judge(**change: Any) -> httpx.MockTransport:
    """A service that answers differently from its second batch on."""
    asked = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        score = {**SCORE, "fingerprint": "f1", **(change if asked > 1 else {})}
        count = len(json.loads(request.content)["items"])
        return httpx.Response(200, json={"results": [{"index": n, "result": score} for n in range(count)]})

    return httpx.MockTransport(handle)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "f2"}, {"fingerprint": None, "model": "other"}, {"template": "general@2"}]
)
async def test_a_judge_that_changes_in_mid_run_stops_it(tmp_path: Path, change: dict[str, Any]) -> None:
    """Another model, or another version of a template, is never mixed in; what came before is kept."""
    plan = {"a": Question(category="chat"), "b": Question(category="chat")}
    asking = Asking(plan, bulk=BulkOptions(batch_items=4, max_in_flight=1))
    folder = RunFolder(tmp_path, {**asking.described(), "judge": {"model": "tiny", "fingerprint": "f1"}})

    async with AsyncJudge("http://judge", transport=changing_judge(**change)) as judge:
        with pytest.raises(JudgeChangedError, match="changed in mid-run"):
            await judge_samples(judge, samples(6), asking, folder)

    assert len((tmp_path / ITEMS_FILE).read_text().splitlines()) == 2


def test_a_question_of_ones_own_is_recorded_by_its_name(tmp_path: Path) -> None:
    """The service calls every template sent with a request `inline`; the row says which one it was."""
    template = InlineTemplate(layout="{prompt} {response} Good?")
    asking = Asking(dict.fromkeys("ab", Question(template=template, name="short")))
    with live_service() as live:
        (row,) = run(live.url, tmp_path, samples(1), asking)

    assert row.template == "short"

"""Samples to scores: every text asked once, nothing made up, and what is written is never asked again."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import Judge
from client.bulk import BulkOptions
from client.labels.labelling import Label, Text
from client.labels.records import Score, ScoreError
from client.runs.progress import Progress
from service.engine.fake import FakeEngine, fake_tokenizer
from tests.support.live import Live, live_service
from trainer.errors import StageError
from trainer.labels.labelers import RANDOM_SPREAD, Arm, JudgeOptions, LabelOptions, RandomLabeler
from trainer.labels.labeling import Labelling, describe_labeler, label_samples, run_labelling
from trainer.run.files import read_records
from trainer.run.records import Instruction, Sample

QUICK = BulkOptions(batch_items=4, patience=0.5)


def instructions(count: int) -> list[Instruction]:
    """Instructions of two categories, one of which no service has a template for."""
    return [Instruction(id=f"{n}", prompt=f"Question {n}?", category=("code", "poems")[n % 2]) for n in range(count)]


def samples(count: int, each: int = 2) -> list[Sample]:
    """So many different responses to each of `instructions(count)`."""
    return [
        Sample(id=f"{n}", sample=k, response=f"Answer {n} {k}", tokens=3, finish="stop")
        for n in range(count)
        for k in range(each)
    ]


def ipo(url: str, **options: Any) -> LabelOptions:
    """The ipo arm over this service."""
    return LabelOptions(judge=JudgeOptions(url, bulk=QUICK, start_timeout=5), **options)


def asked(live: Live) -> float:
    """How many judgements the service has given so far."""
    return live.value("judge_judgements_total")


def free_url() -> str:
    """Where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


class Scripted:
    """A labeler whose labels the test gives, text by text; what is no label or error is raised."""

    def __init__(self, *outcomes: Label | ScoreError | BaseException, fingerprint: str = "f") -> None:
        self.model = "m"
        self.fingerprint: str | None = fingerprint
        self.outcomes, self.seen = outcomes, list[Text]()

    def described(self) -> dict[str, object]:
        """See Labeler."""
        return {}

    async def labels(self, texts: Sequence[Text]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
        """See Labeler."""
        for index, text in enumerate(texts):
            outcome = self.outcomes[min(index, len(self.outcomes) - 1)]
            if isinstance(outcome, BaseException):
                raise outcome
            self.seen.append(text)
            yield index, outcome


LABEL = Label(1.0, 0.73, 0.9, "code@1", "m", "f")
BROKEN = ScoreError(code="inference_failed", message="the engine failed")
TOO_LONG = ScoreError(code="context_length_exceeded", message="5000 tokens")


def label(labeler: Any, path: Path, wanted: Sequence[Sample], max_failures: float = 0.0) -> list[Score]:
    """Label the samples into `path`."""
    return asyncio.run(label_samples(labeler, Labelling(instructions(99), wanted, path, max_failures)))


def test_scores_are_what_the_service_says(tmp_path: Path) -> None:
    """Each by the template of its instruction's category; `general` where the service has none for it."""
    file = tmp_path / "scores.jsonl"
    with live_service() as live, Judge(live.url) as judge:
        scores = run_labelling(ipo(live.url), instructions(4), samples(4), file)
        code = judge.score("Question 2?", "Answer 2 1", category="code")
        general = judge.score("Question 3?", "Answer 3 0", category="general")

    assert [score.key for score in scores] == [sample.key for sample in samples(4)]
    assert (scores[5].log_odds, scores[5].template) == (code.log_odds, code.template)
    assert (scores[6].log_odds, scores[6].template) == (general.log_odds, general.template)
    assert (scores[6].label_mass, scores[6].model, scores[6].fingerprint) == (
        general.label_mass,
        general.model,
        general.fingerprint,
    )
    assert read_records(file, Score) == scores


def test_one_template_for_all(tmp_path: Path) -> None:
    """A named template takes the place of the categories'."""
    with live_service() as live:
        scores = run_labelling(ipo(live.url, template="math"), instructions(2), samples(2), tmp_path / "s.jsonl")

    assert {(score.template or "").partition("@")[0] for score in scores} == {"math"}


def test_equal_texts_are_asked_once(tmp_path: Path) -> None:
    """Samples that share prompt and response share the score."""
    same = [Sample(id="0", sample=k, response="The same", tokens=2, finish="stop") for k in range(5)]
    with live_service(cache_entries=0) as live:
        scores = run_labelling(ipo(live.url), instructions(1), same, tmp_path / "s.jsonl")
        count = asked(live)

    assert count == 1
    assert len({score.log_odds for score in scores}) == 1
    assert [score.sample for score in scores] == [0, 1, 2, 3, 4]


def test_an_empty_response_is_never_sent(tmp_path: Path) -> None:
    """It has an error of its own, which is no failure of the judge."""
    wanted = [Sample(id="0", sample=k, response=" \n"[:k], tokens=1, finish="stop") for k in range(3)]
    labeler = Scripted(LABEL)
    scores = label(labeler, tmp_path / "s.jsonl", wanted)

    assert [score.error.code for score in scores if score.error] == ["empty_response"] * 3
    assert not labeler.seen


def test_an_interrupted_stage_asks_for_the_rest_alone(tmp_path: Path) -> None:
    """After a stop in the middle, a rerun ends with the very file of an undisturbed run."""

    def stop_half_way(progress: Progress) -> None:
        if progress.done >= 20:
            raise KeyboardInterrupt

    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    first: list[Progress] = []
    with live_service(cache_entries=0) as live:
        run_labelling(ipo(live.url), instructions(20), samples(20), whole)
        with pytest.raises(KeyboardInterrupt):
            run_labelling(ipo(live.url), instructions(20), samples(20), parts, stop_half_way)
        known = len(parts.read_text().splitlines())
        run_labelling(ipo(live.url), instructions(20), samples(20), parts, lambda p: first.append(replace(p)))

    assert first[0] == Progress(40, known=known, done=known)
    assert parts.read_bytes() == whole.read_bytes()


def test_a_torn_line_is_judged_again(tmp_path: Path) -> None:
    """What a kill left of a last line is dropped, and the file is whole again afterwards."""
    file = tmp_path / "s.jsonl"
    labeler = RandomLabeler(0)
    label(labeler, file, samples(3))
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    label(labeler, file, samples(3))

    assert file.read_bytes() == whole


def test_a_text_that_is_known_from_another_sample_is_not_asked(tmp_path: Path) -> None:
    """A kill between the lines of two equal texts costs no second judgement."""
    file = tmp_path / "s.jsonl"
    same = [Sample(id="0", sample=k, response="Same", tokens=1, finish="stop") for k in range(2)]
    label(Scripted(LABEL), file, same[:1])
    again = Scripted(LABEL)
    scores = label(again, file, same)

    assert not again.seen
    assert scores[0].log_odds == scores[1].log_odds == 1.0


def test_failures_of_the_service_are_asked_again(tmp_path: Path) -> None:
    """On a rerun; a response's own error, such as its length, stands."""
    file = tmp_path / "s.jsonl"
    before = label(Scripted(BROKEN, TOO_LONG, LABEL), file, samples(2), max_failures=0.5)
    again = Scripted(LABEL)
    after = label(again, file, samples(2), max_failures=0.5)

    assert [score.error for score in before] == [BROKEN, TOO_LONG, None, None]
    assert [score.error for score in after] == [None, TOO_LONG, None, None]
    assert [text.response for text in again.seen] == ["Answer 0 0"]


def test_too_many_failures_stop_the_stage(tmp_path: Path) -> None:
    """At once, with the last of them; what was judged before stays, and a rerun stops the same way."""
    file = tmp_path / "s.jsonl"
    for _ in range(2):
        with pytest.raises(StageError, match=r"1 of 6 samples.*10\.0%.*--max-failures.*0/1: context_length_exceeded"):
            label(Scripted(LABEL, TOO_LONG, LABEL), file, samples(3), max_failures=0.1)

    assert len(read_records(file, Score)) == 2


def test_a_poisoned_item_fails_alone(tmp_path: Path) -> None:
    """An engine's failure at one response is that sample's error, with no number."""
    wanted = [*samples(2), Sample(id="0", sample=2, response="nine", tokens=1, finish="stop")]
    poison = fake_tokenizer().encode("nine")[0]
    with live_service(FakeEngine(poison_token=poison)) as live:
        scores = run_labelling(ipo(live.url, max_failures=0.5), instructions(2), wanted, tmp_path / "s.jsonl")

    assert scores[4].error is not None
    assert scores[4].error.code == "inference_failed"
    assert scores[4].log_odds is None
    assert all(score.error is None for score in scores[:4])


def test_no_judge_at_the_start_is_an_error_at_once(tmp_path: Path) -> None:
    """With the address and the reason, and without a password; nothing is written."""
    url = free_url()

    with pytest.raises(StageError, match=rf"the judge at {url} cannot be used: .*connection refused"):
        run_labelling(ipo(url), instructions(1), samples(1), tmp_path / "s.jsonl")
    with pytest.raises(StageError, match=rf"^the judge at {url} "):
        describe_labeler(ipo(url.replace("//", "//me:secret@")))
    assert not (tmp_path / "s.jsonl").exists()


def test_a_silent_judge_is_given_up_within_the_start_timeout() -> None:
    """A port that accepts and never answers does not hold the run for the length of a call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        with pytest.raises(StageError, match=r"no answer to GET /ready within 0\.2 s"):
            describe_labeler(LabelOptions(judge=JudgeOptions(url, start_timeout=0.2)))


def test_a_wrong_key_is_told_at_the_start() -> None:
    """Before anything is labelled."""
    with live_service(api_key=["right"]) as live, pytest.raises(StageError, match=r"cannot be used: 401"):
        describe_labeler(LabelOptions(judge=JudgeOptions(live.url, api_key="wrong")))


def test_a_judge_that_dies_in_the_middle_leaves_a_resumable_stage(tmp_path: Path) -> None:
    """It is waited for; then the error says how to go on, and with the judge back the rest is judged."""
    file = tmp_path / "s.jsonl"
    engine = FakeEngine(delay=0.02)

    with live_service(engine, cache_entries=0) as live:

        def kill(progress: Progress) -> None:
            live.server.should_exit = live.server.force_exit = progress.done >= 8

        with pytest.raises(StageError, match=rf"the judge at {live.url} gives no more answers: .*same command goes on"):
            run_labelling(ipo(live.url), instructions(100), samples(100), file, kill)
    known = len(read_records(file, Score))
    with live_service(cache_entries=0) as live:
        scores = run_labelling(ipo(live.url), instructions(100), samples(100), file)
        count = asked(live)

    assert 8 <= known < 200
    assert count == 200 - known
    assert all(score.error is None for score in scores)


def test_another_model_in_mid_run_stops(tmp_path: Path) -> None:
    """Another fingerprint, or another version of a template, is never mixed in."""
    other = replace(LABEL, fingerprint="g")
    newer = replace(LABEL, template="code@2")

    with pytest.raises(StageError, match=r"judge changed in mid-run: it began as m \(f\), and 0/1 is by m \(g\)"):
        label(Scripted(LABEL, other), tmp_path / "a.jsonl", samples(1))
    with pytest.raises(StageError, match=r"template changed in mid-run: code@1 has become code@2"):
        label(Scripted(LABEL, newer), tmp_path / "b.jsonl", samples(1))
    assert len(read_records(tmp_path / "a.jsonl", Score)) == 1


def test_a_file_of_another_judge_is_refused(tmp_path: Path) -> None:
    """On a rerun with another model behind the URL."""
    label(Scripted(LABEL), tmp_path / "s.jsonl", samples(1))

    with pytest.raises(StageError, match="judge changed"):
        label(Scripted(replace(LABEL, fingerprint="g"), fingerprint="g"), tmp_path / "s.jsonl", samples(2))


def test_random_labels_are_seeded_and_wide(tmp_path: Path) -> None:
    """The same seed gives the same numbers, whatever the order; their mean is near 0."""
    one = run_labelling(LabelOptions("random", seed=1), instructions(99), samples(99, 4), tmp_path / "1.jsonl")
    same = run_labelling(LabelOptions("random", seed=1), instructions(99), samples(99, 4)[::-1], tmp_path / "2.jsonl")
    other = run_labelling(LabelOptions("random", seed=2), instructions(99), samples(99, 4), tmp_path / "3.jsonl")
    numbers = [score.log_odds or 0.0 for score in one]

    assert same[::-1] == one
    assert len(set(numbers)) == 396
    assert numbers != [score.log_odds for score in other]
    assert abs(sum(numbers)) / 396 < 0.75
    assert min(numbers) < -0.9 * RANDOM_SPREAD
    assert max(numbers) > 0.9 * RANDOM_SPREAD
    assert one[0].score == pytest.approx(1 / (1 + math.exp(-numbers[0])))


@pytest.mark.parametrize("arm", ["self-reward", "reward-model"])
def test_an_arm_needs_a_service_of_its_kind(arm: Arm) -> None:
    """Where the service judges otherwise, the error says how to start it."""
    with live_service() as live, pytest.raises(StageError, match=rf"runs yes-no: start it with --judge {arm}"):
        describe_labeler(ipo(live.url, labeler=arm))


def test_an_arm_without_a_judge_is_an_error() -> None:
    """Only the random arm goes without."""
    with pytest.raises(StageError, match="needs a judge: give --judge-url"):
        describe_labeler(LabelOptions())
    assert describe_labeler(LabelOptions("random", seed=3)) == {"labeler": "random", "seed": 3}


def test_what_decides_the_labels_is_described() -> None:
    """The exact model is in the run's configuration, the address is not."""
    with live_service() as live:
        described = describe_labeler(ipo(live.url, truncation="prompt_left"))

    judge = described["judge"]
    assert isinstance(judge, dict)
    assert judge["fingerprint"]
    assert described["truncation"] == "prompt_left"
    assert live.url not in str(described)


def test_a_sample_of_no_instruction_is_an_error(tmp_path: Path) -> None:
    """Files of different runs are not put together."""
    stray = Sample(id="stray", sample=0, response="r", tokens=1, finish="stop")

    with pytest.raises(StageError, match="sample stray/0 belongs to no instruction"):
        label(Scripted(LABEL), tmp_path / "s.jsonl", [stray])

"""One run is one question: a template's text or a judge's setting that has changed stops what would resume it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from client import AsyncJudge, Judge
from client.benchmarks import pairs, search
from client.benchmarks.questions import Question
from client.benchmarks.rows import ITEMS_FILE
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.calibrate.evidence import EvidenceError, from_runs
from client.calibration import CalibrationError
from client.data.samples import Sample
from client.labels.labelling import Label
from client.labels.records import ScoreError
from client.runs.folders import CONFIG_FILE
from client.runs.resumable import JudgeChangedError
from tests.support.live import Live, live_service
from trainer.errors import StageError
from trainer.labels.labelers import JudgeOptions, LabelOptions
from trainer.labels.labeling import Labelling, describe_labeler, label_samples, run_labelling
from trainer.run.records import Instruction
from trainer.run.records import Sample as Sampled
from trainer.run.stages import open_run

ASKED = {"prompt": "p", "response": "r"}


def templates(folder: Path, text: str = "good", other: str = "this") -> list[Path]:
    """A file with `mine@1`, which asks whether the answer is so, and with another template."""
    file = folder / f"{text}-{other}.toml"
    entries = [("mine", text), ("other", other)]
    file.write_text(
        "".join(
            f'[[templates]]\nname = "{name}"\nversion = 1\nmode = "pointwise"\nformat = "chat"\n'
            f'layout = "{{prompt}} {{response}} {{instruction}}"\ninstruction = "Is it {said}?"\n'
            for name, said in entries
        )
    )
    return [file]


def data(folder: Path, count: int = 6) -> Path:
    """Pairs."""
    file = folder / "data.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": f"a {n}", "rejected": f"b {n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def bench(live: Live, folder: Path, *more: str) -> int:
    """The exit code of a run with the template `mine`."""
    command = ["--judge-url", live.url, "--data", str(folder / "data.jsonl"), "--out", str(folder / "run")]
    return pairs.main([*command, "--template", "mine", *more])


def forget(folder: Path, kept: int) -> None:
    """Leave what a run that was killed after so many rows leaves."""
    file = folder / "run" / ITEMS_FILE
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:kept]))


# What the service states.


def test_results_tell_another_text_and_another_setting(tmp_path: Path) -> None:
    """Two services say the same of how they ask where it is the same, and else not, of inline templates as well."""
    inline = {"layout": "{prompt} {response} {instruction}", "instruction": "x"}
    said = []
    for settings in ({}, {}, {"template_file": templates(tmp_path, "bad")}):
        with live_service(**{"template_file": templates(tmp_path), **settings}) as live:
            bodies = [{**ASKED, "template": template} for template in ("mine", "other", "general", inline)]
            said.append([live.http.post("/score", json=body).json()["asked_with"] for body in bodies])

    first, again, changed = said
    assert first == again
    assert [one == other for one, other in zip(first, changed, strict=True)] == [False, True, True, True]
    assert len(set(first)) == 4


@pytest.mark.parametrize("change", [{"self_reward_samples": 3}, {"self_reward_tokens": 77}], ids=str)
def test_the_model_states_its_judges_settings(change: dict[str, int]) -> None:
    """How many texts a judge writes, and how long, is part of GET /v1/models."""
    stated = []
    for settings in ({}, {}, change):
        with (
            live_service(judge="self-reward", self_reward_mode="parsed", worker=False, **settings) as live,
            Judge(live.url) as judge,
        ):
            stated.append(judge.models().data[0].settings)

    assert stated[0] is not None
    assert stated[0] == stated[1] != stated[2]


# Benchmarks.


@pytest.mark.parametrize("kept", [3, 6], ids=["interrupted", "finished"])
def test_a_run_is_not_resumed_with_another_text(tmp_path: Path, kept: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The template's text changed under the same version: nothing is asked, and the message names the template."""
    data(tmp_path)
    with live_service(template_file=templates(tmp_path)) as live:
        assert bench(live, tmp_path) == 0
    forget(tmp_path, kept)

    with live_service(template_file=templates(tmp_path, "bad")) as live:
        code = bench(live, tmp_path)
        asked = live.value("judge_judgements_total")

    assert (code, asked) == (1, 0)
    assert "text of mine@1" in capsys.readouterr().err
    assert (tmp_path / "run" / ITEMS_FILE).read_bytes().count(b"\n") == kept


def test_a_panels_run_is_not_resumed_with_another_text_or_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text of a panel's template, or a panel's weight, changed under the same version."""
    data(tmp_path)
    panels = '[[panels]]\nname = "both"\nversion = 1\nmembers = ["mine@1", "other@1"]\nweights = [1, 2]\n'
    (file,), (other,) = templates(tmp_path), templates(tmp_path, "bad")
    both, changed = tmp_path / "both.toml", tmp_path / "changed.toml"
    both.write_text(panels)
    changed.write_text(panels.replace("2]", "3]"))
    said = []

    for name in ("mine,other", "both"):
        out = ["--template", *name.split(","), "--out", str(tmp_path / name)]
        with live_service(template_file=[file, both]) as live:
            codes = [bench(live, tmp_path, *out) for _ in range(2)]
            row = json.loads((tmp_path / name / ITEMS_FILE).read_text().partition("\n")[0])
        for files in ([other, both], [file, changed]):
            with live_service(template_file=files) as live:
                said.append((bench(live, tmp_path, *out), capsys.readouterr().err))
        assert codes == [0, 0]
        assert list(row["chosen"]["members"]) == ["mine@1", "other@1"]

    assert [code for code, _ in said] == [1, 0, 1, 1]
    assert ["text of mine@1" in err for _, err in said] == [True, False, True, False]
    assert "text of both@1" in said[3][1]


def test_another_templates_text_stops_nothing(tmp_path: Path) -> None:
    """A run goes on where only templates have changed by which it judged nothing."""
    data(tmp_path)
    with live_service(template_file=templates(tmp_path)) as live:
        bench(live, tmp_path)
    forget(tmp_path, 2)

    with live_service(template_file=templates(tmp_path, other="that")) as live:
        assert bench(live, tmp_path) == 0


@pytest.mark.parametrize("rows_too", [False, True])
def test_a_run_of_an_older_version_is_resumed(tmp_path: Path, rows_too: bool) -> None:
    """A folder without digests contradicts nothing; from then on it has them."""
    data(tmp_path)
    with live_service(template_file=templates(tmp_path)) as live:
        bench(live, tmp_path)
        forget(tmp_path, 3)
        file = tmp_path / "run" / CONFIG_FILE
        config = json.loads(file.read_text())
        del config["templates"], config["judge"]["settings"]
        file.write_text(json.dumps(config))
        if rows_too:
            items = tmp_path / "run" / ITEMS_FILE
            rows = [json.loads(line) for line in items.read_text().splitlines()]
            items.write_text("".join(json.dumps({**row, "asked_with": None}) + "\n" for row in rows))

        assert bench(live, tmp_path) == 0
    assert "mine@1" in json.loads(file.read_text())["templates"]


def test_a_service_that_restarts_with_another_text_stops_the_run(tmp_path: Path) -> None:
    """In mid-run, each row tells by which text it was judged: none of the second service's is written."""
    samples = [Sample(str(n), "all", f"{n}?", ("a",), ("b",)) for n in range(4)]
    asking = Asking({"all": Question(template="mine")})
    with live_service(template_file=templates(tmp_path)) as live:
        config: dict[str, object] = {"judge": {"model": "fake", "fingerprint": fingerprint(live)}}
        asyncio.run(judged(live, samples[:2], asking, RunFolder(tmp_path / "run", config)))

    with (
        live_service(template_file=templates(tmp_path, "bad")) as live,
        pytest.raises(JudgeChangedError, match="mine@1"),
    ):
        asyncio.run(judged(live, samples, asking, RunFolder(tmp_path / "run", config)))
    assert len(RunFolder(tmp_path / "run", config).rows) == 2


async def judged(live: Live, samples: Sequence[Sample], asking: Asking, folder: RunFolder) -> None:
    """Have them judged."""
    async with AsyncJudge(live.url) as judge:
        await judge_samples(judge, samples, asking, folder)


def fingerprint(live: Live) -> str:
    """Of the service's model."""
    with Judge(live.url) as judge:
        return judge.models().data[0].fingerprint


def test_a_run_finds_its_folder_though_the_text_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --out the folder's name does not hang on digests, so that the run that is contradicted is met."""
    monkeypatch.chdir(tmp_path)
    codes = []
    for text in ("good", "bad"):
        with live_service(template_file=templates(tmp_path, text)) as live:
            codes.append(pairs.main(["--judge-url", live.url, "--data", str(data(tmp_path)), "--template", "mine"]))

    assert codes == [0, 1]
    assert "text of mine@1" in capsys.readouterr().err


def test_a_search_is_not_resumed_with_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of its runs is a run like any other."""
    (tmp_path / "candidates.json").write_text(json.dumps({"general": ["mine", "other"]}))
    told = ["--candidates", str(tmp_path / "candidates.json"), "--out", str(tmp_path / "out"), "--benchmark", "pairs"]
    codes = []
    for other in ("this", "that"):
        with live_service(template_file=templates(tmp_path, other=other)) as live:
            codes.append(search.main(["--judge-url", live.url, "--data", str(data(tmp_path, 8)), *told]))

    assert codes == [0, 1]
    assert "text of other@1" in capsys.readouterr().err


def test_a_calibration_is_of_one_text(tmp_path: Path) -> None:
    """Runs by two texts of one template are not fitted together."""
    for text in ("good", "bad"):
        (tmp_path / text).mkdir()
        data(tmp_path / text)
        with live_service(template_file=templates(tmp_path, text)) as live:
            bench(live, tmp_path / text)

    assert len(from_runs([tmp_path / "good" / "run"]).templates["mine@1"]) == 6
    with pytest.raises(EvidenceError, match="the text of mine@1"):
        from_runs([tmp_path / text / "run" for text in ("good", "bad")])


def test_a_calibration_is_used_with_its_text_only(tmp_path: Path) -> None:
    """A service whose template has another text than the file was fitted to does not start; an older file is taken."""
    half = {"nll": 0.5, "ece": 0.1, "brier": 0.2}
    fit = {"temperature": 2.0, "bias": 0.0, "pairs": 9, "before": half, "after": half}
    with live_service(template_file=templates(tmp_path)) as live:
        result = live.http.post("/score", json={**ASKED, "template": "mine"}).json()

    def started(asked_with: str | None, text: str) -> float:
        templated = {"mine@1": {**fit, **({"asked_with": asked_with} if asked_with else {})}}
        fitted_on = {"sources": ["x"], "seed": 0}
        kept = {"format": 1, "model": result["model"], "fingerprint": result["fingerprint"], "fitted_on": fitted_on}
        (tmp_path / "fit.json").write_text(json.dumps({**kept, "templates": templated}))
        with live_service(template_file=templates(tmp_path, text), calibration_file=[tmp_path / "fit.json"]) as live:
            calibrated: float = live.http.post("/score", json={**ASKED, "template": "mine"}).json()["calibrated"]
        return calibrated

    assert started(result["asked_with"], "good") == started(None, "good")
    assert 0 < started(None, "bad") < 1
    with pytest.raises(CalibrationError, match=r"mine@1 was fitted to another text"):
        started(result["asked_with"], "bad")


# The trainer.


def labelling(folder: Path, count: int) -> dict[str, Any]:
    """What is labelled, and where to."""
    return {
        "instructions": [Instruction(id="i", prompt="p")],
        "samples": [Sampled(id="i", sample=n, response=f"answer {n}", tokens=1, finish="stop") for n in range(count)],
        "path": folder / "scores.jsonl",
    }


def arm(live: Live) -> LabelOptions:
    """The service with the template `mine`."""
    return LabelOptions(judge=JudgeOptions(live.url), template="mine")


def test_labels_are_not_continued_with_another_text(tmp_path: Path) -> None:
    """Neither by the run's configuration nor, in mid-run, by what the scores say."""
    with live_service(template_file=templates(tmp_path)) as live:
        run_labelling(arm(live), **labelling(tmp_path, 2))
        config = {"labels": describe_labeler(arm(live))}
        with open_run(tmp_path / "run", config) as run:
            (run.path / "scores.jsonl").touch()

    with live_service(template_file=templates(tmp_path, "bad")) as live:
        with pytest.raises(StageError, match=r"other labels: text of mine@1"):
            open_run(tmp_path / "run", {"labels": describe_labeler(arm(live))}).__enter__()
        with pytest.raises(StageError, match="the text of mine@1"):
            run_labelling(arm(live), **labelling(tmp_path, 4))


def test_a_training_run_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    """Its configuration has no digests, and they contradict nothing; a template that is added does not either."""
    with live_service(template_file=templates(tmp_path)) as live:
        labels = describe_labeler(arm(live))
    judge = {key: value for key, value in dict(labels["judge"]).items() if key != "settings"}  # type: ignore[call-overload]
    old = {**{key: value for key, value in labels.items() if key != "templates"}, "judge": judge}
    more = {**labels, "templates": {**dict(labels["templates"]), "new@1": "0"}}  # type: ignore[call-overload]

    for config in (old, labels, more, labels):
        with open_run(tmp_path / "run", {"labels": config}) as run:
            assert run.path == tmp_path / "run"


async def test_scores_of_two_ways_of_asking_are_never_mixed(tmp_path: Path) -> None:
    """Whatever the labeler, a score that was asked for otherwise than the others stops the stage."""

    class Changing:
        model, fingerprint = "m", "f"

        def described(self) -> dict[str, object]:
            return {}

        async def labels(self, texts: Sequence[object]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
            for index in range(len(texts)):
                yield index, Label(0.0, 0.5, 1.0, "mine@1", "m", "f", asked_with=f"{index // 2}")

    with pytest.raises(StageError, match="asks differently"):
        await label_samples(Changing(), Labelling(**labelling(tmp_path, 3)))
    assert (tmp_path / "scores.jsonl").read_bytes().count(b"\n") == 2

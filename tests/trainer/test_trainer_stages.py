"""The folder of a run: each stage runs once, interrupted work resumes, and nothing is mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from client.labels.records import Score, ScoreError
from tests.support.training import files_no_longer_than
from trainer.errors import RecordError, StageError
from trainer.run.files import appending, read_records, write_records
from trainer.run.records import Instruction, Sample
from trainer.run.stages import RunFolder, Stage, content_digest, open_run


def instruction(number: int) -> Instruction:
    """An instruction with a line separator in its prompt."""
    return Instruction(id=f"{number}", prompt=f"Question\u2028{number}?", category="chat")


def stage(folder: Path, **inputs: object) -> Stage:
    """A stage whose outputs are a file and a folder."""
    return Stage(folder, "made", ("made.txt", "parts"), inputs)


def make(folder: Path, text: str = "made") -> Callable[[], None]:
    """The work of `stage`."""

    def work() -> None:
        (folder / "made.txt").write_text(text)
        (folder / "parts").mkdir(exist_ok=True)

    return work


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    """Appended records are read back, line separators inside texts included."""
    written = [instruction(number) for number in range(3)]
    with appending(tmp_path / "a.jsonl") as append:
        for record in written:
            append(record)

    assert read_records(tmp_path / "a.jsonl", Instruction) == written


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    """A line torn by a kill is not read, and the next record starts a line of its own."""
    file = tmp_path / "a.jsonl"
    write_records(file, [instruction(1), instruction(2)])
    file.write_bytes(file.read_bytes()[:-1])
    before = read_records(file, Instruction)
    with appending(file) as append:
        append(instruction(3))

    assert before == [instruction(1)]
    assert read_records(file, Instruction) == [instruction(1), instruction(3)]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    """A complete line that is not a record is an error with file, line and field."""
    file = tmp_path / "samples.jsonl"
    file.write_text('{"id": "1", "sample": 0, "response": "r", "tokens": 1, "finish": "stop"}\n{"id": "2"}\n')

    with pytest.raises(RecordError, match=r"samples\.jsonl, line 2: no valid Sample: sample"):
        read_records(file, Sample)


def test_a_score_has_a_number_or_an_error() -> None:
    """Neither both nor none: a failure is never mistaken for a score."""
    with pytest.raises(ValueError, match="either log_odds"):
        Score(id="1", sample=0)
    with pytest.raises(ValueError, match="either log_odds"):
        Score(id="1", sample=0, log_odds=0.0, score=0.5, error=ScoreError(code="c", message="m"))


def test_two_processes_cannot_append_to_one_file(tmp_path: Path) -> None:
    """The second one fails with an error that says why."""
    file = tmp_path / "a.jsonl"

    with appending(file), pytest.raises(RecordError, match="another process"), appending(file):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """If only part of a line fits, the error says what to do, and the lines before stay whole."""
    file = tmp_path / "a.jsonl"
    with appending(file) as append:
        append(instruction(1))
        before = file.read_bytes()

        with files_no_longer_than(len(before) + 10), pytest.raises(RecordError, match=r"cannot be written.*Make room"):
            append(instruction(2))

    assert file.read_bytes() == before


def test_a_file_written_whole_is_never_seen_half(tmp_path: Path) -> None:
    """If the disk is full, the old contents stay and no temporary file is left behind."""
    write_records(tmp_path / "a.jsonl", [instruction(1)])

    with files_no_longer_than(100), pytest.raises(RecordError, match=r"cannot be written"):
        write_records(tmp_path / "a.jsonl", [instruction(number) for number in range(10)])
    assert read_records(tmp_path / "a.jsonl", Instruction) == [instruction(1)]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    """The second run skips it, and the marker records its inputs."""
    run = RunFolder(tmp_path, {})
    first = run.run_stage(stage(tmp_path, k=4), make(tmp_path))
    second = run.run_stage(stage(tmp_path, k=4), pytest.fail)

    assert (first, second) == (True, False)
    assert json.loads((tmp_path / "made.done").read_text()) == {"k": 4}
    assert stage(tmp_path, k=4).done


def test_an_interrupted_stage_resumes(tmp_path: Path) -> None:
    """Outputs of the same inputs without the final marker are kept, and the stage is not done."""
    run = RunFolder(tmp_path, {})

    def interrupted() -> None:
        (tmp_path / "made.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run_stage(stage(tmp_path, k=4), interrupted)

    assert not stage(tmp_path, k=4).done
    assert stage(tmp_path, k=4).begin()
    assert (tmp_path / "made.txt").read_text() == "half"


@pytest.mark.parametrize("finished", [True, False])
def test_outputs_of_other_inputs_are_refused(tmp_path: Path, finished: bool) -> None:
    """Finished or not, the error names what differs, and nothing is lost."""
    stage(tmp_path, k=4, seed=0).begin()
    make(tmp_path)()
    marker = tmp_path / "made.begun"
    marker.rename(tmp_path / ("made.done" if finished else "made.begun"))

    with pytest.raises(StageError, match=r"made\.txt was made from something else \(other k\).*--overwrite"):
        stage(tmp_path, k=8, seed=0).begin()
    assert (tmp_path / "made.txt").exists()


def test_overwrite_redoes_only_what_changed(tmp_path: Path) -> None:
    """Outputs of other inputs are removed; finished work of the same inputs stays."""
    run = RunFolder(tmp_path, {}, overwrite=True)
    run.run_stage(stage(tmp_path, k=4), make(tmp_path, "old"))
    again = run.run_stage(stage(tmp_path, k=4), pytest.fail)
    begun = stage(tmp_path, k=8).begin(overwrite=True)

    assert (again, begun) == (False, True)
    assert not (tmp_path / "made.txt").exists()
    assert not (tmp_path / "parts").exists()


def test_a_changed_input_file_is_noticed(tmp_path: Path) -> None:
    """A path among the inputs stands for the contents of the file or folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("1")
    stage(tmp_path, source=tmp_path / "in").begin()
    make(tmp_path)()
    stage(tmp_path, source=tmp_path / "in").finish()
    same = stage(tmp_path, source=tmp_path / "in").done
    (tmp_path / "in" / "a").write_text("2")

    assert same
    assert not stage(tmp_path, source=tmp_path / "in").done


def test_a_lost_output_is_redone(tmp_path: Path) -> None:
    """A marker without its files does not count."""
    run = RunFolder(tmp_path, {})
    run.run_stage(stage(tmp_path), make(tmp_path))
    (tmp_path / "made.txt").unlink()

    assert run.run_stage(stage(tmp_path), make(tmp_path))


def test_a_stage_without_its_outputs_is_not_finished(tmp_path: Path) -> None:
    """Work that did not write all outputs is an error, and sets no marker."""
    with pytest.raises(StageError, match=r"ended without parts"):
        RunFolder(tmp_path, {}).run_stage(stage(tmp_path), (tmp_path / "made.txt").touch)
    assert not (tmp_path / "made.done").exists()


def test_identity_follows_the_inputs(tmp_path: Path) -> None:
    """A later stage can depend on an earlier one's outputs without reading them."""
    stage(tmp_path, k=4).begin()
    make(tmp_path)()
    with pytest.raises(StageError, match="not finished"):
        stage(tmp_path, k=4).identity()
    stage(tmp_path, k=4).finish()
    first = stage(tmp_path, k=4).identity()
    stage(tmp_path, k=8).begin(overwrite=True)
    make(tmp_path)()
    stage(tmp_path, k=8).finish()

    assert first != stage(tmp_path, k=8).identity()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    """The error names the differing settings; --overwrite takes the folder over."""
    with open_run(tmp_path / "run", {"samples": 4}) as run:
        (run.path / "samples.jsonl").touch()

    with pytest.raises(StageError, match=r"other samples\).*--overwrite"), open_run(tmp_path / "run", {"samples": 8}):
        pass
    with open_run(tmp_path / "run", {"samples": 8}, overwrite=True) as run:
        assert run.config == {"samples": 8}


def test_a_run_in_which_nothing_was_done_leaves_its_folder_free(tmp_path: Path) -> None:
    """Settings that could not work, or data that could not be read, need no --overwrite to be corrected."""

    def fail(run: RunFolder) -> None:
        def read_data() -> None:
            raise StageError("there is no such file")

        run.run_stage(Stage(run.round_folder(1), "samples", ("samples.jsonl",), dict(run.config)), read_data)

    with pytest.raises(StageError, match="no such file"), open_run(tmp_path, {"samples": 4}) as run:
        fail(run)
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    with open_run(tmp_path, {"samples": 8}) as run:
        assert run.config == {"samples": 8}


def test_a_run_that_was_begun_keeps_its_folder(tmp_path: Path) -> None:
    """Whatever it has written, or a link to it, is protected from other settings."""
    for name, make in {"samples.jsonl": Path.touch, "round-1/a": Path.touch, "link": link_to_nowhere}.items():
        with open_run(tmp_path / name, {"samples": 4}) as run:
            (run.path / name).parent.mkdir(exist_ok=True)
            make(run.path / name)

        with pytest.raises(StageError, match="other samples"), open_run(tmp_path / name, {"samples": 8}):
            pass


def link_to_nowhere(path: Path) -> None:
    """A symlink."""
    path.symlink_to(path.parent)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    """A folder with files but no run in it is not written to."""
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(StageError, match="holds files, but no run"), open_run(tmp_path, {}):
        pass


def test_two_processes_cannot_work_in_one_folder(tmp_path: Path) -> None:
    """The second one fails with an error that says why; afterwards the folder is free again."""
    with open_run(tmp_path, {}), pytest.raises(StageError, match="another process"), open_run(tmp_path, {}):
        pass
    with open_run(tmp_path, {}) as run:
        assert run.round_folder(1).is_dir()


def test_the_digest_of_a_folder_covers_names_and_contents(tmp_path: Path) -> None:
    """Renaming a file changes it."""
    (tmp_path / "a").write_text("1")
    before = content_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")

    assert before != content_digest(tmp_path)
    with pytest.raises(StageError, match="cannot be read"):
        content_digest(tmp_path / "missing")

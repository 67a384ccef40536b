"""What the loop's flags change: the merged dtype, the judge, SFT before the first round; and refused flags."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from trainer.__main__ import main as trainer_main
from trainer.self_improve import main


def json_of(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_bytes())


def on_the_bf16_grid(model: Path, folder: Path) -> Path:
    """A copy whose weights bfloat16 can hold, like those of published models."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_run_says_how_much_of_the_training_rounding_undoes(
    tiny_model: Path, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fp32 nothing is lost; float16, rounded to nearest, loses most of tiny steps, and the run warns."""
    model = on_the_bf16_grid(tiny_model, tmp_path / "model")
    command = [*loop_flags, "--model", str(model), "--held-out", "0", "--lr", "1e-5"]
    for name, dtype in (("exact", "float32"), ("lossy", "float16")):
        main(["--output", str(tmp_path / name), *command, "--merge-dtype", dtype])

    kept = [json_of(tmp_path / name / "round-1" / "merge.json")["kept_update"] for name in ("exact", "lossy")]
    assert kept[0] == pytest.approx(1, abs=1e-3)
    assert kept[1] < 0.5
    assert "raise --lr" in capsys.readouterr().err


def test_without_a_judge_nothing_is_begun(
    loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is sampled; the error gives the address and the reason."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = main(["--output", str(tmp_path / "run"), *loop_flags, "--judge-url", url])

    assert code == 1
    assert f"the judge at {url} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_judge_can_follow_the_policy(tiny_model: Path, loop_flags: list[str], tmp_path: Path) -> None:
    """Each round's labels come from a service of its own, started with the model that the round begins with."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom service.__main__ import main\n"
        f"with Path({str(tmp_path / 'served')!r}).open('a') as file: file.write(sys.argv[1] + chr(10))\n"
        "sys.exit(main(['--engine', 'fake', '--port', sys.argv[2]]))\n"
    )
    command = [*loop_flags, "--held-out", "0", "--rounds", "2"]
    run = tmp_path / "run"
    started = f"{sys.executable} {script} {{model}} {{port}}"
    code = main(["--output", str(run), *command, "--judge-follows-policy", "--judge-command", started])

    assert code == 0
    # The first start is the rehearsal; a round's labels and the judge's reliability have one each.
    served = (tmp_path / "served").read_text().splitlines()
    assert served == [str(tiny_model)] * 3 + [str(run / "round-1" / "merged")] * 2


def test_a_judge_command_that_ends_stops_the_run(
    loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sampled; the error says where to look."""
    started = f"{sys.executable} -c 'raise SystemExit(3)' {{model}} {{port}}"
    code = main(["--output", str(tmp_path / "run"), *loop_flags, "--judge-follows-policy", "--judge-command", started])

    assert code == 1
    assert "ended with exit code 3" in capsys.readouterr().err
    assert not (tmp_path / "run" / "round-1" / "samples.jsonl").exists()


def test_sft_comes_before_the_first_round(loop_flags: list[str], tmp_path: Path) -> None:
    """The first policy is then what SFT made of the model."""
    data, run = tmp_path / "sft.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}.", "response": f"{n}"}) + "\n" for n in range(4)))

    code = main(["--output", str(run), *loop_flags, "--held-out", "0", "--sft", str(data), "--sft-epochs", "1"])

    assert code == 0
    assert json_of(run / "sft" / "sft.json")["examples"] == 4
    assert json_of(run / "round-1" / "dpo.json")["base"] == str(run / "sft" / "merged")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "1"], "--samples must be 2 or more"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--judge-command", "x"], "goes with --judge-follows-policy"),
        (["--judge-follows-policy", "--judge-command", "serve"], "must hold {model} and {port}"),
        (["--model", "nowhere"], "neither a folder here nor a hub id (org/name) nor a known name"),
        (["--batch", "6"], "change --batch or --micro-batch"),
        (["--lm-eval", "mmlu"], "pip install 'lm_eval"),
        (["--count", "1000"], "20 usable instructions, and 1006 are wanted"),
        (["--labeler", "random", "--reliable-pairs"], "--reliable-pairs needs a question to reword"),
        (["--labeler", "file"], "goes with --labels-from FILE"),
        (["--reliable-margin", "1"], "--reliable-margin goes with --reliable-pairs"),
        (["--rejected", "middle", "--length-balance"], "leave --rejected out"),
        (["--label-smoothing", "0.1"], "does nothing with --loss sigmoid"),
        (["--labels-from", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--sft", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--samples-from", "nowhere"], "nowhere holds no run of this program"),
    ],
)
def test_settings_that_make_no_sense_are_usage_errors(
    more: list[str], message: str, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, with what to change, and a dry run refuses the same."""
    command = ["--output", str(tmp_path / "run"), *loop_flags, *more]
    codes = [main(command), main([*command, "--dry-run"])]

    said = capsys.readouterr()
    assert codes == [2, 2]
    assert said.err.count(message) == 2
    assert not said.out
    assert not (tmp_path / "run").exists()


def test_a_broken_instruction_line_is_named(
    loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With file and line, and the flag that leaves it out."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "Why?", "category": "chat"}\n{"prompt": " "}\n')
    code = main(["--output", str(tmp_path / "run"), *loop_flags, "--instructions", str(broken)])

    assert code == 2
    assert "line 2: the prompt is empty (--skip-bad leaves such records out)" in capsys.readouterr().err


def test_short_names_lead_to_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m trainer self-improve --help` is the loop's help; an unknown name is usage."""
    with pytest.raises(SystemExit, match="0"):
        trainer_main(["self-improve", "--help"])

    assert "--judge-follows-policy" in capsys.readouterr().out
    assert trainer_main(["improve"]) == 2

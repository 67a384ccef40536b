"""The command `judge`, as a real process."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.commands.catalog import COMMANDS, find
from tests.support.fleet import ROOT, run_module
from tests.support.live import Live, live_service

# What pip writes as the script `judge`: the folder that the user is in is not on its path.
SCRIPT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.commands.__main__ import main; main()"


def judge(*arguments: str, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `judge …` to its end."""
    command = [sys.executable, "-P", "-c", SCRIPT, str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=cwd, input=stdin)


def test_the_console_script_is_the_main_that_is_tested_here() -> None:
    """Under the name `judge`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    assert project["scripts"] == {"judge": "client.commands.__main__:main"}


def test_help_lists_every_command_in_80_columns() -> None:
    """In groups, a line each; on stdout, and without a command on stderr with status 2."""
    asked, bare = judge("--help"), judge()

    assert (asked.returncode, asked.stderr) == (0, "")
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", asked.stdout)
    lines = asked.stdout.splitlines()
    assert {name for name in COMMANDS if any(line.startswith(f"  {name} ") for line in lines)} == set(COMMANDS)
    assert max(map(len, lines)) <= 110


def test_the_version_is_the_packages() -> None:
    """As --version and -V."""
    shown = {judge(flag).stdout for flag in ("--version", "-V")}

    assert shown == {"judge-as-api 0.1.0\n"}


def test_nothing_heavy_is_imported_to_find_a_command() -> None:
    """Neither pydantic nor httpx, whose import takes longer than Python's own start."""
    code = f"import sys; sys.argv = ['judge', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from client.commands.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'pydantic', 'httpx', 'asyncio', 'torch', 'rich'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sevre"], "judge: error: there is no command sevre; did you mean serve?"),
        (["bench", "rewrdbench"], "there is no command bench rewrdbench; did you mean bench rewardbench?"),
        (["serve", "--modle", "x"], "judge serve: error: there is no flag --modle; did you mean --model?"),
        (["bench", "rewardbench", "--dta", "x"], "there is no flag --dta; did you mean --data?"),
        (["score", "--promt", "x"], "judge score: error: there is no flag --promt; did you mean --prompt?"),
        (["score", "--url", "x"], "judge score: error: there is no flag --url; did you mean --judge-url?"),
        (["serve", "--bogus", "x"], "judge serve: error: there is no flag --bogus (--help lists the flags)"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_right_one(arguments: list[str], said: str) -> None:
    """Commands and flags; status 2, and no list of sixty flags."""
    ended = judge(*arguments)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr.splitlines()[-1]
    assert len(ended.stderr.splitlines()) <= 2


@pytest.mark.parametrize("name", ["worker", "models", "compare", "label", "bench pairs", "improve"])
def test_a_command_explains_itself_under_its_own_name(name: str) -> None:
    """The usage is what the user typed, and fits on a line."""
    shown = judge(*name.split(), "--help")

    assert (shown.returncode, shown.stderr) == (0, "")
    usage, blank, *_ = shown.stdout.splitlines()
    assert usage.startswith(f"usage: judge {name} ")
    assert blank == ""


def test_the_words_behind_a_command_are_its_own() -> None:
    """Commands have one word or two."""
    assert find(["bench", "pairs", "--data", "x"]) == ("bench pairs", ["--data", "x"])
    assert find(["score", "compare"]) == ("score", ["compare"])
    assert find(["bench"]) is None


def test_a_file_called_client_shadows_nothing(tmp_path: Path) -> None:
    """The user's folder is not searched for modules, as `python -m` does."""
    (tmp_path / "client.py").write_text("raise SystemExit('shadowed')\n")

    assert judge("load", "--help", cwd=tmp_path).returncode == 0


def test_a_program_is_called_what_was_typed() -> None:
    """`python -m client pairs` does not call itself by the name of its module."""
    ended = run_module("client", "pairs", "--dta", "x")

    assert ended.returncode == 2
    usage, said = ended.stderr.splitlines()
    assert usage.startswith("usage: python -m client pairs --data ")
    assert said.startswith("python -m client pairs: error: there is no flag --dta; did you mean --data?")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service to ask."""
    with live_service() as service:
        yield service


def test_a_score_is_printed_as_a_verdict(live: Live) -> None:
    """Yes, no or too close, with the numbers behind it; texts may come from a file or the standard input."""
    shown = judge("score", "--prompt", "-", "--response", "@/dev/null", "--judge-url", live.url, stdin="2+2?")
    good = judge("score", "--prompt", "2+2?", "--response", "4", "--judge-url", live.url)

    assert (shown.returncode, "at least 1 character" in shown.stderr) == (2, True)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.split(":")[0] in {"Yes", "No", "Too close to call"}
    assert "log-odds" in good.stdout


@pytest.mark.parametrize(("content", "said"), [(None, "there is no file "), (b"\xa6\x00", "is not text in UTF-8")])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    """In a sentence, before the service is asked."""
    path = tmp_path / "answer.txt"
    if content is not None:
        path.write_bytes(content)

    shown = judge("score", "--prompt", "2+2?", "--response", f"@{path}")

    assert (shown.returncode, shown.stdout) == (2, "")
    assert said in shown.stderr
    assert str(path) in shown.stderr


def test_a_comparison_ranks_the_responses(live: Live) -> None:
    """A verdict, then every response in the order of the ranking."""
    asked = ["--prompt", "2+2?", "--response", "4", "--response", "5 " * 40, "--judge-url", live.url]
    shown, raw = judge("compare", *asked), json.loads(judge("compare", *asked, "--json").stdout)

    assert shown.returncode == 0
    places = [line for line in shown.stdout.splitlines() if line.startswith(("  1. ", "  2. "))]
    assert [
        f"{raw['scores'][index]['score']:.3f}" in line for index, line in zip(raw["ranking"], places, strict=True)
    ] == [
        True,
        True,
    ]
    assert max(map(len, places)) <= 80


def test_texts_are_read_once_and_shown_without_what_steers_a_terminal(live: Live) -> None:
    """A pipe holds a text once; an escape sequence in an answer is not passed on."""
    asked = ["--prompt", "2+2?", "--response", "-", "--response", "5", "--judge-url", live.url]

    shown = judge("compare", *asked, stdin="four\x1b]0;title\x07")

    assert "four ]0;title" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_a_file_and_the_standard_input_are_the_same_text(live: Live, tmp_path: Path) -> None:
    """Also where lines end in CRLF: another text would get another score."""
    (tmp_path / "answer.txt").write_bytes(b"a\r\nb")
    asked = ["--prompt", "2+2?", "--judge-url", live.url, "--json"]

    read, piped = (
        json.loads(judge("score", *asked, "--response", given, stdin="a\r\nb").stdout)["log_odds"]
        for given in (f"@{tmp_path / 'answer.txt'}", "-")
    )

    assert read == piped


def test_the_address_and_the_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """JUDGE_URL and JUDGE_API_KEY, as for every program; a wrong key is told with the flag and the variable."""
    asked = ["score", "--prompt", "2+2?", "--response", "4"]
    with live_service(api_key="right") as service:
        monkeypatch.setenv("JUDGE_URL", service.url)
        monkeypatch.setenv("JUDGE_API_KEY", "right")
        right = judge(*asked)
        wrong = judge(*asked, "--api-key", "wrong")

    assert right.returncode == 0
    assert wrong.returncode == 1
    assert "--api-key" in wrong.stderr
    assert "JUDGE_API_KEY" in wrong.stderr


def test_a_service_that_does_not_run_is_one_line() -> None:
    """With its address."""
    ended = judge("score", "--prompt", "p", "--response", "r", "--judge-url", "http://127.0.0.1:9")

    assert ended.returncode == 1
    assert "127.0.0.1:9" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_flags(shell: str) -> None:
    """Of every program that is installed here."""
    pytest.importorskip("shtab")
    script = judge("completion", shell)

    assert (script.returncode, script.stderr) == (0, "")
    missing = [word for word in ("rewardbench", "max-queue-jobs", "judge-url") if word not in script.stdout]
    assert missing == []

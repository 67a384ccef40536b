"""Starts that fail: each ends with its exit status and one line that says what to do."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import httpx
import pytest

from bench.support.process import free_port
from tests.support.fleet import run_code, run_module, started
from tests.support.redis_server import running_redis

FAKE = ("--engine", "fake")
NO_MODEL = ("--model", "no-such-model")


def only_line(ended: CompletedProcess[str], status: int) -> str:
    """The one line on stderr of a process that ended with this status."""
    assert ended.returncode == status
    (line,) = ended.stderr.splitlines()
    return line


@pytest.fixture(params=["127.0.0.1", "::1"])
def taken(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A host and a port of it that another process listens on."""
    with socket.socket(socket.AF_INET6 if ":" in request.param else socket.AF_INET) as other:
        other.bind((request.param, 0))
        other.listen()
        yield other.getsockname()[:2]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "--port"),
        (["--engine", "abacus"], "--engine"),
        (["--queue-url", "ftp://localhost"], "--queue-url"),
        (["--no-such-flag"], "there is no flag --no-such-flag"),
    ],
)
def test_a_bad_flag_ends_with_status_2_and_is_named(arguments: list[str], named: str) -> None:
    """A mistake in the settings shows no traceback."""
    ended = run_module("service", *arguments)

    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_bad_setting_does_not_show_the_keys() -> None:
    """Keys in the environment are not printed when another setting is refused."""
    ended = run_module("service", "--port", "99999", env={"JUDGE_API_KEY": "hunter2"})

    assert "hunter2" not in ended.stdout + ended.stderr


def test_an_unknown_model_ends_with_status_1_and_the_known_names() -> None:
    """The error lists the models that could be meant."""
    ended = run_module("service", *NO_MODEL)

    assert ended.returncode == 1
    assert "smollm2-135m-instruct" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["./nope", "/no/such", "~/nope/x"])
def test_a_path_without_a_folder_is_told_as_such(name: str) -> None:
    """It is not looked for on the hub, although ./nope has the form of an id there."""
    ended = run_module("service", "--model", name, "--port", "0")

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(f"cannot start: {name}: no such folder")


def test_a_misspelt_model_is_told_with_the_right_name() -> None:
    """Among those that are known."""
    ended = run_module("service", "--model", "smolm2-135m-instruct", "--port", "0")

    assert "did you mean smollm2-135m-instruct?" in ended.stderr


def test_a_start_tells_its_phases_and_ends_in_a_command_to_copy(tiny_model: Path) -> None:
    """What is loaded, checked and ready, in order; and the request that the last line shows works."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with started("service", "--model", str(tiny_model), "--port", str(port)) as service:
        assert service.stderr is not None
        lines = [service.stderr.readline().strip()]
        while not lines[-1].startswith("curl"):
            lines.append(service.stderr.readline().strip())
        command = shlex.split(lines[-1])
        answer = httpx.post(command[1], content=command[-1], headers=dict([command[3].split(": ")]), timeout=60)

    said = "\n".join(lines)
    phases = ["loading ", "model found", f"listening: {url}", "weights loaded", "model loaded", f"ready: {url}"]
    assert [said.index(phase) for phase in phases] == sorted(said.index(phase) for phase in phases)
    assert answer.status_code == 200


def test_an_unreachable_redis_is_named_with_the_cause() -> None:
    """The log says which host and port, and why; the process goes on trying."""
    with started("service.worker", *FAKE, "--queue-url", "redis://127.0.0.1:1/0") as worker:
        assert worker.stderr is not None
        line = next(line for line in worker.stderr if "cannot be reached" in line)

    assert line.strip().endswith("Redis at 127.0.0.1:1: connection refused")


def test_a_variable_that_is_no_setting_is_told() -> None:
    """A warning, as other programs may have variables of that form."""
    ended = run_module("service", *FAKE, "--host", "192.0.2.1", env={"JUDGE_MODLE": "x"})

    assert "JUDGE_MODLE is not a setting and does nothing; did you mean JUDGE_MODEL?" in ended.stderr


def test_a_broken_template_file_is_named(tmp_path: Path) -> None:
    """The service does not start without a template file that it was given."""
    (tmp_path / "mine.toml").write_text("[[template]\n")

    ended = run_module("service", *FAKE, "--template-file", str(tmp_path / "mine.toml"))

    assert ended.returncode == 1
    assert "mine.toml" in ended.stderr


@pytest.mark.parametrize("program", ["service", "service.worker"])
def test_an_unknown_parameter_in_the_queue_url_is_one_line(program: str) -> None:
    """The Redis client raises a TypeError for it."""
    ended = run_module(program, *FAKE, "--queue-url", "redis://127.0.0.1:1?bogus=1")

    assert "--queue-url" in only_line(ended, 1)


def test_a_port_in_use_is_reported_before_the_model_is_looked_for(taken: tuple[str, int]) -> None:
    """The line suggests another port; the model, which does not exist, is not mentioned."""
    host, port = taken

    ended = run_module("service", *NO_MODEL, "--host", host, "--port", str(port))

    assert only_line(ended, 2).endswith(f"cannot start: port {port} is in use; try --port {port + 1}")


@pytest.mark.parametrize("taken", ["127.0.0.1"], indirect=True)
def test_localhosts_port_in_use_is_reported_too(taken: tuple[str, int]) -> None:
    """A name is refused if one of its addresses is taken."""
    ended = run_module("service", *NO_MODEL, "--host", "localhost", "--port", str(taken[1]))

    assert f"port {taken[1]} is in use" in only_line(ended, 2)


@pytest.mark.parametrize("taken", ["127.0.0.1"], indirect=True)
def test_a_workers_metrics_port_in_use_is_reported_by_its_flag(taken: tuple[str, int]) -> None:
    """Also before the model is looked for."""
    flags = ("--queue-url", "redis://127.0.0.1:1", "--metrics-port", str(taken[1]))

    ended = run_module("service.worker", *NO_MODEL, *flags)

    assert f"port {taken[1]} is in use; try --metrics-port {taken[1] + 1}" in only_line(ended, 2)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("no-such-host.invalid", "--host no-such-host.invalid cannot be resolved"),
        ("a" * 70, "cannot be resolved"),
        ("192.0.2.1", "192.0.2.1 is not an address of this machine; try --host 127.0.0.1"),
    ],
)
def test_an_address_that_is_not_this_machines_is_one_line(host: str, expected: str) -> None:
    """It says what is wrong and which flag to change."""
    ended = run_module("service", *FAKE, "--host", host)

    assert expected in only_line(ended, 2)


@pytest.mark.parametrize("program", ["service", "service.worker", "service.models"])
def test_a_missing_package_is_one_line_that_names_the_extra(program: str) -> None:
    """With only the client installed there is no pydantic-settings, no structlog and no rich."""
    ended = run_code(
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['structlog', 'pydantic_settings', 'fastapi', 'rich', 'rich.console']))\n"
        f"runpy.run_module('{program}', run_name='__main__', alter_sys=True)\n"
    )

    line = only_line(ended, 1)
    assert line.startswith(f"python -m {program}: ")
    assert line.endswith("is missing: pip install -e '.[service]'")


@pytest.mark.parametrize(
    ("program", "flags"),
    [("service", ["--port", "0"]), ("service.worker", ["--queue-url", "redis://127.0.0.1:1"])],
)
def test_a_missing_engine_is_reported_before_the_model_is_fetched(program: str, flags: list[str]) -> None:
    """A process that runs the model needs torch; the HTTP side does not."""
    ended = run_code(
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = {['x', *flags, *NO_MODEL]}\n"
        f"runpy.run_module('{program}', run_name='__main__', alter_sys=True)\n"
    )

    assert ended.returncode == 1
    assert "needs torch, which is not installed: pip install -e '.[torch]'" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("program", ["service", "service.worker"])
@pytest.mark.parametrize("secret", ["", ":wrong@"])
def test_a_password_that_redis_refuses_ends_the_start(program: str, secret: str) -> None:
    """Unlike an unreachable Redis, a wrong password never gets better by itself. It is not printed."""
    with running_redis(password="right") as server:
        ended = run_module(program, *FAKE, "--queue-url", f"redis://{secret}127.0.0.1:{server.port}/0")

    line = only_line(ended, 1)
    assert "cannot start: Redis refuses the user or the password of --queue-url" in line
    assert "wrong" not in line

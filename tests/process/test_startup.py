"""Failed starts: each is one line that says what to do, and an exit status."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.fleet import run_module, started
from tests.support.redis_server import running_redis

FAKE = ("--engine", "fake")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "--port"),
        (["--engine", "abacus"], "--engine"),
        (["--queue-url", "ftp://localhost"], "--queue-url"),
        (["--no-such-flag"], "unrecognized"),
    ],
)
def test_bad_flags_end_with_status_2_and_say_which(arguments: list[str], said: str) -> None:
    """A mistake in the settings is one line, not a traceback."""
    ended = run_module("service", *arguments)

    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_bad_setting_does_not_show_the_keys() -> None:
    """Keys in the environment never reach the screen, also when the settings are refused."""
    ended = run_module("service", "--port", "99999", env={"JUDGE_API_KEY": "hunter2"})

    assert "hunter2" not in ended.stdout + ended.stderr


def test_an_unknown_model_ends_with_status_1_and_what_to_do() -> None:
    """The known names are listed."""
    ended = run_module("service", "--model", "no-such-model")

    assert ended.returncode == 1
    assert "smollm2-135m-instruct" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_template_file_that_does_not_load_ends_with_status_1(tmp_path: Path) -> None:
    """The file is named."""
    (tmp_path / "mine.toml").write_text("[[template]\n")

    ended = run_module("service", "--engine", "fake", "--template-file", str(tmp_path / "mine.toml"))

    assert ended.returncode == 1
    assert "mine.toml" in ended.stderr


@pytest.mark.parametrize("program", ["service", "service.worker"])
def test_an_unknown_parameter_of_the_queues_address_is_told_in_a_line(program: str) -> None:
    """Where the client library for Redis raises a TypeError."""
    ended = run_module(program, "--engine", "fake", "--queue-url", "redis://127.0.0.1:1?bogus=1")

    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "--queue-url" in ended.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_port_in_use_is_told_before_anything_is_loaded(host: str) -> None:
    """One line says which port would do; the model, which there is none of, is not looked for."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as other:
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with started("service", "--model", "no-such-model", "--host", host, "--port", str(port)) as service:
            said = service.communicate(timeout=30)[1]

    assert service.returncode == 1
    (line,) = said.splitlines()
    assert line.endswith(f"cannot start: port {port} is in use; try --port {port + 1}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "no-such-host.invalid"], "--host no-such-host.invalid cannot be resolved"),
        (["--host", "a" * 70], "cannot be resolved"),
        (["--host", "192.0.2.1"], "192.0.2.1 is not an address of this machine; try --host 127.0.0.1"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_line(flags: list[str], said: str) -> None:
    """It says what is wrong and which flag decides."""
    with started("service", *FAKE, *flags) as service:
        heard = service.communicate(timeout=30)[1]

    assert service.returncode == 1
    (line,) = heard.splitlines()
    assert said in line


def test_a_workers_metrics_port_in_use_is_told_by_its_flag() -> None:
    """Before the model is loaded, too."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        flags = ("--queue-url", "redis://127.0.0.1:1", "--metrics-port", str(port))
        with started("service.worker", "--model", "no-such-model", *flags) as worker:
            said = worker.communicate(timeout=30)[1]

    assert worker.returncode == 1
    assert f"port {port} is in use; try --metrics-port {port + 1}" in said


@pytest.mark.parametrize("program", ["service", "service.worker", "service.models"])
def test_a_missing_package_is_one_line_that_names_the_extra(program: str) -> None:
    """Where only the client is installed, there is no pydantic-settings, no structlog and no rich."""
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['structlog', 'pydantic_settings', 'fastapi', 'rich', 'rich.console']))\n"
        f"runpy.run_module('{program}', run_name='__main__', alter_sys=True)\n"
    )
    ended = run_code(code)

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"python -m {program}: ")
    assert line.endswith("is missing: pip install 'judge-as-api[service]'")


@pytest.mark.parametrize("flags", [["service"], ["service.worker", "--queue-url", "redis://127.0.0.1:1"]])
def test_an_engine_that_is_not_installed_is_told_before_the_model_is_fetched(flags: list[str]) -> None:
    """The HTTP side does not need torch; a process that runs the model does."""
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = {['x', *flags[1:], '--model', 'no-such-model', *(['--port', '0'] if len(flags) == 1 else [])]}\n"
        f"runpy.run_module('{flags[0]}', run_name='__main__', alter_sys=True)\n"
    )
    ended = run_code(code)

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "needs torch, which is not installed: pip install 'judge-as-api[torch]'" in line


@pytest.mark.parametrize("program", ["service", "service.worker"])
@pytest.mark.parametrize("secret", ["", ":wrong@"])
def test_a_password_that_redis_refuses_is_told_at_the_start(program: str, secret: str) -> None:
    """It would never get better by itself, unlike a Redis that is not there yet."""
    with running_redis(password="right") as server:
        url = f"redis://{secret}127.0.0.1:{server.port}/0"
        with started(program, *FAKE, "--queue-url", url) as process:
            said = process.communicate(timeout=30)[1]

    assert process.returncode == 1
    (line,) = said.splitlines()
    assert "cannot start: Redis refuses the user or the password of --queue-url" in line
    assert "wrong" not in line

"""Secrets in files: JUDGE_API_KEY_FILE, JUDGE_QUEUE_PASSWORD_FILE, JUDGE_UPSTREAM_API_KEY_FILE."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.cli import settings_from
from service.settings import Settings, UpstreamKey, WorkerSettings
from tests.support.live import PAIR, live_service


def secret(folder: Path, text: str) -> str:
    """A file with this text."""
    file = folder / "secret"
    file.write_text(text)
    return str(file)


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    """On a line each or separated by commas; the newline at the end is not part of a key."""
    with live_service(api_key_file=secret(tmp_path, "first\nsecond, third\n\n")) as live:
        statuses = [
            live.http.post("/score", json=PAIR, headers={"Authorization": f"Bearer {key}"}).status_code
            for key in ("first", "second", "third", "fourth")
        ]

    assert statuses == [200, 200, 200, 401]


@pytest.mark.parametrize("text", ["", "\n", " \n"])
def test_an_empty_file_does_not_open_the_service(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A secret that failed to load ends the start with status 2 and the file's name."""
    monkeypatch.setenv("JUDGE_API_KEY_FILE", secret(tmp_path, text))

    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, [])

    assert ended.value.code == 2
    assert f"{tmp_path}/secret is empty" in capsys.readouterr().err


def test_a_file_that_is_no_secret_is_not_read_whole() -> None:
    """A device has no end."""
    with pytest.raises(ValidationError, match="/dev/zero is longer than 1,000,000 characters"):
        Settings(api_key_file="/dev/zero")


def test_a_variable_set_to_nothing_does_not_open_the_service(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with the key itself: a name that was not filled in is not the wish for no keys."""
    monkeypatch.setenv("JUDGE_API_KEY_FILE", "")

    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, [])

    assert ended.value.code == 2
    assert "JUDGE_API_KEY_FILE is set to nothing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["api_key", "queue_password"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    """With the variable, and why it cannot be read."""
    with pytest.raises(ValidationError, match=rf"JUDGE_{name.upper()}_FILE: cannot read .*/absent: No such file"):
        Settings.model_validate({f"{name}_file": tmp_path / "absent", "queue_url": "redis://redis:6379/0"})


def test_a_secret_given_twice_is_refused_without_being_shown(tmp_path: Path) -> None:
    """Which of the two counts is not ours to say."""
    with pytest.raises(ValidationError, match="not both") as refused:
        Settings(api_key="given", api_key_file=secret(tmp_path, "stored"))

    assert not any(key in str(refused.value) for key in ("given", "stored"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://redis:6379/0", "redis://:p%40ss%2Fword@redis:6379/0"),
        ("rediss://judge@redis", "rediss://judge:p%40ss%2Fword@redis"),
        ("redis://[::1]:6379/0?protocol=3", "redis://:p%40ss%2Fword@[::1]:6379/0?protocol=3"),
    ],
)
def test_the_queues_password_is_put_into_its_url(url: str, expected: str, tmp_path: Path) -> None:
    """For both programs, quoted; a user named in the URL stays."""
    file = secret(tmp_path, "p@ss/word\n")

    assert Settings(queue_url=url, queue_password_file=file).queue_url == expected
    assert WorkerSettings(queue_url=url, queue_password_file=file).queue_url == expected


@pytest.mark.parametrize("url", ["memory://", "unix:///run/redis.sock", "redis://:other@redis:6379/0"])
def test_a_password_that_cannot_be_used_is_refused(url: str, tmp_path: Path) -> None:
    """Rather than dropped."""
    with pytest.raises(ValidationError, match="password"):
        Settings(queue_url=url, queue_password_file=secret(tmp_path, "word"))


def test_the_upstreams_key_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment, as the key itself; a variable that is set to nothing counts as unset."""
    monkeypatch.setenv("JUDGE_UPSTREAM_API_KEY", "")
    monkeypatch.setenv("JUDGE_UPSTREAM_API_KEY_FILE", secret(tmp_path, "upstream\n"))
    key = UpstreamKey().upstream_api_key
    assert key is not None

    assert key.get_secret_value() == "upstream"

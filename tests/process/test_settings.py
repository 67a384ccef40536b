"""The settings of both programs: names and defaults, the groups of --help, and what each engine refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from service.cli import settings_from
from service.settings import (
    CommonSettings,
    EngineSettings,
    FakeSettings,
    LocalSettings,
    Settings,
    TorchSettings,
    UpstreamSettings,
    VllmSettings,
    WorkerSettings,
)
from service.settings.variables import unknown_variables
from tests.support.fleet import ROOT

# By name: the default, and another value as text. None of these may change unannounced.
COMMON: dict[str, tuple[object, str]] = {
    "model": (None, "smollm2-135m-instruct"),
    "engine": ("torch", "upstream"),
    "judge": ("yes-no", "pairwise"),
    "self_reward_mode": ("expectation", "parsed"),
    "self_reward_samples": (1, "3"),
    "self_reward_tokens": (256, "64"),
    "max_tokens": (None, "512"),
    "template_file": ([], "a.toml,b.json"),
    "batch_tokens": (None, "1000"),
    "batch_jobs": (256, "8"),
    "linger_ms": (1.0, "0"),
    "stall_timeout": (None, "3.5"),
    "dtype": ("auto", "float32"),
    "threads": (None, "2"),
    "device": ("auto", "cpu"),
    "native_kernels": (True, "false"),
    "lora": (None, "mine=folder"),
    "tensor_parallel_size": (1, "2"),
    "data_parallel_size": (1, "2"),
    "quantization": (None, "fp8"),
    "gpu_memory_utilization": (None, "0.5"),
    "deterministic": (False, "true"),
    "vllm_args": ({}, '{"enforce_eager": true}'),
    "upstream_url": (None, "http://localhost:8000/v1"),
    "upstream_model": (None, "gpt-oss"),
    "upstream_api": ("auto", "chat"),
    "upstream_top_logprobs": (20, "5"),
    "upstream_body": ({}, '{"seed": 1}'),
    "floor": (None, "-20"),
    "upstream_concurrency": (32, "4"),
    "upstream_timeout": (30.0, "5"),
    "upstream_retries": (5, "0"),
    "fake_delay": (0.0, "0.5"),
    "fake_unparseable": (0.0, "0.5"),
    "fake_crash_token": (None, "7"),
    "fake_hang_token": (None, "7"),
    "queue_url": ("memory://", "redis://localhost"),
    "key_prefix": ("judge", "other"),
    "log_format": ("console", "json"),
    "log_level": ("info", "debug"),
    "otel_endpoint": (None, "http://localhost:4318"),
}
OF_WORKERS: dict[str, tuple[object, str]] = {
    "lease_seconds": (10.0, "5"),
    "metrics_port": (None, "9000"),
    "metrics_host": ("127.0.0.1", "0.0.0.0"),
}
OF_HTTP: dict[str, tuple[object, str]] = {
    "host": ("127.0.0.1", "0.0.0.0"),
    "port": (8000, "0"),
    "allowed_hosts": ([], "judge.example.com,*.lan"),
    "cors_origins": ([], "https://judge.example.com"),
    "root_path": ("", "/judge"),
    "api_key": ([], "first,second"),
    "playground": (True, "false"),
    "max_queue_jobs": (16_384, "100"),
    "max_queue_tokens": (8_000_000, "1000"),
    "max_batch_items": (1024, "10"),
    "max_body_bytes": (2**24, "2048"),
    "body_timeout": (30.0, "5"),
    "request_timeout": (300.0, "5"),
    "drain_timeout": (30.0, "0"),
    "rate_limit": (None, "60"),
    "chat_date": (None, "2025-01-31"),
    "choice_rotations": (1, "4"),
    "rerank_template": ("rerank", "rerank-qwen3"),
    "tokenizer_threads": (2, "4"),
    "calibration_file": ([], "a.json,b.json"),
    "cache_entries": (100_000, "0"),
    "cache_ttl": (86_400.0, "60"),
}
PROGRAMS: dict[type[CommonSettings], dict[str, tuple[object, str]]] = {
    Settings: COMMON | OF_HTTP,
    WorkerSettings: COMMON | OF_WORKERS,
}
# Unset by default, and no settings of their own: what they hold becomes part of another.
SECRETS = {
    Settings: ("api_key_file", "queue_password", "queue_password_file"),
    WorkerSettings: ("queue_password", "queue_password_file"),
}
EVERY = [(cls, name, text) for cls, settings in PROGRAMS.items() for name, (_, text) in settings.items()]
ENGINES = ["torch and vllm engines", "torch engine", "vllm engine", "upstream engine"]
GROUPS = {
    Settings: [
        *("common flags", "model and judge", "batching", *ENGINES, "queue", "logging and tracing"),
        *("HTTP", "limits", "prompts and scores", "help"),
    ],
    WorkerSettings: [
        *("common flags", "model and judge", "batching", *ENGINES, "queue", "logging and tracing", "worker", "help"),
    ],
}


def flag(name: str, text: str) -> list[str]:
    """The setting as command line arguments."""
    kebab = name.replace("_", "-")
    return {"true": [f"--{kebab}"], "false": [f"--no-{kebab}"]}.get(text, [f"--{kebab}", text])


def groups(cls: type[CommonSettings], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The text of each group of --help, by title."""
    with pytest.raises(SystemExit) as ended:
        settings_from(cls, ["--help"])
    assert ended.value.code == 0
    _, *parts = re.split(r"^(\w[^:\n]*):\n", capsys.readouterr().out, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("cls", PROGRAMS)
def test_names_and_defaults_stay_as_deployments_expect_them(cls: type[CommonSettings]) -> None:
    """A renamed flag or variable breaks somebody's command."""
    read = settings_from(cls, [])

    defaults = {name: default for name, (default, _) in PROGRAMS[cls].items()}
    assert read.model_dump() == defaults | dict.fromkeys(SECRETS[cls])


@pytest.mark.parametrize(("cls", "name", "text"), EVERY)
def test_a_flag_and_its_variable_set_the_same(
    cls: type[CommonSettings], name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max-tokens and JUDGE_MAX_TOKENS, for example, and no other setting changes."""
    default, by_flag = settings_from(cls, []), settings_from(cls, flag(name, text))
    monkeypatch.setenv(f"JUDGE_{name.upper()}", text)
    by_variable = settings_from(cls, [])

    assert by_flag == by_variable
    assert {key for key, value in by_flag if value != getattr(default, key)} == {name}


def test_a_flag_overrides_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line wins over the environment."""
    monkeypatch.setenv("JUDGE_MAX_TOKENS", "512")

    assert settings_from(Settings, ["--max-tokens", "256"]).max_tokens == 256


@pytest.mark.parametrize("cls", PROGRAMS)
def test_help_lists_the_flags_in_titled_groups(cls: type[CommonSettings], capsys: pytest.CaptureFixture[str]) -> None:
    """Each flag once, except the fake engine's, which are for tests."""
    shown = groups(cls, capsys)

    assert list(shown) == GROUPS[cls]
    shown.pop("help")
    listed = re.findall(r"^  --([\w-]+)", "".join(shown.values()), flags=re.M)
    names = (*PROGRAMS[cls], *SECRETS[cls])
    expected = [name.replace("_", "-") for name in names if not name.startswith("fake_")]
    assert sorted(listed) == sorted(expected)
    assert "--fake" not in "".join(shown.values())


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("common flags", "--model"),
        ("common flags", "--port"),
        ("model and judge", "--self-reward-mode"),
        ("batching", "--linger-ms"),
        ("torch and vllm engines", "--dtype"),
        ("torch engine", "--native-kernels"),
        ("vllm engine", "--lora"),
        ("upstream engine", "--floor"),
        ("queue", "--key-prefix"),
        ("logging and tracing", "--otel-endpoint"),
        ("HTTP", "--allowed-hosts"),
        ("limits", "--rate-limit"),
        ("prompts and scores", "--cache-ttl"),
    ],
)
def test_a_flag_is_in_its_group(title: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The group's title says which engine a flag is for."""
    assert f"  {name}" in groups(Settings, capsys)[title]


@pytest.mark.parametrize("cls", PROGRAMS)
def test_help_names_types_in_words(cls: type[CommonSettings], capsys: pytest.CaptureFixture[str]) -> None:
    """No Python types, and on or off for switches."""
    shown = "".join(groups(cls, capsys).values())

    values = set(re.findall(r"^  --[\w-]+ ([^\s{]+)(?=  |$)", shown, flags=re.M))
    both = {"ADDRESS", "FILE", "FILES", "JSON", "MODEL", "N", "NAME=FOLDER", "SECRET", "TEXT", "URL"}
    assert values == (both | {"KEYS", "LIST", "YYYY-MM-DD"} if cls is Settings else both)
    assert "True" not in shown


def test_help_all_shows_the_fake_engines_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    """With a line about each."""
    with pytest.raises(SystemExit):
        settings_from(Settings, ["--help-all"])

    assert "--fake-delay N        seconds per batch" in capsys.readouterr().out


def test_the_variables_of_other_programs_are_known() -> None:
    """Those of docker-compose.yml and .env.example, exported for compose, are no mistakes."""
    files = "".join((ROOT / name).read_text("utf-8") for name in ("docker-compose.yml", ".env.example"))
    named = re.findall(r"(?:\$\{|^ *#? ?)(JUDGE_[A-Z_]+)(?=[:=}])", files, flags=re.M)

    assert len(named) > 40
    assert unknown_variables(named) == []


def test_a_variable_that_nothing_reads_is_told_with_the_one_that_was_meant() -> None:
    """Other programs' variables are not mentioned."""
    sentences = unknown_variables(["JUDGE_MODLE", "JUDGE_PORT", "JUDGE_TEST_PAIRS", "MODEL"])

    assert sentences == ["JUDGE_MODLE is not a setting and does nothing; did you mean JUDGE_MODEL?"]


def test_an_unknown_flag_is_reported_in_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """The error does not list sixty flags."""
    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, ["--enginge", "fake"])

    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "usage: python -m service [flags]\n"
        "python -m service: error: there is no flag --enginge; did you mean --engine? (--help lists the flags)\n"
    )


def test_every_mistake_has_a_line_that_names_the_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the environment names the variable."""
    monkeypatch.setenv("JUDGE_MAX_TOKENS", "many")
    with pytest.raises(SystemExit) as ended:
        settings_from(WorkerSettings, ["--lease-seconds", "0"])

    assert ended.value.code == 2
    starts = [line.split(": ")[:2] for line in capsys.readouterr().err.splitlines()]
    assert starts == [
        ["python -m service.worker", "JUDGE_MAX_TOKENS"],
        ["python -m service.worker", "--lease-seconds"],
    ]


def test_settings_that_contradict_each_other_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names both settings, and no third flag."""
    parsed = ["--judge", "self-reward", "--self-reward-mode", "parsed", "--self-reward-samples", "4"]
    with pytest.raises(SystemExit):
        settings_from(Settings, [*parsed, "--max-queue-jobs", "3"])

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "max-queue-jobs must be at least self-reward-samples" in error
    assert "--" not in error


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (EngineSettings, {"engine": "abacus"}),
        (EngineSettings, {"self_reward_samples": 65}),
        (EngineSettings, {"batch_jobs": 0}),
        (EngineSettings, {"linger_ms": 1001}),
        (LocalSettings, {"dtype": "int8"}),
        (TorchSettings, {"threads": 0}),
        (TorchSettings, {"lora": "mine=folder"}),
        (VllmSettings, {"lora": "no-name"}),
        (VllmSettings, {"gpu_memory_utilization": 1.1}),
        (VllmSettings, {"vllm_args": "{"}),
        (VllmSettings, {"device": "cuda"}),
        (UpstreamSettings, {"upstream_url": "ftp://localhost"}),
        (UpstreamSettings, {"upstream_url": "http://user:secret@localhost"}),
        (UpstreamSettings, {"upstream_body": "[1]"}),
        (UpstreamSettings, {"floor": 0.0}),
        (UpstreamSettings, {"upstream_timeout": 0}),
        (FakeSettings, {"fake_unparseable": 1.1}),
    ],
    ids=str,
)
def test_an_engines_settings_refuse_values_that_it_cannot_use(cls: type[EngineSettings], wrong: Any) -> None:
    """Values out of range, and settings of other engines."""
    with pytest.raises(ValidationError, match=next(iter(wrong))) as refused:
        cls(**wrong)

    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("cls", [TorchSettings, VllmSettings, UpstreamSettings, FakeSettings])
def test_a_programs_settings_include_those_of_each_engine(cls: type[EngineSettings]) -> None:
    """An engine can be loaded from either program's settings or from its own class; both read the same variables."""
    own = cls(batch_jobs=8)

    assert issubclass(Settings, cls)
    assert issubclass(WorkerSettings, cls)
    assert own.model_dump() == Settings(batch_jobs=8).model_dump(include=set(cls.model_fields))


@pytest.mark.parametrize("flag", ["--drain-timeout", "--request-timeout", "--cache-ttl", "--upstream-timeout"])
def test_an_infinite_time_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Infinity would break the arithmetic of timeouts."""
    with pytest.raises(SystemExit):
        settings_from(Settings, [flag, "inf"])

    assert f"{flag}: " in capsys.readouterr().err


def test_a_stray_value_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    """It may be a key."""
    with pytest.raises(SystemExit):
        settings_from(Settings, ["--api-key", "one,", "secret", "--upstream-api-key=hidden"])

    error = capsys.readouterr().err
    assert "--upstream-api-key" in error
    assert "secret" not in error
    assert "hidden" not in error


@pytest.mark.parametrize("name", ["JUDGE_MODEL", "JUDGE_UPSTREAM_MODEL"])
def test_an_empty_name_counts_as_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass an unset variable as an empty one."""
    monkeypatch.setenv(name, "")
    settings = settings_from(Settings, [])

    assert (settings.model, settings.upstream_model) == (None, None)


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a": NaN}'])
def test_invalid_json_is_refused_in_one_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nested too deeply, or with a number that JSON does not have."""
    with pytest.raises(SystemExit):
        settings_from(Settings, ["--upstream-body", value])

    assert capsys.readouterr().err.count("\n") == 1

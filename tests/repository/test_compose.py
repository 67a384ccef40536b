"""docker-compose.yml, the Dockerfile and their settings, as files. `make test-compose` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml  # type: ignore[import-untyped]

from client import __main__ as client_main
from deploy.compose import COMPOSE_FILE, DOCKERFILE, ROOT, Service, instructions, interpolated, load, seconds, stages
from service.models.__main__ import argument_parser as models_parser
from service.settings import (
    EngineSettings,
    ModelSettings,
    Settings,
    TorchSettings,
    UpstreamKey,
    VllmSettings,
    WorkerSettings,
)
from trainer.self_improve import argument_parser as loop_parser

# The Compose Specification's schema (Apache-2.0), from the Python package docker-compose 1.29.2.
SCHEMA = Path(__file__).parents[1] / "data" / "compose-spec.json"
OURS = ("model", "api", "worker", "worker-cpu", "bench", "trainer", "trainer-cpu")
# Settings of the process that runs the model: they change neither prompts nor which workers an API process finds.
ENGINE_ALONE = {
    *(set(EngineSettings.model_fields) - set(ModelSettings.model_fields) - {"stall_timeout"}),
    *(set(TorchSettings.model_fields) - set(ModelSettings.model_fields) - {"stall_timeout"}),
    *(set(VllmSettings.model_fields) - set(ModelSettings.model_fields) - {"stall_timeout", "lora"}),
    *("upstream_concurrency", "upstream_timeout", "upstream_retries"),
}
RUNNING = ("redis", "api", "worker", "worker-cpu", "prometheus", "grafana")


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """The services with no variable set."""
    return load({})


@pytest.fixture
def document() -> dict[str, Any]:
    """docker-compose.yml with no variable set, without `name`, which is newer than the schema."""
    loaded: dict[str, Any] = interpolated(yaml.safe_load(COMPOSE_FILE.read_text()), {})
    loaded.pop("name")
    return loaded


def test_the_file_matches_the_specification(document: dict[str, Any]) -> None:
    """It validates against the schema."""
    validator = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))

    assert [str(error) for error in validator.iter_errors(document)] == []


def test_a_mistake_does_not_match_the_specification(document: dict[str, Any]) -> None:
    """The schema is strict: it refuses unknown fields."""
    document["services"]["redis"]["healtcheck"] = {}

    assert not jsonschema_rs.validator_for(json.loads(SCHEMA.read_text())).is_valid(document)


def test_up_without_a_profile_starts_a_whole_deployment(services: dict[str, Service]) -> None:
    """Redis, the model, the API and the GPU worker have no profile."""
    assert {name for name, service in services.items() if not service.profiles} == {"redis", "model", "api", "worker"}


def test_only_the_gpu_services_reserve_a_gpu(services: dict[str, Service]) -> None:
    """worker and trainer do; their CPU variants do not."""
    reserving = {
        name
        for name, service in services.items()
        if "devices" in service.definition.get("deploy", {}).get("resources", {}).get("reservations", {})
    }

    assert reserving == {"worker", "trainer"}


def test_both_workers_differ_only_in_their_image(services: dict[str, Service]) -> None:
    """Their command and environment are the same, so a check of one holds for the other."""
    gpu, cpu = services["worker"], services["worker-cpu"]

    assert (gpu.command, gpu.environment, gpu.healthcheck) == (cpu.command, cpu.environment, cpu.healthcheck)
    assert {gpu.target, cpu.target} == {"worker-gpu", "worker-cpu"}


def test_workers_can_be_scaled(services: dict[str, Service]) -> None:
    """They have no fixed name or published port, which only one process could have."""
    for name in ("worker", "worker-cpu"):
        assert not {"container_name", "ports", "hostname"} & set(services[name].definition)


def test_every_dependency_condition_can_become_true(services: dict[str, Service]) -> None:
    """A service that must be healthy has a health check; one that must complete has none."""
    for service in services.values():
        for other, condition in service.depends_on.items():
            assert condition in ("service_healthy", "service_completed_successfully")
            assert (services[other].healthcheck is not None) == (condition == "service_healthy")


def test_every_long_running_service_is_checked_limited_and_restarted(services: dict[str, Service]) -> None:
    """It has a health check, a memory limit and a restart policy."""
    for name in RUNNING:
        assert services[name].healthcheck is not None
        assert services[name].definition["deploy"]["resources"]["limits"]["memory"]
        assert services[name].definition["restart"] == "unless-stopped"


def test_no_service_has_rights_that_it_does_not_need(services: dict[str, Service]) -> None:
    """Read-only root, no capabilities, no new privileges; ports on loopback by default."""
    for service in services.values():
        assert service.definition["read_only"] is True
        assert service.definition["cap_drop"] == ["ALL"]
        assert service.definition["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.definition.get("ports", []))


def test_the_api_has_time_to_drain(services: dict[str, Service]) -> None:
    """Compose kills it only after its own drain timeout."""
    assert services["api"].stop_grace > Settings.model_fields["drain_timeout"].default


def test_variables_reach_the_programs() -> None:
    """Variables set in .env are passed on; others are absent rather than empty."""
    services = load({"JUDGE_MODEL": "org/name", "JUDGE_DTYPE": "float32", "JUDGE_API_KEY": "k1,k2"})

    assert services["api"].environment["JUDGE_MODEL"] == services["worker"].environment["JUDGE_MODEL"] == "org/name"
    assert services["model"].command[-1] == "org/name"
    assert services["worker"].environment["JUDGE_DTYPE"] == "float32"
    assert services["api"].environment["JUDGE_API_KEY"] == "k1,k2"
    assert "JUDGE_MAX_TOKENS" not in services["api"].environment


def test_only_services_that_need_the_key_get_it() -> None:
    """The API checks it; bench and trainers send it."""
    services = load({"JUDGE_API_KEY": "hunter2"})

    knowing = {name for name, service in services.items() if "hunter2" in repr((service.environment, service.command))}
    assert knowing == {"api", "bench", "trainer", "trainer-cpu"}


@pytest.mark.parametrize(("name", "settings"), [("api", Settings), ("worker", WorkerSettings)])
def test_a_program_understands_its_command_and_environment(
    services: dict[str, Service], name: str, settings: type[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every JUDGE_ variable is a setting, and all flags and values are valid."""
    fields = {**settings.model_fields, **UpstreamKey.model_fields}
    known = {f"JUDGE_{field.upper()}" for field in fields} | {"JUDGE_CACHE_DIR"}
    for variable, value in services[name].environment.items():
        monkeypatch.setenv(variable, value)
    named = {variable for variable in services[name].definition["environment"] if variable.startswith("JUDGE_")}
    read = settings(_cli_parse_args=services[name].command[3:])

    assert named <= known
    assert (read.queue_url, read.log_format) == ("redis://redis:6379/0", "json")


def test_the_other_programs_understand_their_commands(
    services: dict[str, Service], capsys: pytest.CaptureFixture[str]
) -> None:
    """`service.models fetch`, `client rewardbench` and `trainer.self_improve` accept every argument."""
    asked = models_parser().parse_args(services["model"].command[3:])
    loop = loop_parser().parse_args(services["trainer"].command[3:])
    with pytest.raises(SystemExit) as ended:
        client_main.main([*services["bench"].command[3:], "--help"])

    assert asked.names == ["qwen2.5-coder-1.5b-instruct"]
    assert str(loop.output) == "/runs/improve"
    assert ended.value.code == 0
    assert "--data" in capsys.readouterr().out


def test_commands_run_modules_of_this_repository(services: dict[str, Service]) -> None:
    """Each is `python -m` with a module that exists."""
    for name in OURS:
        python, flag, module = services[name].command[:3]
        assert (python, flag) == ("python", "-m")
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / module.replace(".", "/") / "__main__.py"
        ).exists()


def test_health_checks_in_python_compile() -> None:
    """In the Dockerfile and in the compose file."""
    checks = [service.healthcheck.command for service in load({}).values() if service.healthcheck]
    checks += [stage.healthcheck for stage in stages(DOCKERFILE.read_text()).values() if stage.healthcheck]

    for command in checks:
        if command[0] == "python":
            compile(command[2], "healthcheck", "exec")


def test_no_image_runs_as_root() -> None:
    """Each target has another user and an entry point."""
    for name in ("api", "worker-cpu", "worker-gpu", "trainer", "bench"):
        stage = stages(DOCKERFILE.read_text())[name]
        assert stage.user == "judge"
        assert stage.entrypoint[:2] == ["python", "-m"]
        assert stage.environment["HOME"] == "/tmp"  # the only writable folder


def test_the_base_image_is_an_argument_and_pinned() -> None:
    """FROM names BASE or another stage, and BASE has a full version."""
    by_name = stages(DOCKERFILE.read_text())
    arguments = dict(rest.partition("=")[::2] for name, rest in instructions(DOCKERFILE.read_text()) if name == "ARG")

    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", arguments["BASE"])
    for stage in by_name.values():
        assert stage.base in ("${BASE}", "torch-${TRAINER_TORCH}", *by_name)


def test_dependencies_are_installed_before_the_code_is_copied() -> None:
    """Only the stage `code` copies it, so a change of the code keeps the cached layers of dependencies."""
    copying = {
        name
        for name, stage in stages(DOCKERFILE.read_text()).items()
        for instruction, rest in stage.instructions
        if instruction == "COPY" and re.match(r"(client|service|trainer|\.)\s", rest)
    }

    assert copying == {"code"}


def test_copied_files_are_in_the_build_context() -> None:
    """.dockerignore admits what COPY names, but neither data nor settings."""
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word.split("/")[0]
        for stage in stages(DOCKERFILE.read_text()).values()
        for name, rest in stage.instructions
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    }

    assert copied <= admitted
    assert not {".env", "data", "runs"} & admitted


def test_the_example_env_file_has_every_variable_that_is_read() -> None:
    """And no other; all are commented out."""
    text = COMPOSE_FILE.read_text()
    example = (ROOT / ".env.example").read_text()
    passed_on = set(re.findall(r"^ +([A-Z][A-Z0-9_]+):$", text, re.MULTILINE))
    interpolated_ = set(re.findall(r"\$\{([A-Z0-9_]+)", text))

    assert set(re.findall(r"^#?([A-Z0-9_]+)=", example, re.MULTILINE)) == passed_on | interpolated_
    assert re.search(r"^[A-Z_]+=", example, re.MULTILINE) is None


@pytest.mark.parametrize(
    ("name", "settings", "fixed"),
    [
        ("api", Settings, {"host", "port", "log_format"} | ENGINE_ALONE),
        ("worker", WorkerSettings, {"metrics_host", "metrics_port", "log_format"}),
    ],
)
def test_compose_passes_every_setting_on(
    services: dict[str, Service], name: str, settings: type[Settings], fixed: set[str]
) -> None:
    """Except those that the image's command fixes, and those of an engine, which the API does not run."""
    fields = {field for field in settings.model_fields if not field.startswith("fake_")}
    fields |= set(UpstreamKey.model_fields)
    named = {variable.removeprefix("JUDGE_").lower() for variable in services[name].definition["environment"]}

    assert fields - fixed - named == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "1"),
        ("${B:-x}", "x"),
        ("${E:-x}", "x"),
        ("${B:-${A:-y}}:${A}", "1:1"),
        ("$$A ${B}.", "$A ."),
    ],
)
def test_variables_are_interpolated(text: str, expected: str) -> None:
    """Like docker compose does: unset and empty ones take their default, which may contain another variable."""
    assert interpolated([text], {"A": "1", "E": ""}) == [expected]


@pytest.mark.parametrize("text", ["${A", "$", "${A?none}"])
def test_an_unknown_variable_syntax_is_refused(text: str) -> None:
    """The reader does not guess."""
    with pytest.raises(ValueError, match="cannot read the variable"):
        interpolated(text, {"A": "1"})


def test_durations_are_parsed() -> None:
    """In Compose's format."""
    assert (seconds("1m30s"), seconds("500ms")) == (90, 0.5)
    with pytest.raises(ValueError, match="not a duration"):
        seconds("10")


def test_a_stage_inherits_from_the_stage_below() -> None:
    """It inherits environment, entry point and user, and may override them."""
    text = 'FROM x AS a\nENV A=1 \\\n  B=2\n# no\nENTRYPOINT ["p"]\nUSER u\nFROM a AS b\nENV B=3\nCMD ["q"]\n'
    stage = stages(text)["b"]

    assert stage.environment == {"A": "1", "B": "3"}
    assert (stage.entrypoint, stage.command, stage.user) == (["p"], ["q"], "u")

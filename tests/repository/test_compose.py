"""docker-compose.yml, the Dockerfile and what belongs to them, as they are read; `make test-compose` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml  # type: ignore[import-untyped]

from client import __main__ as client_main
from client.errors import ErrorCode
from deploy import monitoring
from deploy.compose import COMPOSE_FILE, DOCKERFILE, ROOT, Service, instructions, interpolated, load, seconds, stages
from service.models.__main__ import _parser as models_parser
from service.settings import Settings, UpstreamKey, WorkerSettings
from service.telemetry.metrics import Metrics
from trainer.self_improve import argument_parser as loop_parser

# Of the Compose Specification (Apache-2.0), as the Python package docker-compose 1.29.2 carries it.
SCHEMA = Path(__file__).parents[1] / "data" / "compose-spec.json"
# Of a dashboard of Grafana 11.2; data/README.md says how it was made.
DASHBOARD_SCHEMA = SCHEMA.with_name("grafana-dashboard.json")
OURS = ("model", "api", "worker", "worker-cpu", "bench", "trainer", "trainer-cpu")
RUNNING = ("redis", "api", "worker", "worker-cpu", "prometheus", "grafana")


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """The services with nothing set."""
    return load({})


def document() -> dict[str, Any]:
    """docker-compose.yml with nothing set."""
    loaded: dict[str, Any] = interpolated(yaml.safe_load(COMPOSE_FILE.read_text()), {})
    return loaded


def schema() -> Any:
    """The specification's schema."""
    return jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))


def test_the_file_fits_the_specification() -> None:
    """It validates against the schema, which is older than the field `name`."""
    compose = document()
    compose.pop("name")

    assert [
        str(error) for error in jsonschema_rs.validator_for(json.loads(SCHEMA.read_text())).iter_errors(compose)
    ] == []


def test_a_mistake_does_not_fit_the_specification() -> None:
    """The schema is strict: a field that it does not know is found."""
    compose = document()
    compose.pop("name")
    compose["services"]["redis"]["healtcheck"] = {}

    assert not schema().is_valid(compose)


def test_up_without_a_profile_is_the_whole_deployment(services: dict[str, Service]) -> None:
    """Redis, the model, the API and the worker with a GPU belong to no profile."""
    assert {name for name, service in services.items() if not service.profiles} == {"redis", "model", "api", "worker"}


def test_only_what_wants_a_gpu_reserves_one(services: dict[str, Service]) -> None:
    """worker and trainer do; nothing of the cpu profiles does."""
    reserving = {
        name
        for name, service in services.items()
        if "devices" in service.definition.get("deploy", {}).get("resources", {}).get("reservations", {})
    }

    assert reserving == {"worker", "trainer"}


def test_both_workers_differ_in_their_image_alone(services: dict[str, Service]) -> None:
    """The same command and environment: what is checked of one holds for the other."""
    gpu, cpu = services["worker"], services["worker-cpu"]

    assert (gpu.command, gpu.environment, gpu.healthcheck) == (cpu.command, cpu.environment, cpu.healthcheck)
    assert {gpu.target, cpu.target} == {"worker-gpu", "worker-cpu"}


def test_workers_can_be_scaled(services: dict[str, Service]) -> None:
    """No fixed name and no published port, of which there could be one only."""
    for name in ("worker", "worker-cpu"):
        assert not {"container_name", "ports", "hostname"} & set(services[name].definition)


def test_dependencies_can_be_waited_for(services: dict[str, Service]) -> None:
    """What others wait for to be healthy has a health check, and what they wait for to end has none."""
    for service in services.values():
        for other, condition in service.depends_on.items():
            assert condition in ("service_healthy", "service_completed_successfully")
            assert (services[other].healthcheck is not None) == (condition == "service_healthy")


def test_everything_that_runs_is_checked_limited_and_restarted(services: dict[str, Service]) -> None:
    """A health check, a limit of memory, a restart."""
    for name in RUNNING:
        assert services[name].healthcheck is not None
        assert services[name].definition["deploy"]["resources"]["limits"]["memory"]
        assert services[name].definition["restart"] == "unless-stopped"


def test_nothing_has_rights_that_it_does_not_need(services: dict[str, Service]) -> None:
    """A read-only root, no capabilities, no way to more; ports on loopback unless told otherwise."""
    for service in services.values():
        assert service.definition["read_only"] is True
        assert service.definition["cap_drop"] == ["ALL"]
        assert service.definition["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.definition.get("ports", []))


def test_an_api_process_has_time_to_drain(services: dict[str, Service]) -> None:
    """It is killed later than it gives up by itself."""
    assert services["api"].stop_grace > Settings.model_fields["drain_timeout"].default


def test_variables_reach_the_programs() -> None:
    """What .env sets is in the environment; what it does not set is not there at all."""
    services = load({"JUDGE_MODEL": "org/name", "JUDGE_DTYPE": "float32", "JUDGE_API_KEY": "k1,k2"})

    assert services["api"].environment["JUDGE_MODEL"] == services["worker"].environment["JUDGE_MODEL"] == "org/name"
    assert services["model"].command[-1] == "org/name"
    assert services["worker"].environment["JUDGE_DTYPE"] == "float32"
    assert services["api"].environment["JUDGE_API_KEY"] == "k1,k2"
    assert "JUDGE_MAX_TOKENS" not in services["api"].environment


def test_the_key_goes_to_nobody_who_does_not_need_it() -> None:
    """API, bench and trainers have it."""
    services = load({"JUDGE_API_KEY": "hunter2"})

    assert {name for name, one in services.items() if "hunter2" in repr((one.environment, one.command))} == {
        "api",
        "bench",
        "trainer",
        "trainer-cpu",
    }


@pytest.mark.parametrize(("name", "settings"), [("api", Settings), ("worker", WorkerSettings)])
def test_the_service_reads_its_command_and_environment(
    services: dict[str, Service], name: str, settings: type[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every JUDGE_ variable is a setting, and flags and values are understood."""
    fields = {**settings.model_fields, **UpstreamKey.model_fields}
    known = {f"JUDGE_{field.upper()}" for field in fields} | {"JUDGE_CACHE_DIR"}
    for variable, value in services[name].environment.items():
        monkeypatch.setenv(variable, value)
    named = {variable for variable in services[name].definition["environment"] if variable.startswith("JUDGE_")}
    read = settings(_cli_parse_args=services[name].command[3:])

    assert named <= known
    assert (read.queue_url, read.log_format) == ("redis://redis:6379/0", "json")


def test_the_other_programs_read_their_commands(
    services: dict[str, Service], capsys: pytest.CaptureFixture[str]
) -> None:
    """`service.models fetch`, `client rewardbench` and `trainer.self_improve` understand every word."""
    asked = models_parser().parse_args(services["model"].command[3:])
    loop = loop_parser().parse_args(services["trainer"].command[3:])
    with pytest.raises(SystemExit) as ended:
        client_main.main([*services["bench"].command[3:], "--help"])

    assert asked.names == ["qwen2.5-coder-1.5b-instruct"]
    assert str(loop.output) == "/runs/improve"
    assert ended.value.code == 0
    assert "--data" in capsys.readouterr().out


def test_python_commands_are_modules_of_ours(services: dict[str, Service]) -> None:
    """`python -m` and a module that the image has."""
    for name in OURS:
        python, flag, module = services[name].command[:3]
        assert (python, flag) == ("python", "-m")
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / module.replace(".", "/") / "__main__.py"
        ).exists()


def test_health_checks_in_python_compile() -> None:
    """Of the Dockerfile and of the compose file."""
    checks = [service.healthcheck.command for service in load({}).values() if service.healthcheck]
    checks += [stage.healthcheck for stage in stages(DOCKERFILE.read_text()).values() if stage.healthcheck]

    for command in checks:
        if command[0] == "python":
            compile(command[2], "healthcheck", "exec")


def test_every_image_ends_without_rights() -> None:
    """Each target runs as another user than root, and by an entry point."""
    for name in ("api", "worker-cpu", "worker-gpu", "trainer", "bench"):
        stage = stages(DOCKERFILE.read_text())[name]
        assert stage.user == "judge"
        assert stage.entrypoint[:2] == ["python", "-m"]
        assert stage.environment["HOME"] == "/tmp"  # the one place that may be written to


def test_the_base_is_an_argument_and_pinned() -> None:
    """FROM names BASE or another stage, and BASE has a version down to the patch."""
    found = stages(DOCKERFILE.read_text())
    arguments = dict(rest.partition("=")[::2] for name, rest in instructions(DOCKERFILE.read_text()) if name == "ARG")

    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", arguments["BASE"])
    for stage in found.values():
        assert stage.base in ("${BASE}", "torch-${TRAINER_TORCH}", *found)


def test_dependencies_are_installed_before_the_code_is_copied() -> None:
    """A change of the code leaves the layers with the dependencies alone: only the stage `code` reads it."""
    copying = {
        name
        for name, stage in stages(DOCKERFILE.read_text()).items()
        for instruction, rest in stage.instructions
        if instruction == "COPY" and re.match(r"(client|service|trainer|\.)\s", rest)
    }

    assert copying == {"code"}


def test_what_is_copied_is_in_the_context() -> None:
    """.dockerignore lets through what COPY names, and neither data nor settings."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word.split("/")[0]
        for stage in stages(DOCKERFILE.read_text()).values()
        for name, rest in stage.instructions
        if name == "COPY" and not rest.startswith("--from")
        for word in rest.split()[:-1]
    }

    assert copied <= let_through
    assert not {".env", "data", "runs"} & let_through


def test_the_example_of_settings_names_what_the_file_reads() -> None:
    """Every variable in .env.example is used by docker-compose.yml, or by docker compose itself."""
    named = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    text = COMPOSE_FILE.read_text()

    assert {name for name in named if not re.search(rf"\b{name}\b", text)} == set()
    assert re.search(r"^[A-Z_]+=", (ROOT / ".env.example").read_text(), re.MULTILINE) is None


def exported() -> set[str]:
    """The names of all series that the service exports."""
    return (
        {family.name for family in Metrics().registry.collect()}
        | {re.split(r"[ {]", line)[0] for line in Metrics().text().decode().splitlines() if not line.startswith("#")}
        | {
            f"{family.name}_{ending}"
            for family in Metrics().registry.collect()
            for ending in {"counter": ("total",), "histogram": ("bucket", "sum", "count")}.get(family.type, ())
        }
    )


def dashboard() -> Any:
    """The dashboard."""
    return json.loads(monitoring.DASHBOARD.read_text())


def alert_rules() -> list[dict[str, Any]]:
    """Every alert."""
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_dashboard_and_alerts_ask_for_what_is_exported() -> None:
    """Every judge_ series that a query names exists, and none is named that does not."""
    queries = [*monitoring.dashboard_queries(), *(rule["expr"] for rule in alert_rules())]
    asked = {name for query in queries for name in re.findall(r"\bjudge_\w+", query)}

    assert asked - exported() == set()
    assert len(asked) > 15


def test_alerts_name_codes_and_jobs_that_exist() -> None:
    """Codes are those of client/errors.py; jobs those of prometheus.yml."""
    text = " ".join(rule["expr"] for rule in alert_rules())
    codes = {code for match in re.findall(r'code=~?"([^"]+)"', text) for code in match.split("|")}
    jobs = {entry["job_name"] for entry in prometheus()["scrape_configs"]}

    assert codes <= set(ErrorCode)
    assert set(re.findall(r'job="(\w+)"', text)) <= jobs


def prometheus() -> dict[str, Any]:
    """Prometheus' configuration."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    return loaded


def test_prometheus_asks_the_ports_that_are_listened_on(services: dict[str, Service]) -> None:
    """The API's port and the workers' --metrics-port, by the services' names."""
    wanted = {
        (name, entry["port"])
        for scrape in prometheus()["scrape_configs"]
        for entry in scrape["dns_sd_configs"]
        for name in entry["names"]
    }
    port = int(services["worker"].command[services["worker"].command.index("--metrics-port") + 1])

    assert wanted == {("api", 8000), ("worker", port), ("worker-cpu", port)}
    assert services["api"].definition["ports"][0].endswith(":8000")


def test_mounted_files_are_there(services: dict[str, Service]) -> None:
    """Folders that prometheus and grafana mount exist, and provisioning names what is mounted."""
    mounts = [mount.split(":") for name in ("prometheus", "grafana") for mount in services[name].definition["volumes"]]
    inside = {target: ROOT / source for source, target, *_ in mounts if source.startswith("./")}
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/judge.yml").read_text())["providers"][0]

    assert all(folder.is_dir() for folder in inside.values())
    assert (inside[provider["options"]["path"]] / "judge.json").exists()


def test_panels_name_the_provisioned_source(services: dict[str, Service]) -> None:
    """By its uid; it is the service that scrapes, asked as often as that does; no two panels have the same number."""
    file = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(file.read_text())["datasources"]
    panels = dashboard()["panels"]

    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"].definition["ports"][0].endswith(":9090")
    assert source["jsonData"]["timeInterval"] == prometheus()["global"]["scrape_interval"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_dashboard_fits_grafanas_own_model() -> None:
    """Fields and values of the dashboard, of its panels and of their options are ones that Grafana knows."""
    validator = jsonschema_rs.validator_for(json.loads(DASHBOARD_SCHEMA.read_text()))

    assert [str(error) for error in validator.iter_errors(dashboard())] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("graphTooltip",), 7),
        (("panels", 0, "titel"), "x"),
        (("panels", 0, "type"), "stats"),
        (("panels", 0, "options", "colorMode"), "backgrund"),
        (("panels", 7, "options", "legend", "placement"), "below"),
        (("panels", 7, "fieldConfig", "defaults", "units"), "s"),
        (("panels", 7, "gridPos", "w"), "8"),
    ],
)
def test_a_mistake_does_not_fit_grafanas_model(path: tuple[str | int, ...], value: object) -> None:
    """The schema is strict, down to a panel's options."""
    changed = dashboard()
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value

    assert not jsonschema_rs.validator_for(json.loads(DASHBOARD_SCHEMA.read_text())).is_valid(changed)


def test_panels_do_not_overlap() -> None:
    """Each has cells of the 24 columns to itself."""
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]

    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_alert_has_a_test_in_which_it_is_raised() -> None:
    """`promtool test rules`, which `make test-compose` runs, raises each of them once."""
    tests = yaml.safe_load((ROOT / "deploy/prometheus/alerts_test.yml").read_text())["tests"]
    raised = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}

    assert raised == {rule["alert"] for rule in alert_rules()}


def test_the_documents_list_every_metric_and_every_alert() -> None:
    """docs/operations.md has each by its name, and none that is not there."""
    text = (ROOT / "docs/operations.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| `judge_", "| `process_"))]
    listed = {name for row in rows for name in re.findall(r"`((?:judge|process)_\w+)", row.split("|")[1])}
    names = {family.name + ("_total" if family.type == "counter" else "") for family in Metrics().registry.collect()}

    assert listed == names
    assert set(re.findall(r"^\| (Judge\w+) \|", text, re.MULTILINE)) == {rule["alert"] for rule in alert_rules()}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ('absent(up{job="api"} == 1)', 'up{job="api"} == 1'),
        ("sum(rate(a[5m])) > 0.05", "sum(rate(a[5m]))"),
        ("max(a) > 0 and on() sum(b) == 0", "max(a) and on() sum(b)"),
        (
            "histogram_quantile(0.5, sum by (le) (rate(a[30m]))) < 0.5",
            "histogram_quantile(0.5, sum by (le) (rate(a[30m])))",
        ),
    ],
)
def test_what_an_alert_looks_at_is_its_expression_without_bounds(expression: str, expected: str) -> None:
    """So that a healthy service can be asked for it."""
    assert monitoring.without_bounds(expression) == expected


def test_prometheus_is_configured_as_deployed_but_for_addresses(tmp_path: Path) -> None:
    """Jobs and ports are those of deploy/prometheus; every address of a job's services is asked."""
    monitoring.write_configuration(tmp_path, {"api": ["127.0.0.2"], "worker-cpu": ["127.0.0.3", "127.0.0.4"]})
    written = yaml.safe_load((tmp_path / "prometheus.yml").read_text())

    assert {job["job_name"]: job["static_configs"][0]["targets"] for job in written["scrape_configs"]} == {
        "api": ["127.0.0.2:8000"],
        "worker": ["127.0.0.3:9100", "127.0.0.4:9100"],
    }
    assert written["rule_files"] == prometheus()["rule_files"] == [path.name for path in tmp_path.glob("alerts.yml")]


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
def test_variables_are_filled_in(text: str, expected: str) -> None:
    """As docker compose does it: what is unset or empty takes its default, which may hold another variable."""
    assert interpolated([text], {"A": "1", "E": ""}) == [expected]


@pytest.mark.parametrize("text", ["${A", "$", "${A?none}"])
def test_variables_that_cannot_be_read_are_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="cannot read the variable"):
        interpolated(text, {"A": "1"})


def test_durations_are_read() -> None:
    """As compose writes them."""
    assert (seconds("1m30s"), seconds("500ms")) == (90, 0.5)
    with pytest.raises(ValueError, match="not a duration"):
        seconds("10")


def test_a_stage_has_what_it_is_built_on() -> None:
    """Environment, entry point, user and health check come from the stages below it."""
    text = 'FROM x AS a\nENV A=1 \\\n  B=2\n# no\nENTRYPOINT ["p"]\nUSER u\nFROM a AS b\nENV B=3\nCMD ["q"]\n'
    stage = stages(text)["b"]

    assert stage.environment == {"A": "1", "B": "3"}
    assert (stage.entrypoint, stage.command, stage.user) == (["p"], ["q"], "u")

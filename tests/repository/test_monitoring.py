"""Prometheus, its alerts and the dashboard: they query what the service exports. `make test-compose` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml  # type: ignore[import-untyped]

from client.errors import ErrorCode
from deploy import monitoring
from deploy.compose import ROOT, Service, load
from service.telemetry.metrics import Metrics

# The schema of a dashboard in Grafana 11.2; data/README.md says how it was made.
DASHBOARD_SCHEMA = Path(__file__).parents[1] / "data" / "grafana-dashboard.json"


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """The services of docker-compose.yml with no variable set."""
    return load({})


def exported() -> set[str]:
    """The names of all exported series."""
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
    """The provisioned dashboard."""
    return json.loads(monitoring.DASHBOARD.read_text())


def alert_rules() -> list[dict[str, Any]]:
    """All alert rules."""
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_dashboard_and_alerts_query_exported_series_only() -> None:
    """Every judge_ series in a query exists."""
    queries = [*monitoring.dashboard_queries(), *(rule["expr"] for rule in alert_rules())]
    queried = {name for query in queries for name in re.findall(r"\bjudge_\w+", query)}

    assert queried - exported() == set()
    assert len(queried) > 15


def test_alerts_name_codes_and_jobs_that_exist() -> None:
    """The codes are in client/errors.py, the jobs in prometheus.yml."""
    text = " ".join(rule["expr"] for rule in alert_rules())
    codes = {code for match in re.findall(r'code=~?"([^"]+)"', text) for code in match.split("|")}
    jobs = {entry["job_name"] for entry in prometheus()["scrape_configs"]}

    assert codes <= set(ErrorCode)
    assert set(re.findall(r'job="(\w+)"', text)) <= jobs


def prometheus() -> Any:
    """Prometheus' configuration."""
    return yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())


def test_prometheus_scrapes_the_services_ports(services: dict[str, Service]) -> None:
    """The API's port and the workers' --metrics-port, by service name."""
    scraped = {
        (name, entry["port"])
        for scrape in prometheus()["scrape_configs"]
        for entry in scrape["dns_sd_configs"]
        for name in entry["names"]
    }
    port = int(services["worker"].command[services["worker"].command.index("--metrics-port") + 1])

    assert scraped == {("api", 8000), ("worker", port), ("worker-cpu", port)}
    assert services["api"].definition["ports"][0].endswith(":8000")


def test_mounted_folders_exist(services: dict[str, Service]) -> None:
    """Those of prometheus and grafana do, and provisioning names what is mounted."""
    mounts = [mount.split(":") for name in ("prometheus", "grafana") for mount in services[name].definition["volumes"]]
    inside = {target: ROOT / source for source, target, *_ in mounts if source.startswith("./")}
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/judge.yml").read_text())["providers"][0]

    assert all(folder.is_dir() for folder in inside.values())
    assert (inside[provider["options"]["path"]] / "judge.json").exists()


def test_panels_use_the_provisioned_data_source(services: dict[str, Service]) -> None:
    """By its uid. It is the prometheus service, with its scrape interval. No two panels have the same id."""
    file = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(file.read_text())["datasources"]
    panels = dashboard()["panels"]

    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "row"} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"].definition["ports"][0].endswith(":9090")
    assert source["jsonData"]["timeInterval"] == prometheus()["global"]["scrape_interval"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_dashboard_matches_grafanas_schema() -> None:
    """Grafana knows every field and value of the dashboard, its panels and their options."""
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
def test_a_mistake_does_not_match_grafanas_schema(path: tuple[str | int, ...], value: object) -> None:
    """The schema is strict, down to a panel's options."""
    changed = dashboard()
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value

    assert not jsonschema_rs.validator_for(json.loads(DASHBOARD_SCHEMA.read_text())).is_valid(changed)


def test_panels_do_not_overlap() -> None:
    """Each cell of the 24 columns belongs to one panel at most."""
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]

    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_alert_is_raised_in_a_test() -> None:
    """`make test-compose` runs those tests with `promtool test rules`."""
    tests = yaml.safe_load((ROOT / "deploy/prometheus/alerts_test.yml").read_text())["tests"]
    raised = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}

    assert raised == {rule["alert"] for rule in alert_rules()}


def test_the_docs_list_every_metric_and_every_alert() -> None:
    """docs/operations.md has each by name, and no others."""
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
def test_an_alerts_query_is_its_expression_without_thresholds(expression: str, expected: str) -> None:
    """A healthy service returns data for it."""
    assert monitoring.without_bounds(expression) == expected


def test_the_checked_configuration_differs_from_the_deployed_in_addresses_only(tmp_path: Path) -> None:
    """Jobs and ports are those of deploy/prometheus, and every address of a job's services is scraped."""
    monitoring.write_configuration(tmp_path, {"api": ["127.0.0.2"], "worker-cpu": ["127.0.0.3", "127.0.0.4"]})
    written = yaml.safe_load((tmp_path / "prometheus.yml").read_text())

    assert {job["job_name"]: job["static_configs"][0]["targets"] for job in written["scrape_configs"]} == {
        "api": ["127.0.0.2:8000"],
        "worker": ["127.0.0.3:9100", "127.0.0.4:9100"],
    }
    assert written["rule_files"] == prometheus()["rule_files"] == [path.name for path in tmp_path.glob("alerts.yml")]

"""Runs the monitoring of docker-compose.yml: Prometheus watches the running deployment, and every query of the
dashboard and of the alerts must return data.

Uses this machine's Prometheus (`apt-get install prometheus`) with the configuration and rules of deploy/prometheus,
except that service names become loopback addresses and intervals of ten seconds become one.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from deploy.compose import ROOT
from deploy.processes import CheckError, Container, Deployment

FOLDER = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "judge.json"
# wget is the image's health check.
PROGRAMS = ("prometheus", "promtool", "wget")
# Stands for $__rate_interval, which Grafana derives from the time range. It must cover the load of this check.
RATE_INTERVAL = "1m"
# Raised by what happened before: a worker was killed, and the tiny model answers neither Yes nor No.
RAISED = {"JudgeWorkersDie", "JudgeLabelMassLow"}
RAISED_WHEN_DOWN = {"JudgeApiDown", "JudgeNoWorkers"}


def missing() -> list[str]:
    """The required programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def check_rules() -> None:
    """Have promtool check the configuration and run the rules' tests. Raises CheckError."""
    for words in (["check", "config", FOLDER / "prometheus.yml"], ["test", "rules", FOLDER / "alerts_test.yml"]):
        done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(f"promtool: {done.stdout}{done.stderr}")


def write_configuration(folder: Path, addresses: Mapping[str, Sequence[str]]) -> None:
    """Write deploy/prometheus into `folder`, with service names replaced by their `addresses`."""
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for scrape in configuration["scrape_configs"]:
        (discovery,) = scrape.pop("dns_sd_configs")
        hosts = [address for name in discovery["names"] for address in addresses.get(name, [])]
        scrape["static_configs"] = [{"targets": [f"{host}:{discovery['port']}" for host in hosts]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    shutil.copy(FOLDER / "alerts.yml", folder)


def dashboard_queries() -> list[str]:
    """Every expression of the dashboard as Grafana sends it."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [expression.replace("$__rate_interval", RATE_INTERVAL) for expression in expressions]


def alert_queries() -> dict[str, str]:
    """Each alert's expression without its thresholds: a healthy service would not exceed them, and return no data."""
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: without_bounds(rule["expr"]) for group in groups for rule in group["rules"]}


def without_bounds(expression: str) -> str:
    """The x of `absent(x)`; any other expression without its comparisons with numbers."""
    if within := re.fullmatch(r"absent\((.*)\)", expression):
        return within[1]
    return re.sub(r"\s*(==|[<>])\s*[\d.]+(?!\w)", "", expression)


class Watch:
    """The Prometheus that watches the deployment."""

    def __init__(self, container: Container) -> None:
        self._url = f"http://{container.address}:9090/api/v1"

    def ask(self, expression: str) -> list[float]:
        """The current values of a query. Raises CheckError if Prometheus rejects it."""
        result = self._get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"]
        return [float(series["value"][1]) for series in result]

    def alerts(self) -> set[str]:
        """The alerts that are pending or firing."""
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"]}

    def broken_rules(self) -> list[str]:
        """The rules that Prometheus could not evaluate."""
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        return [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule["health"] != "ok"]

    def await_processes(self, count: int) -> None:
        """Wait until `count` processes have been scraped. Raises CheckError after a timeout.

        Prometheus starts scraping some seconds after it is ready, and sees no increase in what was counted before.
        """
        if not until(lambda: self.ask("sum(up)") == [count]):
            raise CheckError(f"prometheus reaches {self.ask('sum(up)')} of {count} processes")

    def await_alerts(self, wanted: set[str]) -> None:
        """Wait until exactly these alerts are raised. Raises CheckError after a timeout."""
        if not until(lambda: self.alerts() == wanted):
            raise CheckError(f"alerts raised: {sorted(self.alerts())}, expected: {sorted(wanted)}")

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=30) as answer:
                data: dict[str, Any] = json.load(answer)["data"]
        except OSError as error:
            raise CheckError(f"Prometheus: {path}: {error}") from error
        return data


def until(condition: Callable[[], bool], limit: float = 30) -> bool:
    """Wait for the condition; returns whether it came true within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def start(deployment: Deployment, folder: Path, addresses: Mapping[str, Sequence[str]]) -> Watch:
    """Start Prometheus and wait for its health check; `folder` is its /etc/prometheus."""
    write_configuration(folder, addresses)
    container = deployment.start("prometheus")
    deployment.await_health(container, limit=60)
    watch = Watch(container)
    watch.await_processes(sum(map(len, addresses.values())))
    return watch


def check_while_up(watch: Watch, url: str, key: str) -> str:
    """Check that under load every query returns numbers and the right alerts are raised; returns a summary."""
    put_load_on(url, key)
    time.sleep(3)  # for two more scrapes of all processes
    queries = dashboard_queries()
    alerts = alert_queries()
    for query in [*queries, *alerts.values()]:
        values = watch.ask(query)
        if not values or not all(math.isfinite(value) for value in values):
            raise CheckError(f"no data from {query}: {values}")
    if broken := watch.broken_rules():
        raise CheckError(f"rules that cannot be evaluated: {broken}")
    watch.await_alerts(RAISED)
    return (
        f"prometheus: {len(queries)} queries of the dashboard and {len(alerts)} of the alerts return numbers under "
        f"load; raised, as expected: {' and '.join(sorted(RAISED))}"
    )


def check_when_down(watch: Watch) -> str:
    """Check the alerts after API and workers have ended; returns a summary."""
    watch.await_alerts(RAISED | RAISED_WHEN_DOWN)
    return f"prometheus: with API and workers down, {' and '.join(sorted(RAISED_WHEN_DOWN))} are raised too"


def put_load_on(url: str, key: str) -> None:
    """Send judgements for some seconds, and a few requests that are refused."""
    for _ in range(5):
        request = urllib.request.Request(f"{url}/score", b"{}")
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except OSError:
            time.sleep(0.3)
    flags = ["--judge-url", url, "--rate", "20", "--duration", "8", "--api-key", key]
    done = subprocess.run(
        [sys.executable, "-m", "client", "load", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckError(f"client load ended with {done.returncode}: {done.stdout}{done.stderr}")

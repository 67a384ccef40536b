"""What prometheus and grafana of docker-compose.yml ask, asked for real: Prometheus watches the running deployment, and
every query of the dashboard and of the alerts has to find something there.

Prometheus is the program of this machine (`apt-get install prometheus`), with the configuration and the rules of
deploy/prometheus but for the names of services, which are loopback addresses, and a second in place of ten.
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
# wget is what the image's health check asks with.
PROGRAMS = ("prometheus", "promtool", "wget")
# What Grafana puts in for it grows with the time that is shown; here the load of this check has to be within it.
RATE_INTERVAL = "1m"
# What happens before this check has to raise: a worker was killed; the tiny model means neither Yes nor No.
RAISED = {"JudgeWorkersDie", "JudgeLabelMassLow"}
RAISED_WHEN_DOWN = {"JudgeApiDown", "JudgeNoWorkers"}


def missing() -> list[str]:
    """Programs that are needed and not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def check_rules() -> None:
    """Prometheus' own check of the configuration, and the rules' tests. Raises CheckError."""
    for words in (["check", "config", FOLDER / "prometheus.yml"], ["test", "rules", FOLDER / "alerts_test.yml"]):
        done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(f"promtool: {done.stdout}{done.stderr}")


def write_configuration(folder: Path, addresses: Mapping[str, Sequence[str]]) -> None:
    """deploy/prometheus into `folder`, with `addresses` for each name of a service."""
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for scrape in configuration["scrape_configs"]:
        (asked,) = scrape.pop("dns_sd_configs")
        hosts = [address for name in asked["names"] for address in addresses.get(name, [])]
        scrape["static_configs"] = [{"targets": [f"{host}:{asked['port']}" for host in hosts]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    shutil.copy(FOLDER / "alerts.yml", folder)


def dashboard_queries() -> list[str]:
    """Every expression of the dashboard, as Grafana would send it."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [expression.replace("$__rate_interval", RATE_INTERVAL) for expression in expressions]


def alert_queries() -> dict[str, str]:
    """What each alert looks at: its expression without the bounds, which a healthy service stays within."""
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: without_bounds(rule["expr"]) for group in groups for rule in group["rules"]}


def without_bounds(expression: str) -> str:
    """`absent(x)` looks at x; anything else loses its comparisons with numbers."""
    if within := re.fullmatch(r"absent\((.*)\)", expression):
        return within[1]
    return re.sub(r"\s*(==|[<>])\s*[\d.]+(?!\w)", "", expression)


class Watch:
    """A Prometheus that watches the deployment."""

    def __init__(self, container: Container) -> None:
        self._url = f"http://{container.address}:9090/api/v1"

    def ask(self, expression: str) -> list[float]:
        """The values that a query gives now; raises CheckError where Prometheus does not understand it."""
        found = self._get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"]
        return [float(series["value"][1]) for series in found]

    def alerts(self) -> set[str]:
        """The alerts whose expression holds, whether they have held for long enough or not yet."""
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"]}

    def broken_rules(self) -> list[str]:
        """Rules that Prometheus could not evaluate."""
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        return [f"{rule['name']}: {rule['lastError']}" for rule in rules if rule["health"] != "ok"]

    def await_processes(self, count: int) -> None:
        """Return when so many processes have been asked; raises CheckError when that does not come.

        What they count before is no increase to Prometheus, which begins to ask some seconds after it is ready.
        """
        if not until(lambda: self.ask("sum(up)") == [count]):
            raise CheckError(f"prometheus reaches {self.ask('sum(up)')} processes of {count}")

    def await_alerts(self, wanted: set[str]) -> None:
        """Return when these alerts are raised and no others; raises CheckError when that does not come."""
        if not until(lambda: self.alerts() == wanted):
            raise CheckError(f"alerts: {sorted(self.alerts())} are raised, and should be {sorted(wanted)}")

    def _get(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}", timeout=30) as answer:
                data: dict[str, Any] = json.load(answer)["data"]
        except OSError as error:
            raise CheckError(f"Prometheus: {path}: {error}") from error
        return data


def until(condition: Callable[[], bool], limit: float = 30) -> bool:
    """Whether the condition came true within `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def start(deployment: Deployment, folder: Path, addresses: Mapping[str, Sequence[str]]) -> Watch:
    """Prometheus by its command and health check; `folder` is its /etc/prometheus."""
    write_configuration(folder, addresses)
    container = deployment.start("prometheus")
    deployment.await_health(container, limit=60)
    watch = Watch(container)
    watch.await_processes(sum(map(len, addresses.values())))
    return watch


def check_while_up(watch: Watch, url: str, key: str) -> str:
    """Every query finds numbers while there is load, and the right alerts are raised; returns what was seen."""
    put_load_on(url, key)
    time.sleep(3)  # two more rounds of questions to all processes
    queries = dashboard_queries()
    looked_at = alert_queries()
    for query in [*queries, *looked_at.values()]:
        values = watch.ask(query)
        if not values or not all(math.isfinite(value) for value in values):
            raise CheckError(f"no data from {query}: {values}")
    if broken := watch.broken_rules():
        raise CheckError(f"rules that cannot be evaluated: {broken}")
    watch.await_alerts(RAISED)
    return (
        f"prometheus: {len(queries)} queries of the dashboard and {len(looked_at)} alerts find numbers under load; "
        f"raised are {' and '.join(sorted(RAISED))}, which is right"
    )


def check_when_down(watch: Watch) -> str:
    """API and workers have ended: that is told."""
    watch.await_alerts(RAISED | RAISED_WHEN_DOWN)
    return f"prometheus: with API and workers gone, {' and '.join(sorted(RAISED_WHEN_DOWN))} are raised too"


def put_load_on(url: str, key: str) -> None:
    """Some seconds of judgements, and a few requests that are refused."""
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

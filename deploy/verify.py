"""`make test-compose`: runs the deployment of docker-compose.yml as plain processes, without a Docker engine.

Commands, environments and health checks come from docker-compose.yml and the Dockerfile; only host names become
loopback addresses and volumes folders. The model is a tiny random one, downloaded from a fake hub. The output ends with
a list of what was run, and of what only a container engine can check.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from deploy import monitoring
from deploy.compose import load
from deploy.processes import CheckError, Container, Deployment
from tests.support.model_sources import Hub
from tests.support.tiny import make_tiny_model

# How long both workers may take to be listed.
WORKERS_SECONDS = 30.0
MODEL = "tiny/judge"
KEY = "test-compose-key"
SETTINGS = {
    "JUDGE_MODEL": MODEL,
    "JUDGE_API_KEY": KEY,
    "JUDGE_DTYPE": "float32",
    "JUDGE_THREADS": "1",
    # Small batches, so that the killed worker holds jobs, and a short lease, so that they are soon taken over.
    "JUDGE_BATCH_JOBS": "8",
    "JUDGE_LEASE_SECONDS": "2",
    "JUDGE_BENCH_DATA": "/data/pairs.jsonl",
    "JUDGE_POLICY": "/data/policy",
    "JUDGE_INSTRUCTIONS": "/data/instructions.jsonl",
}
# Flags that make a round of training small; the rest of its command comes from the file.
TINY_ROUND = (
    "--count 8 --held-out 4 --samples 3 --max-new-tokens 8 --cut-off keep --device cpu --dtype float32 "
    "--batch 4 --lr 1e-3 --rank 4 --alpha 8 --patience 30"
)
PAIRS = 400
SUBSETS = ("alpacaeval-easy", "llmbar-natural", "donotanswer", "hep-go", "math-prm")
UNCHECKED = (
    "images: builds, sizes, users (deploy/build_images.sh builds them with docker, podman or buildah)",
    "what the container engine enforces: read-only root, dropped rights, limits, restart policies, log rotation",
    "its networks and volumes: service names, published ports, ownership of new volumes",
    "the GPU reservation of `worker` and `trainer`, whose commands are those of `worker-cpu` and `trainer-cpu`",
    "third-party images: redis and prometheus (this machine's programs were used), grafana/grafana",
    "Grafana itself: the dashboard's queries were run, but not drawn",
)


@dataclass
class Report:
    """What was run, printed as it happens and again at the end."""

    lines: list[str] = field(default_factory=list)

    def ran(self, what: str) -> None:
        """Record and print that something worked."""
        self.lines.append(what)
        sys.stdout.write(f"ok  {what}\n")
        sys.stdout.flush()

    def summary(self, skipped: Sequence[str]) -> str:
        """The final list of what was and what was not checked."""
        ran = "".join(f"  - {line}\n" for line in self.lines)
        unchecked = "".join(f"  - {line}\n" for line in [*UNCHECKED, *skipped])
        return f"\nrun, as processes:\n{ran}\nnot checked here:\n{unchecked}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the deployment; returns 0 if all of it works, else 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m deploy.verify", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--keep", action="store_true", help="keep logs and volumes, and print where they are")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="judge-compose-"))
    report = Report()
    try:
        skipped = check(folder, report)
    except CheckError as error:
        sys.stderr.write(f"FAILED: {error}\nlogs: {folder}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(report.summary(skipped))
    if arguments.keep:
        sys.stdout.write(f"logs: {folder}\n")
    else:
        shutil.rmtree(folder)
    return 0


def check(folder: Path, report: Report) -> list[str]:
    """Run everything; returns what this machine could not run. Raises CheckError."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    volumes = make_volumes(folder)
    services = load(SETTINGS)
    hub = Hub(MODEL, make_tiny_model(folder / "published"))
    with hub.running(), Deployment(services, folder, volumes) as deployment:
        workers = bring_up(deployment, hub.url, report)
        watch = begin_to_watch(deployment, volumes["/etc/prometheus"], report)
        judge_something(deployment, report)
        benchmark_with_a_killed_worker(deployment, workers, volumes["/runs"], report)
        train(deployment, volumes["/runs"], report)
        if watch:
            report.ran(monitoring.check_while_up(watch, f"http://{deployment.address('api')}:8000", KEY))
        take_down(deployment, workers, report)
        if watch:
            report.ran(monitoring.check_when_down(watch))
        check_logs(deployment, report)
    return [] if watch else [f"prometheus: no {', '.join(monitoring.missing())} here (apt-get install prometheus wget)"]


def make_volumes(folder: Path) -> dict[str, Path]:
    """Make folders for the volumes, with pairs, instructions and a policy in /data."""
    paths = ("/models", "/runs", "/data", "/prometheus", "/etc/prometheus")
    volumes = {path: folder / path.strip("/") for path in paths}
    for volume in volumes.values():
        volume.mkdir(parents=True)
    rows = [
        {"id": f"{n}", "subset": SUBSETS[n % 5], "prompt": f"Question {n}?", "chosen": f"Yes {n}", "rejected": f"{n}"}
        for n in range(PAIRS)
    ]
    write_lines(volumes["/data"] / "pairs.jsonl", rows)
    tasks = [{"id": f"{n}", "prompt": f"What is {n}?", "category": ("chat", "math")[n % 2]} for n in range(12)]
    write_lines(volumes["/data"] / "instructions.jsonl", tasks)
    make_tiny_model(volumes["/data"] / "policy", seed=1)
    return volumes


def write_lines(file: Path, rows: Sequence[object]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def bring_up(deployment: Deployment, hub: str, report: Report) -> list[Container]:
    """Start, in the order of depends_on, Redis, the model download, the API and two workers; returns the workers."""
    redis = deployment.start("redis")
    deployment.await_health(redis)
    report.ran(f"redis: {show(redis)}; healthy by `{' '.join(healthcheck_of(redis))}`")
    model = deployment.run("model", 300, changes={"HF_ENDPOINT": hub})
    report.ran(f"model: {show(model)} (from a fake hub)")
    deployment.run("model", 120, changes={"HF_ENDPOINT": hub})
    report.ran("model: a second run finds it cached and exits with 0")
    api = deployment.start("api")
    workers = [deployment.start("worker-cpu", number) for number in (1, 2)]
    deployment.await_health(api)
    report.ran(f"api: {show(api)}; healthy by its check of /ready")
    for worker in workers:
        deployment.await_health(worker)
    report.ran(f"worker-cpu, twice: {show(workers[0])}; healthy by their check of /metrics")
    return workers


def show(container: Container) -> str:
    """A container's command as written in the file."""
    return f"`{' '.join(container.service.command)}`"


def healthcheck_of(container: Container) -> list[str]:
    """The command of a container's health check."""
    return container.service.healthcheck.command if container.service.healthcheck else []


def begin_to_watch(deployment: Deployment, folder: Path, report: Report) -> monitoring.Watch | None:
    """Start Prometheus for API and workers; None if it is not installed."""
    if monitoring.missing():
        return None
    monitoring.check_rules()
    report.ran("promtool: configuration, rules and their tests")
    workers = [deployment.address("worker-cpu"), deployment.address("worker-cpu-2")]
    watch = monitoring.start(deployment, folder, {"api": [deployment.address("api")], "worker-cpu": workers})
    report.ran("prometheus: its command, for these processes; healthy by its check of /-/healthy")
    return watch


def judge_something(deployment: Deployment, report: Report) -> None:
    """Check that requests without the key are refused, and that the workers are listed with it."""
    url = f"http://{deployment.address('api')}:8000"
    if status(f"{url}/score") != 401:
        raise CheckError("a request without a key was not refused")
    # A worker's metrics are there before its model is: on a busy machine the second one loads for some seconds more.
    deadline = time.monotonic() + WORKERS_SECONDS
    while len(workers := json.loads(get(f"{url}/v1/models"))["data"][0]["workers"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    if len(workers) != 2 or {worker["engine"] for worker in workers} != {"torch"}:
        raise CheckError(f"/v1/models shows these workers: {workers}")
    report.ran("without the key of JUDGE_API_KEY: 401; with it, /v1/models shows two torch workers")


def status(url: str) -> int:
    """The HTTP status of a POST without a key."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"{}"), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def get(url: str) -> str:
    """The body of a GET with the key."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read(), "utf-8")


def benchmark_with_a_killed_worker(
    deployment: Deployment, workers: list[Container], runs: Path, report: Report
) -> None:
    """Run the benchmark; halfway SIGKILL a worker, then start it again, as its restart policy would."""
    items = runs / "rewardbench" / "items.jsonl"
    bench = deployment.start("bench", more=["--batch-items", "8", "--patience", "60"])
    while lines(items) < PAIRS // 10:
        if bench.process.poll() is not None:
            raise CheckError(f"the benchmark ended early:\n{bench.output[-2000:]}")
        time.sleep(0.02)
    # Suspended first, so that it holds jobs when it is killed.
    workers[0].process.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    before = lines(items)
    workers[0].process.kill()
    if bench.wait(300):
        raise CheckError(f"the benchmark ended with {bench.process.returncode}:\n{bench.output[-2000:]}")
    summary = json.loads((runs / "rewardbench" / "summary.json").read_bytes())
    if (summary["counts"]["judged"], summary["counts"]["failed"]) != (PAIRS, 0):
        raise CheckError(f"not all {PAIRS} pairs were judged: {summary['counts']}")
    moved = metric(workers[1], "judge_jobs_redelivered_total")
    report.ran(f"bench: {show(bench)}: {PAIRS} of {PAIRS} pairs, no failures")
    report.ran(f"kill -9 of a worker after {before} pairs: the other judged the {moved:.0f} jobs that it held")
    workers[0] = deployment.start("worker-cpu", 1)
    deployment.await_health(workers[0])
    report.ran("the killed worker, started again: healthy")


def lines(file: Path) -> int:
    """The number of lines in a file; 0 if it does not exist yet."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def metric(container: Container, name: str) -> float:
    """The value of a worker's metric."""
    text = get(f"http://{container.address}:9100/metrics")
    return sum(float(line.split()[1]) for line in text.splitlines() if line.split()[0] == name)


def train(deployment: Deployment, runs: Path, report: Report) -> None:
    """Run a round of self-improvement with the deployed judge."""
    trainer = deployment.run("trainer-cpu", 600, more=TINY_ROUND.split())
    metrics = json.loads((runs / "improve" / "round-1" / "metrics.json").read_bytes())
    report.ran(f"trainer-cpu: {show(trainer)} with tiny sizes: {metrics['compared']} held-out answers compared")


def take_down(deployment: Deployment, workers: Sequence[Container], report: Report) -> None:
    """Send SIGTERM to API and workers; each must exit with 0 within its stop_grace_period."""
    (api,) = (container for container in deployment.containers if container.service.name == "api")
    took = max(deployment.stop(container) for container in [api, *workers])
    report.ran(f"SIGTERM to API and workers: all exit with 0, the slowest after {took:.1f} s")


def check_logs(deployment: Deployment, report: Report) -> None:
    """Check that the logs of API and workers are JSON, and that no log contains the key."""
    for container in deployment.containers:
        if KEY in container.output:
            raise CheckError(f"the key is in a log: {container.log}")
        if container.service.name in ("api", "worker-cpu"):
            check_json(container)
    report.ran("logs: those of API and workers are JSON lines, none contains the key")


def check_json(container: Container) -> None:
    """Check that every line of a log is JSON."""
    for line in container.output.splitlines():
        try:
            json.loads(line)
        except ValueError:
            raise CheckError(f"a line of {container.log} is not JSON: {line[:200]}") from None


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)

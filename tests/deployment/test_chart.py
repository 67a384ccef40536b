"""The Helm chart: rendered by Helm, held against the schemas of Kubernetes and operators, and run as processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from deploy.chart import CHART, HelmError, helm, named, render, services
from deploy.processes import Deployment
from service.settings import Settings, UpstreamKey, WorkerSettings
from tests.support.live import PAIR
from tests.support.model_sources import Hub
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.deployment
CPU: dict[str, Any] = {}
GPU = {"settings": {"JUDGE_ENGINE": "vllm", "JUDGE_TENSOR_PARALLEL_SIZE": 2}, "worker": {"gpu": True, "gpus": 2}}
EVERYTHING = {
    "secret": {"name": "judge", "queuePassword": True, "upstreamApiKey": True, "hfToken": True},
    "autoscaling": {"enabled": True, "minReplicas": 0},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    "ingress": {"enabled": True, "className": "nginx", "tlsSecretName": "judge-tls"},
    "files": {"mine.toml": "[[template]]\nid = 'x'\n"},
    "images": {"pullSecrets": [{"name": "registry"}]},
    "models": {"storageClassName": "fast"},
}
OWN_REDIS = {"redis": {"enabled": False}, "settings": {"JUDGE_QUEUE_URL": "rediss://redis.example.com"}}
NO_CLAIM = {"models": {"persistence": False}}
VALUES = {"cpu": CPU, "gpu": GPU, "everything": EVERYTHING, "own redis": OWN_REDIS, "no claim": NO_CLAIM}


def validate(document: dict[str, Any], version: str) -> None:
    """Hold a document against the schema of this Kubernetes or of an operator; raises ValueError on a difference."""
    # Only `make test-deployment` installs the schemas; `make test` collects this module too.
    import kubernetes_validate
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor, ServiceMonitor

    operators: dict[str, type[BaseModel]] = {
        "ScaledObject": ScaledObject,
        "ServiceMonitor": ServiceMonitor,
        "PodMonitor": PodMonitor,
    }
    try:
        if document["kind"] in operators:
            operators[document["kind"]].model_validate(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    except (kubernetes_validate.ValidationError, ValidationError) as error:
        raise ValueError(str(error)) from error


@pytest.mark.parametrize("values", list(VALUES.values()), ids=list(VALUES))
def test_helm_finds_nothing_to_complain_of(values: dict[str, Any], tmp_path: Path) -> None:
    """In the chart, its schema and its templates."""
    file = tmp_path / "values.json"
    file.write_text(json.dumps(values))

    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), "--values", str(file))


@pytest.mark.parametrize("values", list(VALUES.values()), ids=list(VALUES))
@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_every_document_matches_its_schema(values: dict[str, Any], version: str) -> None:
    """Kubernetes' own, strictly, for the oldest and the newest version; KEDA's and Prometheus Operator's for theirs."""
    kinds = set()
    for document in render(values):
        kinds.add(document["kind"])
        validate(document, version)

    assert {"Deployment", "Service", "PodDisruptionBudget"} <= kinds


def test_a_mistake_does_not_match() -> None:
    """The schemas are strict: they refuse unknown fields."""
    document = named(render(CPU), "Deployment", "-api")
    document["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}

    with pytest.raises(ValueError, match="livenesProbe"):
        validate(document, "1.37")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"workers": 3}, "workers"),
        ({"settings": {"JUDGE_MODEL": "m", "judge_model": "m"}}, "judge_model"),
        ({"redis": {"enabled": False}}, "JUDGE_QUEUE_URL"),
        ({"api": {"replicas": 0}}, "replicas"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], said: str) -> None:
    """By name, before anything is installed."""
    with pytest.raises(HelmError, match=said):
        render(values)


def test_only_gpu_workers_ask_for_gpus() -> None:
    """And they run the GPU's image."""
    cpu, gpu = (named(render(values), "Deployment", "-worker") for values in (CPU, GPU))
    limits = [w["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for w in (cpu, gpu)]

    assert "nvidia.com/gpu" not in limits[0]
    assert limits[1]["nvidia.com/gpu"] == 2
    assert gpu["spec"]["template"]["spec"]["containers"][0]["image"] == "judge-worker-gpu:latest"


def test_pods_have_no_rights_that_they_do_not_need() -> None:
    """No root, no capabilities, a read-only file system, no token, and no variables from other Services."""
    for document in render(EVERYTHING):
        if document["kind"] != "Deployment":
            continue
        pod = document["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_secrets_are_files_of_the_pods_that_need_them() -> None:
    """No secret is in an environment but Redis' own and the hub's; callers' keys are the API's alone."""
    documents = render(EVERYTHING)
    items = {}
    for component in ("api", "worker"):
        pod = named(documents, "Deployment", f"-{component}")["spec"]["template"]["spec"]
        (secrets,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "secrets"]
        items[component] = {item["key"] for item in secrets["items"]}

    assert items == {
        "api": {"api-keys", "queue-password", "upstream-api-key"},
        "worker": {"queue-password", "upstream-api-key"},
    }


@pytest.mark.parametrize(("least", "path"), [(0, "/health"), (1, "/ready")])
def test_workers_can_start_from_none(least: int, path: str) -> None:
    """Without a worker the API is not /ready; it has to be in the Service all the same, for a request to call one."""
    documents = render({"autoscaling": {"enabled": True, "minReplicas": least}})
    (container,) = named(documents, "Deployment", "-api")["spec"]["template"]["spec"]["containers"]

    assert container["readinessProbe"]["httpGet"]["path"] == path
    assert "replicas" not in named(documents, "Deployment", "-worker")["spec"]


@pytest.mark.parametrize(("component", "cls"), [("api", Settings), ("worker", WorkerSettings)])
@pytest.mark.parametrize("values", list(VALUES.values()), ids=list(VALUES))
def test_the_programs_understand_their_settings(
    component: str, cls: type[Settings], values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable is a setting with a valid value, and every flag is known."""
    for key in ("api-keys", "queue-password", "upstream-api-key", "hf-token"):
        (tmp_path / key).write_text("secret\n")
    service = services(render(values), tmp_path)[component]
    known = {f"JUDGE_{name.upper()}" for name in {**cls.model_fields, **UpstreamKey.model_fields}}
    ours = {name: value for name, value in service.environment.items() if name.startswith("JUDGE_")}
    for name, value in ours.items():
        monkeypatch.setenv(name, value.replace("/secrets", str(tmp_path)))

    settings = cls(_cli_parse_args=service.command[3:])

    assert set(ours) - {"JUDGE_CACHE_DIR", "JUDGE_NATIVE_DIR"} <= known
    assert settings.log_format == "json"
    assert ":secret@" in settings.queue_url if "secret" in values else "@" not in settings.queue_url


def test_its_commands_and_probes_work_as_processes(tmp_path: Path) -> None:
    """Redis with a password, the model's download, API and worker, with the chart's commands, settings and probes."""
    volumes = {path: tmp_path / path.strip("/") for path in ("/models", "/secrets", "/files")}
    for folder in volumes.values():
        folder.mkdir()
    (volumes["/secrets"] / "api-keys").write_text("hunter2\n")
    (volumes["/secrets"] / "queue-password").write_text("pass")
    values = {
        "settings": {"JUDGE_MODEL": "tiny/judge", "JUDGE_DTYPE": "float32", "JUDGE_THREADS": 1},
        "secret": {"name": "judge", "queuePassword": True},
    }
    found = services(render(values), volumes["/secrets"])
    hub = Hub("tiny/judge", make_tiny_model(tmp_path / "published"))

    with hub.running(), Deployment(found, tmp_path, volumes) as deployment:
        deployment.await_health(deployment.start("redis"))
        deployment.run("model", 300, changes={"HF_ENDPOINT": hub.url})
        running = [deployment.start(name) for name in ("worker", "api")]
        for container in running:
            deployment.await_health(container)
        url = f"http://{deployment.address('api')}:8000/score"
        headers = [{"Authorization": f"Bearer {key}"} for key in ("hunter2", "wrong")]
        statuses = [httpx.post(url, json=PAIR, headers=sent).status_code for sent in headers]
        for container in running:
            deployment.stop(container)

        assert statuses == [200, 401]
        assert not any(secret in container.output for container in running for secret in ("hunter2", ":pass@"))

"""Reads docker-compose.yml and the Dockerfile: each service's command, environment and health check.

Understands only as much of both formats as these two files use, and raises ValueError for the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
COMPOSE_FILE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"


@dataclass
class Stage:
    """A stage of the Dockerfile, including what it inherits from the stages below it."""

    name: str
    base: str
    environment: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] | None = None
    user: str = "root"
    instructions: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Healthcheck:
    """A command that exits with 0 if the service is healthy, and how patiently to try it. Times in seconds."""

    command: list[str]
    interval: float
    retries: int
    start_period: float


@dataclass(frozen=True)
class Service:
    """How a service is started. `depends_on` maps services to conditions; `stop_grace` is in seconds."""

    name: str
    image: str
    command: list[str]
    environment: dict[str, str]
    healthcheck: Healthcheck | None
    depends_on: dict[str, str]
    profiles: list[str]
    stop_grace: float
    target: str | None
    definition: Mapping[str, Any]


def load(environment: Mapping[str, str], *, file: Path = COMPOSE_FILE) -> dict[str, Service]:
    """All services of the file, whatever their profile, interpolated with `environment`."""
    document = interpolated(yaml.safe_load(file.read_text(encoding="utf-8")), environment)
    images = stages(DOCKERFILE.read_text(encoding="utf-8"))
    return {name: _service(name, entry, environment, images) for name, entry in document["services"].items()}


def _service(name: str, entry: Mapping[str, Any], variables: Mapping[str, str], images: Mapping[str, Stage]) -> Service:
    target = entry.get("build", {}).get("target")
    if target is not None and target not in images:
        raise ValueError(f"{name}: the Dockerfile has no target {target}")
    image = images[target] if target else Stage(name, "")
    own_entry = entry.get("entrypoint")
    entrypoint = image.entrypoint if own_entry is None else own_entry
    # Overriding the entry point discards the image's command.
    command = entry.get("command", [] if own_entry else image.command)
    if isinstance(entrypoint, str) or isinstance(command, str):
        raise ValueError(f"{name}: commands are lists here, so that no shell is needed")
    return Service(
        name=name,
        image=entry["image"],
        command=[str(word) for word in [*entrypoint, *command]],
        environment=image.environment | _environment(entry.get("environment", {}), variables),
        healthcheck=_healthcheck(entry.get("healthcheck"), image),
        depends_on={other: how["condition"] for other, how in entry.get("depends_on", {}).items()},
        profiles=list(entry.get("profiles", [])),
        stop_grace=seconds(entry.get("stop_grace_period", "10s")),
        target=target,
        definition=entry,
    )


def _environment(entries: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of a service. A name without a value takes it from `variables`, if it is there."""
    given = {name: variables.get(name) if value is None else str(value) for name, value in entries.items()}
    return {name: value for name, value in given.items() if value is not None}


def _healthcheck(entry: Mapping[str, Any] | None, image: Stage) -> Healthcheck | None:
    if entry is None:
        return None if image.healthcheck is None else Healthcheck(image.healthcheck, 10, 3, 600)
    if entry.get("disable"):
        return None
    how, *command = entry["test"]
    if how != "CMD":
        raise ValueError("health checks are lists that begin with CMD here, so that no shell is needed")
    times = (seconds(entry.get(name, default)) for name, default in (("interval", "30s"), ("start_period", "0s")))
    return Healthcheck(command, next(times), int(entry.get("retries", 3)), next(times))


def seconds(text: str) -> float:
    """Parse a Compose duration, such as 1m30s. Raises ValueError."""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    if not re.fullmatch(r"(\d+(ms|s|m|h))+", text):
        raise ValueError(f"{text!r} is not a duration")
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|s|m|h)", text))


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with ${…} replaced in every string."""
    if isinstance(value, str):
        return _fill(value, variables)
    if isinstance(value, list):
        return [interpolated(entry, variables) for entry in value]
    if isinstance(value, dict):
        return {key: interpolated(entry, variables) for key, entry in value.items()}
    return value


def _fill(text: str, variables: Mapping[str, str]) -> str:
    """Replace `${NAME}` and `${NAME:-default}`, where the default may contain others; `$$` is a dollar sign."""
    start = text.find("$")
    if start < 0:
        return text
    if text.startswith("$$", start):
        return text[:start] + "$" + _fill(text[start + 2 :], variables)
    end = _closing(text, start)
    name, colon, default = text[start + 2 : end].partition(":-")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"cannot read the variable in {text!r}")
    # The default of :- also replaces an empty value.
    value = variables.get(name) or (_fill(default, variables) if colon else "")
    return text[:start] + value + _fill(text[end + 1 :], variables)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += text.startswith("${", place) - (text[place] == "}")
        if depth == 0:
            if place == start:
                break
            return place
    raise ValueError(f"cannot read the variable in {text!r}")


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, including what each inherits."""
    by_name: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in instructions(text):
        if name == "FROM":
            stage = _begin(rest, by_name)
            by_name[stage.name] = stage
        elif stage is not None:
            stage.instructions.append((name, rest))
            _apply(stage, name, rest)
    return by_name


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, without comments and with continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def _begin(rest: str, known: Mapping[str, Stage]) -> Stage:
    base, _, name = re.split(r"\s+", rest)
    below = known.get(base)
    if below is None:
        return Stage(name, base)
    return Stage(
        name, base, dict(below.environment), below.entrypoint, below.command, below.healthcheck, below.user, []
    )


def _apply(stage: Stage, name: str, rest: str) -> None:
    if name == "ENV":
        for pair in rest.split():
            key, _, value = pair.partition("=")
            stage.environment[key] = value.replace("$PATH", stage.environment.get("PATH", "$PATH"))
    elif name == "ENTRYPOINT":
        stage.entrypoint = _words(rest)
    elif name == "CMD":
        stage.command = _words(rest)
    elif name == "USER":
        stage.user = rest
    elif name == "HEALTHCHECK":
        stage.healthcheck = None if rest == "NONE" else _words(rest.partition("CMD")[2])


def _words(text: str) -> list[str]:
    words: Sequence[str] = json.loads(text)
    return list(words)

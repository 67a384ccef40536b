"""Files of templates: the built-in ones (builtin/*.toml) and those of users, as template_entries.py describes them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from client.errors import ErrorCode
from client.schema import Format
from service.errors import ServiceError
from service.judge.template_entries import Frame, FrameLayout, PanelEntry, PaperFile, TemplateEntry, TemplateFile
from service.judge.templates import DEFAULT_MODES, SLOTS, Mode, Panel, Template, TemplateLibrary, question_of


def load_library(
    default_format: Format, files: Sequence[Path] = (), modes: Collection[Mode] = DEFAULT_MODES
) -> TemplateLibrary:
    """The built-in templates in the format that suits the model, and those of the user's files.

    Raises ServiceError(BAD_TEMPLATE) that names the file and the template at fault.
    """
    sources: dict[str, str] = {}
    panels: list[Panel] = []
    categories: dict[tuple[str, Mode], str] = {}
    for source, panel, category in _panels(list(_all_contents(default_format, files))):
        if panel.id in sources:
            raise _bad_file(source, panel.id, f"is already defined in {sources[panel.id]}")
        sources[panel.id] = source
        panels.append(panel)
        if category and categories.setdefault((category, panel.mode), panel.name) != panel.name:
            taken = categories[category, panel.mode]
            raise _bad_file(source, panel.id, f"claims category {category}, which belongs to {taken}")
    return TemplateLibrary(panels, categories, modes)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What a file, `source`, holds: templates and panels, each with its category."""

    source: str
    templates: Sequence[tuple[Template, str | None]]
    panels: Sequence[PanelEntry]


_FRAMES: Final = TypeAdapter(dict[Frame, dict[Mode, dict[Format, FrameLayout]]])


@cache
def _frames() -> dict[Frame, dict[Mode, dict[Format, FrameLayout]]]:
    text = package_files("service.judge").joinpath("builtin", "layouts.toml").read_text(encoding="utf-8")
    return _FRAMES.validate_python(tomllib.loads(text))


def _panels(files: Sequence[_Contents]) -> Iterator[tuple[str, Panel, str | None]]:
    """Each template as a panel, then each panel of several, with where it stands and its category."""
    known = {template.id: template for file in files for template, _ in file.templates}
    for file in files:
        for template, category in file.templates:
            yield file.source, Panel.of(template), category
    for file in files:
        for entry in file.panels:
            yield file.source, _panel(file.source, entry, known), entry.category


def _panel(source: str, entry: PanelEntry, known: Mapping[str, Template]) -> Panel:
    name = f"{entry.name}@{entry.version}"
    for member in entry.members:
        if member not in known:
            raise _bad_file(source, name, f"there is no template {member} to be its member; give name and version")
    weights = tuple(entry.weights or (1.0 for _ in entry.members))
    panel = Panel(tuple(known[member] for member in entry.members), weights, entry.name, entry.version)
    if panel.problem:
        raise _bad_file(source, name, panel.problem)
    return panel


def _all_contents(default_format: Format, files: Sequence[Path]) -> Iterator[_Contents]:
    """Of each file, the built-in ones first."""
    folder = package_files("service.judge").joinpath("builtin")
    shipped = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    for file in shipped:
        if file.name != "layouts.toml":
            yield _read(f"built-in {file.name}", tomllib.loads(file.read_text(encoding="utf-8")), default_format)
    for path in files:
        yield _read(str(path), _parse(path), default_format)


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ServiceError(ErrorCode.BAD_TEMPLATE, f"{path}: cannot be read as TOML or JSON: {error}") from error


def _read(source: str, data: Any, default_format: Format) -> _Contents:
    paper = isinstance(data, dict) and "templates" not in data and "rewardbench" in data
    try:
        read = PaperFile.model_validate(data).file() if paper else TemplateFile.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise _bad_file(source, _name_at(data, first["loc"]), f"{where}: {first['msg']}") from error
    templates = [(_template(entry, default_format), entry.category) for entry in read.templates]
    for template, _ in templates:
        if template.problem:
            raise _bad_file(source, template.id, template.problem)
    return _Contents(source, templates, read.panels)


def _template(entry: TemplateEntry, default_format: Format) -> Template:
    form = entry.format or default_format
    built_in = _frames()[entry.frame][entry.mode][form]
    labels = entry.labels or built_in.labels
    grades = (entry.grades or built_in.grades or ()) if entry.mode == "graded" else ()
    return Template(
        name=entry.name,
        version=entry.version,
        mode=entry.mode,
        format=form,
        text=entry.layout or built_in.asking(entry.question),
        slots=SLOTS[entry.mode],
        instruction=entry.instruction,
        question=question_of(entry.mode, labels.yes if labels else (), labels.no if labels else (), grades),
    )


def _name_at(data: Any, location: Sequence[int | str]) -> str:
    """The name of the template or panel that a validation error is about, as far as the file says it."""
    if len(location) > 1 and location[0] in ("templates", "panels") and isinstance(location[1], int):
        entry = data[location[0]][location[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        return f"number {location[1]}" if name is None else f"{name}"
    return "list"


def _bad_file(source: str, template: str, problem: str) -> ServiceError:
    return ServiceError(ErrorCode.BAD_TEMPLATE, f"{source}: template {template}: {problem}")

"""The calibration files that the settings name, checked against the model and the templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from client import calibration
from client.calibration import CalibrationError, TemplateCalibration
from client.errors import ErrorCode
from service.errors import ServiceError
from service.judge.judges import REWARD_TEMPLATE
from service.judge.provenance import Provenance
from service.judge.templates import Panel, TemplateLibrary


def load_all(
    paths: Sequence[Path], provenance: Provenance, templates: TemplateLibrary
) -> dict[str, TemplateCalibration]:
    """The calibrations of all the files, by template id.

    Raises CalibrationError, which names the file, if it cannot be read, was fitted to another model or another way of
    asking, or has a template that this service does not know, that is pairwise, or that an earlier file has too.
    """
    fingerprint = provenance.fingerprint
    found: dict[str, TemplateCalibration] = {}
    sources: dict[str, Path] = {}
    for path in paths:
        file = calibration.load(path)
        if file.fingerprint != fingerprint:
            raise CalibrationError(
                f"{path}: fitted to the model {file.model} with the fingerprint {file.fingerprint}, while that of "
                f"this service's model is {fingerprint}: fit it again with python -m client.calibrate"
            )
        for name, fitted in file.templates.items():
            problem = _problem(name, fitted, provenance, templates)
            if name in sources:
                problem = f"is already calibrated in {sources[name]}"
            if problem:
                raise CalibrationError(f"{path}: template {name} {problem}")
            sources[name] = path
        found.update(file.templates)
    return found


def _problem(name: str, fitted: TemplateCalibration, provenance: Provenance, templates: TemplateLibrary) -> str | None:
    """Why this service cannot use a template's calibration; None if it can."""
    try:
        panel = _judged_by(name, provenance, templates)
    except ServiceError:
        return "is not known to this service; GET /templates lists those that are"
    if panel and panel.mode == "pairwise":
        return "is pairwise, and only judgements of single responses are calibrated"
    if fitted.asked_with not in (None, provenance.asked_with(panel)):
        return (
            "was fitted to another text of it, or to other settings of the judge, than this service has: fit it again "
            "with python -m client.calibrate"
        )
    return None


def _judged_by(name: str, provenance: Provenance, templates: TemplateLibrary) -> Panel | None:
    """What results call by this name; None for a reward model, which has no templates. Raises ServiceError."""
    if not provenance.judge.template_modes and name == REWARD_TEMPLATE:
        return None
    panel = templates.panel(name)
    if panel.id != name or panel.mode not in provenance.judge.template_modes:
        raise ServiceError(ErrorCode.TEMPLATE_NOT_FOUND, "not what this service's results call a template")
    return panel

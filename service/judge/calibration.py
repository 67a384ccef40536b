"""The calibration files that the settings name, checked against the model and the templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from client import calibration
from client.calibration import CalibrationError, TemplateCalibration
from service.judge.judges import REWARD_TEMPLATE
from service.judge.provenance import Provenance
from service.judge.templates import TemplateLibrary


def load_all(
    paths: Sequence[Path], provenance: Provenance, templates: TemplateLibrary
) -> dict[str, TemplateCalibration]:
    """The calibrations of all the files, by template id.

    Raises CalibrationError, which names the file, if it cannot be read, was fitted to another model or another way of
    asking, or has a template that this service does not know, that is pairwise, or that an earlier file has too.
    """
    fingerprint = provenance.fingerprint
    asked_with = {t.id: provenance.asked_with(t) for t in templates.all()} or {
        REWARD_TEMPLATE: provenance.asked_with(None)
    }
    # Only a reward model has no templates.
    modes: dict[str, str] = {t.id: t.mode for t in templates.all()} or {REWARD_TEMPLATE: "pointwise"}
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
            problem = _problem(modes.get(name), sources.get(name))
            if not problem and fitted.asked_with not in (None, asked_with[name]):
                problem = (
                    "was fitted to another text of it, or to other settings of the judge, than this service has: fit "
                    "it again with python -m client.calibrate"
                )
            if problem:
                raise CalibrationError(f"{path}: template {name} {problem}")
            sources[name] = path
        found.update(file.templates)
    return found


def _problem(mode: str | None, earlier: Path | None) -> str | None:
    if mode is None:
        return "is not known to this service; GET /templates lists those that are"
    if mode == "pairwise":
        return "is pairwise, and only judgements of single responses are calibrated"
    return f"is already calibrated in {earlier}" if earlier else None

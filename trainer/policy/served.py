"""Whether the model that a server has is the policy, as far as its list of models tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from trainer.errors import StageError
from trainer.policy.completions import BadAnswerError
from trainer.policy.requests import SamplerServer

_SHOWN: int = 10


@dataclass(frozen=True, slots=True)
class Served:
    """A model that a server lists: its name there, where it was loaded from (vLLM says), how many tokens it reads.

    `claim` is what may be said of it once it is chosen.
    """

    name: str
    root: str | None = None
    max_tokens: int | None = None
    claim: str = ""


class _Model(BaseModel):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(BaseModel):
    data: list[_Model]


def parse_models(content: bytes) -> list[Served]:
    """The models in the body of GET /v1/models. Raises BadAnswerError."""
    try:
        listed = _Models.model_validate_json(content).data
    except ValidationError as error:
        raise BadAnswerError("its list of models is not in the form of OpenAI's API") from error
    return [Served(model.id, model.root, model.max_model_len) for model in listed]


def choose_served(listed: Sequence[Served], server: SamplerServer, policy: str, folder: Path) -> Served:
    """The model to ask for: the one that the user names, else the one whose name or folder is the policy's.

    Raises StageError if there is none: to be sampled from another model unawares would spoil the whole run.
    """
    if not server.check_model and listed:
        return _claimed(listed[0], "started for this policy")
    if server.model is not None:
        named = next((model for model in listed if model.name == server.model), None)
        if named is None and listed:
            raise StageError(f"{server.url} does not serve {server.model}: it serves {_names(listed)}")
        return _claimed(named or Served(server.model), f"{server.model}, taken for the policy as --sampler-model says")
    if not listed:
        raise StageError(f"{server.url} does not list its models: name the policy there with --sampler-model")
    for model in listed:
        if any(_is_folder(name, folder) for name in (model.root, model.name)):
            return _claimed(model, f"{model.name}, loaded from the policy's folder")
    own = {_last_part(name) for name in (policy, str(folder.resolve()))}
    for model in listed:
        if _last_part(model.name) in own:
            return _claimed(model, f"{model.name}, the policy by its name (whether by its weights cannot be seen)")
    raise StageError(
        f"{server.url} serves {_names(listed)}, and the policy is {policy}: start it with the policy, or, if it is the "
        "policy under another name, give --sampler-model"
    )


def _claimed(model: Served, claim: str) -> Served:
    return Served(model.name, model.root, model.max_tokens, claim)


def _is_folder(name: str | None, folder: Path) -> bool:
    return name is not None and Path(name).is_absolute() and Path(name).resolve() == folder.resolve()


def _last_part(name: str) -> str:
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()


def _names(listed: Sequence[Served]) -> str:
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(sorted(model.name for model in listed)[:_SHOWN]) + more

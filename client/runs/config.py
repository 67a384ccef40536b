"""What identifies a run: a run folder is resumed only with the configuration it was begun with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final

from client.schema import ModelInfo, PanelInfo, TemplateInfo

# Keys of a configuration: the templates' digests by id, and the digest of the judge's settings.
TEMPLATES: Final = "templates"
SETTINGS: Final = "settings"
_ABSENT: Final = object()


def judge_identity(info: ModelInfo) -> dict[str, object]:
    """The judge's exact weights, the number formats they run in, and the digest of its settings.

    Services too old to report that digest leave it out.
    """
    settings = {} if info.settings is None else {SETTINGS: info.settings}
    return {
        "model": info.id,
        "fingerprint": info.fingerprint,
        "engine": info.engine,
        "dtypes": sorted({worker.dtype for worker in info.workers}),
        **settings,
    }


def template_digests(templates: Sequence[TemplateInfo | PanelInfo]) -> dict[str, str]:
    """SHA-256, in hex, of each template's text, or panel's weights, by its id: they may change under one version."""
    return {
        f"{template.name}@{template.version}": sha256(template.model_dump_json().encode()).hexdigest()
        for template in templates
    }


def differing_keys(
    known: Mapping[str, Any], wanted: Mapping[str, Any], same: Callable[[object, object], bool] = operator.eq
) -> list[str]:
    """The keys at which two configurations contradict each other, nested ones as `key: inner`.

    Templates differ if a text they share does. A digest missing from one side contradicts nothing: configurations of
    older versions have none.
    """
    differing = []
    for key in sorted({*known, *wanted}):
        one, other = known.get(key, _ABSENT), wanted.get(key, _ABSENT)
        if key in (TEMPLATES, SETTINGS) and _ABSENT in (one, other):
            continue
        if key == TEMPLATES:
            differing += [f"text of {name}" for name in sorted(one.keys() & other) if one[name] != other[name]]
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = differing_keys(one, other, same)
            differing += [f"{key}: {', '.join(inner)}"] if inner else []
        elif not same(one, other):
            differing.append(key)
    return differing


def without_digests(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as versions without digests wrote it."""
    return {
        key: without_digests(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in (TEMPLATES, SETTINGS)
    }

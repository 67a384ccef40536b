"""Command-line flags: those made from a settings dataclass, and those that several programs share."""

from __future__ import annotations

import argparse
import types
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints


class FlagGroup(Protocol):
    """An argument parser, or a group of one."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """See argparse."""


def add_flags(parser: FlagGroup, settings: type, default: str | None = None, omit: Collection[str] = ()) -> None:
    """Add `--<field>` for each field of `settings` with a `help`, except those in `omit`. A flag not given is None.

    `default` replaces the fields' defaults in the help text where something else decides them ("the preset's").
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        if "help" not in field.metadata or field.name in omit:
            continue
        shown = field.default if default is None else default
        text = f"{field.metadata['help']} (default: {'none' if shown is None else shown})".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=text, **_options(hints[field.name]))


def given(args: argparse.Namespace, settings: type, prefix: str = "") -> dict[str, Any]:
    """The fields of `settings` that were given as flags, `--<prefix>_<field>`, with their values."""
    values = {field.name: getattr(args, f"{prefix}{field.name}", None) for field in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def add_run_flags(parser: FlagGroup, records: str, *, required: bool = True) -> None:
    """--model, --output, --limit and --overwrite of a program that does a single stage on a file of `records`."""
    parser.add_argument("--model", required=required, help="a folder, or a hub id (org/name, org/name@revision)")
    parser.add_argument("--output", type=Path, required=required, metavar="DIR", help="folder of the run")
    parser.add_argument("--limit", type=int, metavar="N", help=f"use only the first N {records} (default: all)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what a run with other settings left in the folder"
    )


def _options(hint: Any) -> dict[str, Any]:
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint, "metavar": {int: "N", float: "N", Path: "FILE"}.get(hint, "TEXT")}

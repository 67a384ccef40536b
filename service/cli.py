"""What the mains of the programs share: reading settings, and ending with a status and one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog
from pydantic import ValidationError

from service import logs
from service.errors import ServiceError
from service.settings import CommonSettings
from service.weights.manifest import ModelError

SomeSettings = TypeVar("SomeSettings", bound=CommonSettings)


def settings_from(cls: type[SomeSettings], argv: Sequence[str] | None) -> SomeSettings:
    """The settings from flags and environment; ends the process with status 2 and a line each for what is wrong."""
    try:
        return cls(_cli_parse_args=list(sys.argv[1:] if argv is None else argv))
    except ValidationError as exc:
        # Never the values: one of them may be a key.
        errors = exc.errors(include_url=False, include_input=False)
        found = [
            (str(error["loc"][0] if error["loc"] else "settings").replace("_", "-"), error["msg"]) for error in errors
        ]
        for flag, message in dict.fromkeys(found):
            sys.stderr.write(f"{cls.model_config.get('cli_prog_name')}: --{flag}: {message}\n")
        raise SystemExit(2) from None


def run(settings: SomeSettings, program: Callable[[SomeSettings], int]) -> int:
    """Run a program's body; what it cannot start with becomes one line and status 1."""
    logs.configure(settings.log_format, settings.log_level)
    try:
        return program(settings)
    except (ModelError, ServiceError, OSError, ValueError, RuntimeError) as exc:
        structlog.get_logger(__name__).error("cannot start", reason=str(exc))
        return 1

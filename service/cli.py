"""Shared by the mains of both programs: read the settings, and turn a failed start into a status and one line."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import getdoc
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import structlog
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource

from service.errors import ServiceError
from service.models.manifest import ModelError
from service.settings import MEMORY_URL, CommonSettings, SettingsGroup
from service.telemetry import logs

if TYPE_CHECKING:
    from argparse import _ArgumentGroup

# How long startup waits for Redis to check the password.
PING_SECONDS = 1.0

ProgramSettings = TypeVar("ProgramSettings", bound=CommonSettings)


class _Parser(ArgumentParser):
    """Names unknown flags in its error, but no values: one of them may be a key."""

    def error(self, message: str) -> NoReturn:
        before, unknown, arguments = message.partition("unrecognized arguments: ")
        if unknown:
            flags = [argument.partition("=")[0] for argument in arguments.split() if argument.startswith("-")]
            named = ", ".join(flags) or "a value that belongs to no flag (lists are separated by commas alone)"
            message = f"{before}{unknown}{named}"
        super().error(message)


def settings_from(cls: type[ProgramSettings], argv: Sequence[str] | None) -> ProgramSettings:
    """Read the settings from flags and environment. Mistakes get a line each on stderr and SystemExit(2)."""
    parser = _Parser(
        prog=cls.model_config["cli_prog_name"],
        usage="%(prog)s [flags]",
        description=getdoc(cls),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = CliSettingsSource[ArgumentParser](
        cls,
        cli_parse_args=list(sys.argv[1:] if argv is None else argv),
        root_parser=parser,
        add_argument_method=partial(_add_flag, _groups_by_field(parser, cls)),
    )
    try:
        return cls(_cli_settings_source=source)
    except ValidationError as exc:
        # Without the values: one of them may be a key.
        errors = exc.errors(include_url=False, include_input=False)
        mistakes = [(f"--{error['loc'][0]}: " if error["loc"] else "", error["msg"]) for error in errors]
        for flag, message in dict.fromkeys(mistakes):
            sys.stderr.write(f"{parser.prog}: {flag.replace('_', '-')}{message}\n")
        raise SystemExit(2) from None


def _groups_by_field(parser: ArgumentParser, cls: type[CommonSettings]) -> dict[str, _ArgumentGroup]:
    """Each field's group of --help: the one of the class that declares it."""
    groups: dict[str, _ArgumentGroup] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, SettingsGroup):
            group = parser.add_argument_group(base.model_config.get("title"))
            for name in base.model_fields:
                groups.setdefault(name, group)
    return groups


def _add_flag(groups: Mapping[str, _ArgumentGroup], _: ArgumentParser, *flags: str, dest: str, **options: Any) -> None:
    """ArgumentParser.add_argument into the field's group, without empty defaults: the help says what unset means."""
    if "[" in (options.get("metavar") or ""):
        options["metavar"] = "JSON" if options["metavar"].startswith("dict") else "LIST"
    options["help"] = re.sub(r" \(default: (None|\[\]|\{\})\)$", "", options["help"])
    groups[dest].add_argument(*flags, dest=dest, **options)


def run_program(settings: ProgramSettings, program: Callable[[ProgramSettings], int]) -> int:
    """Configure the log and run a program's body. An error that prevents the start becomes one line and status 1."""
    logs.configure(settings.log_format, settings.log_level)
    try:
        if settings.queue_url != MEMORY_URL:
            _check_password(settings.queue_url)
        return program(settings)
    except (ModelError, ServiceError, OSError, ValueError, RuntimeError) as exc:
        structlog.get_logger(__name__).error("cannot start", reason=str(exc))
        return 1


def _check_password(queue_url: str) -> None:
    """Raise ValueError if the URL is invalid or Redis refuses its user. An unreachable Redis may come up later."""
    # Imported here: --help should not wait for it.
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    timeouts = {"socket_timeout": PING_SECONDS, "socket_connect_timeout": PING_SECONDS}
    with redis.Redis.from_url(queue_url, retry=Retry(NoBackoff(), 0), **timeouts) as client:
        try:
            client.ping()
        except redis.AuthenticationError as exc:
            raise ValueError(f"Redis refuses the user or the password of --queue-url: {exc}") from exc
        except TypeError as exc:
            raise ValueError(f"--queue-url has an unknown parameter after the ?: {exc}") from exc
        except (redis.RedisError, OSError):
            pass

"""What the mains of the programs share: reading settings, and ending with a status and one line."""

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

# How long a start waits for a silent Redis to say whether the password is right.
PING_SECONDS = 1.0

SomeSettings = TypeVar("SomeSettings", bound=CommonSettings)


class _Parser(ArgumentParser):
    """Says which flags it does not know, and no values: one of them may be a key."""

    def error(self, message: str) -> NoReturn:
        before, unknown, arguments = message.partition("unrecognized arguments: ")
        if unknown:
            flags = [argument.partition("=")[0] for argument in arguments.split() if argument.startswith("-")]
            named = ", ".join(flags) or "a value that belongs to no flag (lists are separated by commas alone)"
            message = f"{before}{unknown}{named}"
        super().error(message)


def settings_from(cls: type[SomeSettings], argv: Sequence[str] | None) -> SomeSettings:
    """The settings from flags and environment; ends the process with status 2 and a line for each mistake."""
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
        # Never the values: one of them may be a key.
        errors = exc.errors(include_url=False, include_input=False)
        mistakes = [(f"--{error['loc'][0]}: " if error["loc"] else "", error["msg"]) for error in errors]
        for flag, message in dict.fromkeys(mistakes):
            sys.stderr.write(f"{parser.prog}: {flag.replace('_', '-')}{message}\n")
        raise SystemExit(2) from None


def _groups_by_field(parser: ArgumentParser, cls: type[CommonSettings]) -> dict[str, _ArgumentGroup]:
    """A titled group of --help for each class of settings, by the fields that the class adds."""
    groups: dict[str, _ArgumentGroup] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, SettingsGroup):
            group = parser.add_argument_group(base.model_config.get("title"))
            for name in base.model_fields:
                groups.setdefault(name, group)
    return groups


def _add_flag(groups: Mapping[str, _ArgumentGroup], _: ArgumentParser, *flags: str, dest: str, **options: Any) -> None:
    """ArgumentParser.add_argument, into the field's group; descriptions say themselves what "unset" means."""
    if "[" in (options.get("metavar") or ""):
        options["metavar"] = "JSON" if options["metavar"].startswith("dict") else "LIST"
    options["help"] = re.sub(r" \(default: (None|\[\]|\{\})\)$", "", options["help"])
    groups[dest].add_argument(*flags, dest=dest, **options)


def run_program(settings: SomeSettings, program: Callable[[SomeSettings], int]) -> int:
    """Run a program's body; what it cannot start with becomes one line and status 1."""
    logs.configure(settings.log_format, settings.log_level)
    try:
        if settings.queue_url != MEMORY_URL:
            _check_password(settings.queue_url)
        return program(settings)
    except (ModelError, ServiceError, OSError, ValueError, RuntimeError) as exc:
        structlog.get_logger(__name__).error("cannot start", reason=str(exc))
        return 1


def _check_password(queue_url: str) -> None:
    """Raises ValueError for a URL that is none, or whose user Redis refuses; one that is away may come later."""
    # Here: --help should not wait for it.
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
            raise ValueError(f"the part of --queue-url behind the ? is not known: {exc}") from exc
        except (redis.RedisError, OSError):
            pass

"""Shared by the mains of both programs: read the settings, and turn a failed start into a status and one line."""

from __future__ import annotations

import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from inspect import getdoc
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog
from pydantic import ValidationError
from pydantic_settings import CliSettingsSource

from client.runtime.parser import Parser
from client.runtime.program import USAGE
from service.errors import ServiceError
from service.models.manifest import DEFAULT_MODEL, ModelError
from service.process.listening import ListenError
from service.settings import MEMORY_URL, CommonSettings, SettingsGroup
from service.settings.variables import PREFIX, unknown_variables
from service.telemetry import logs

if TYPE_CHECKING:
    from argparse import _ArgumentGroup

    from pydantic_core import ErrorDetails

# How long startup waits for Redis to check the password.
PING_SECONDS = 1.0

# Settings that most commands name; --help has them first.
COMMON: Final = (
    *("model", "engine", "judge", "host", "port", "api_key"),
    *("queue_url", "device", "max_tokens", "calibration_file"),
)
FAKE: Final = "fake"
HELP_ALL: Final = "--help-all"
# What --help calls a value, by its type or by its setting.
_OF_TYPE: Final = {
    "str": "TEXT",
    "int": "N",
    "float": "N",
    "date": "YYYY-MM-DD",
    "Path": "FILE",
    "SecretStr": "SECRET",
}
_METAVARS: Final = {
    "api_key": "KEYS",
    "calibration_file": "FILES",
    "host": "ADDRESS",
    "lora": "NAME=FOLDER",
    "metrics_host": "ADDRESS",
    "model": "MODEL",
    "otel_endpoint": "URL",
    "queue_url": "URL",
    "template_file": "FILES",
    "upstream_url": "URL",
}

ProgramSettings = TypeVar("ProgramSettings", bound=CommonSettings)


def settings_from(cls: type[ProgramSettings], argv: Sequence[str] | None) -> ProgramSettings:
    """Read the settings from flags and environment. Mistakes get a line each on stderr and SystemExit(2)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(
        prog=str(cls.model_config["cli_prog_name"]),
        description=getdoc(cls),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    groups = _groups_by_field(parser, cls)
    source = CliSettingsSource[Parser](
        cls,
        cli_parse_args=arguments,
        root_parser=parser,
        parse_args_method=Parser.parse_args,
        add_argument_method=partial(_add_flag, cls if HELP_ALL in arguments else None, groups),
    )
    try:
        return cls(_cli_settings_source=source)
    except ValidationError as exc:
        # Without the values: one of them may be a key.
        errors = exc.errors(include_url=False, include_input=False)
        for mistake in dict.fromkeys(_mistake(error, arguments) for error in errors):
            sys.stderr.write(f"{parser.prog}: {mistake}\n")
        raise SystemExit(2) from None


def _mistake(error: ErrorDetails, arguments: Sequence[str]) -> str:
    """What is wrong with a setting, after the name under which it was given: a flag's or a variable's."""
    message = error["msg"].replace("Input should be", "must be").partition(", unable to parse")[0]
    message = message.removeprefix("Value error, ")
    if not error["loc"]:
        return message
    name = str(error["loc"][0])
    flag, variable = f"--{name.replace('_', '-')}", f"{PREFIX}{name.upper()}"
    by_flag = any(argument.partition("=")[0] == flag for argument in arguments)
    return f"{flag if by_flag or variable not in os.environ else variable}: {message}"


def _groups_by_field(parser: Parser, cls: type[CommonSettings]) -> dict[str, _ArgumentGroup]:
    """Each field's group of --help: the common flags' or the one of the class that declares it."""
    common = parser.add_argument_group("common flags")
    groups: dict[str, _ArgumentGroup] = {name: common for name in COMMON if name in cls.model_fields}
    for base in reversed(cls.__mro__):
        if issubclass(base, SettingsGroup):
            group = parser.add_argument_group(base.model_config.get("title"))
            for name in base.model_fields:
                groups.setdefault(name, group)
    about = parser.add_argument_group("help")
    about.add_argument("-h", "--help", action="help", help="show the flags and exit")
    about.add_argument(HELP_ALL, action="help", help="also show the flags of the fake engine, which are for tests")
    about.add_argument(
        "--version",
        action="version",
        version=f"judge-as-api {version('judge-as-api')}",
        help="show the version and exit",
    )
    return groups


def _add_flag(
    shown: type[CommonSettings] | None,
    groups: Mapping[str, _ArgumentGroup],
    _: ArgumentParser,
    *flags: str,
    dest: str,
    **options: Any,
) -> None:
    """ArgumentParser.add_argument into the field's group, with words that people know for types and defaults.

    Flags that --help hides are explained from the fields of `shown`, if it is given.
    """
    if options.get("metavar") is not None:
        kind = options["metavar"]
        of_kind = "JSON" if kind.startswith("dict") else "LIST" if "[" in kind else _OF_TYPE.get(kind, kind)
        options["metavar"] = _METAVARS.get(dest, of_kind)
    if options["help"] == SUPPRESS and shown is not None:
        options["help"] = shown.model_fields[dest].description
    help_text = re.sub(r" \(default: (None|\[\]|\{\}|)\)$", "", options["help"])
    options["help"] = help_text.replace("(default: True)", "(default: on)").replace(
        "(default: False)", "(default: off)"
    )
    groups[dest].add_argument(*flags, dest=dest, **options)


def run_program(settings: ProgramSettings, program: Callable[[ProgramSettings], int]) -> int:
    """Configure the log and run a program's body. An error that prevents the start becomes a line and a status.

    That is 2 for an address that cannot be listened on, as for any flag that cannot be, and 1 for everything else.
    """
    logs.configure(settings.log_format, settings.log_level)
    for sentence in unknown_variables(os.environ):
        structlog.get_logger(__name__).warning(sentence)
    try:
        return program(settings)
    except ListenError as exc:
        structlog.get_logger(__name__).error("cannot start", reason=str(exc))
        return USAGE
    except (ModelError, ServiceError, OSError, ValueError, RuntimeError) as exc:
        structlog.get_logger(__name__).error("cannot start", reason=str(exc))
        return 1


def announce(settings: CommonSettings) -> None:
    """Say at once what is loaded: the imports and the files behind it take seconds."""
    name = settings.model or settings.upstream_url or (FAKE if settings.engine == FAKE else DEFAULT_MODEL)
    structlog.get_logger(__name__).info(f"loading {name}", engine=settings.engine)


def check_queue(queue_url: str) -> None:
    """Raise ValueError if the URL is invalid or Redis refuses its user. An unreachable Redis may come up later."""
    if queue_url == MEMORY_URL:
        return
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

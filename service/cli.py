"""What the mains of the programs share: reading settings, and ending with a status and one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog
from pydantic import ValidationError

from service import logs
from service.errors import ServiceError
from service.settings import MEMORY_URL, CommonSettings
from service.weights.manifest import ModelError

# How long a start waits for a silent Redis to say whether the password is right.
PING_SECONDS = 1.0

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

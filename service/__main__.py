"""`python -m service`: resolve the model, put the service together, and serve until told to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import structlog
from pydantic import ValidationError

from service import logs
from service.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; returns the process's exit status. `--help` explains the flags."""
    try:
        settings = Settings(_cli_parse_args=list(sys.argv[1:] if argv is None else argv))
    except ValidationError as exc:
        # Never the values: one of them may be a key.
        for error in exc.errors(include_url=False, include_input=False):
            flag = str(error["loc"][0] if error["loc"] else "settings").replace("_", "-")
            sys.stderr.write(f"python -m service: --{flag}: {error['msg']}\n")
        return 2
    logs.configure(settings.log_format, settings.log_level)
    # Imported only now: these pull in transformers, and --help should not wait for it.
    from service.errors import ServiceError
    from service.models import ModelError
    from service.server import serve

    try:
        return serve(settings)
    except (ModelError, ServiceError, OSError) as exc:
        structlog.get_logger(__name__).error("cannot start", reason=str(exc))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

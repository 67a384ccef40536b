"""`python -m service`: answer HTTP, and run the model unless a queue on Redis leaves that to workers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from service import cli
from service.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; returns the process's exit status. `--help` explains the flags."""
    settings = cli.settings_from(Settings, argv)
    # Imported only now: it pulls in transformers, and --help should not wait for that.
    from service.server import serve

    return cli.run(settings, serve)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m service`: answers HTTP, and runs the model unless workers on a Redis queue do."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m service", "service")

from collections.abc import Sequence
from functools import partial

from service.process import stopping


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service; returns its exit status. `--help` explains the flags."""
    return stopping.run_stoppable("python -m service", partial(_serve, argv))


def _serve(argv: Sequence[str] | None, stop: stopping.Stop) -> int:
    from service import cli
    from service.process.listening import bind
    from service.settings import Settings

    def body(settings: Settings) -> int:
        sockets = bind(settings.host, settings.port)
        cli.check_queue(settings.queue_url)
        cli.announce(settings)
        # Imported here: it loads transformers, and neither --help nor a port in use should wait for that.
        from service.server import serve

        return serve(settings, sockets, stop)

    return cli.run_program(cli.settings_from(Settings, argv), body)


if __name__ == "__main__":
    stopping.finish(main)

"""The command ``tursi``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from tursi.cli import (
    apply,
    archives,
    chat,
    daemon,
    database,
    deployments,
    doctor,
    generations,
    history,
    install,
    keys,
    models,
    run,
    service,
    show,
    statistics,
    top,
)
from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.terminal import note, tolerate
from tursi.model import folders

_MAX_SENTENCE = 200


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("tursi: interrupted")
            ctx.exit(Exit.INTERRUPTED)
        except BrokenPipeError:
            # Who read it has seen enough (head, less).
            _silence()
            ctx.exit(Exit.OK)
        except OSError as error:
            if error.filename is not None:
                raise
            _silence()
            raise Failure(f"The output can't be written: {error.strerror}.") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Click's own cuts the sentences off.
        rows = [
            (name, self.commands[name].get_short_help_str(_MAX_SENTENCE))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _silence() -> None:
    """Let what Python would still flush at its end go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group("tursi", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(path_type=Path, readable=False),
    envvar="TURSI_SOCKET",
    help="The daemon's control socket (default: control.sock in its runtime folder).",
)
@click.option(
    "--url",
    envvar="TURSI_URL",
    help="Talk to the daemon at this URL instead, with the key in TURSI_API_KEY.",
)
@click.pass_context
def main(context: click.Context, socket: Path | None, url: str | None) -> None:
    """Serve AI models on this machine, through the Tursi daemon (`tursi start`)."""
    tolerate()
    chosen = socket or folders(os.environ, os.getuid()).socket
    key = os.environ.get("TURSI_API_KEY", "").strip()
    context.obj = Connection(chosen.absolute(), url or "", key)


for _command in (
    deployments.up,
    deployments.down,
    deployments.ps,
    deployments.load,
    deployments.unload,
    apply.apply,
    generations.history,
    generations.diff,
    generations.rollback,
    generations.canary,
    generations.promote,
    models.pull,
    models.pulls,
    models.models,
    models.rm,
    show.show,
    archives.export,
    archives.import_,
    history.logs,
    statistics.stats,
    top.top,
    history.events,
    history.crashes,
    history.why,
    history.audit,
    database.db,
    run.run,
    chat.chat,
    install.install_service,
    keys.keys,
    service.start,
    service.stop,
    service.restart,
    service.reload,
    service.status,
    daemon.version,
    doctor.doctor,
):
    main.add_command(_command)

"""The command line of ``twistd tursi``."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from twisted.python import usage

from tursi import config
from tursi.errors import TursiError
from tursi.model import folders
from tursi.service import Daemon, exit_status, preflight


class Options(usage.Options):
    """Options of ``twistd tursi``; everything else is in the configuration file."""

    longdesc = "Serve AI models on this machine. The file etc/tursi.toml explains every setting."
    optParameters = [  # noqa: N815, RUF012 - Twisted's name and form
        ["config", "c", None, "Configuration file (TOML)."],
        ["state", "s", None, "Folder of the database and logs."],
        ["runtime", "r", None, "Folder of the control socket."],
        ["cache", None, None, "Folder of downloaded models."],
    ]

    def postOptions(self) -> None:  # noqa: N802 - Twisted's name
        """Refuse whatever can be known to fail, before twistd forks."""
        try:
            self._read()
        except TursiError as error:
            sys.stderr.write(f"tursi: {error.message}\n")
            raise SystemExit(exit_status(error)) from None

    def _read(self) -> None:
        places = folders(os.environ, os.getuid())
        # Made absolute now: a daemonized process has another working directory.
        chosen = {
            name: Path(self[name]).absolute()
            for name in ("state", "runtime", "cache")
            if self[name] is not None
        }
        if "state" in chosen and "cache" not in chosen:
            chosen["cache"] = chosen["state"] / "cache"
        if "state" in chosen and "runtime" not in chosen:
            chosen["runtime"] = chosen["state"] / "run"
        places = replace(places, **chosen)
        given = Path(self["config"]).absolute() if self["config"] is not None else None
        configuration = config.load(given, places.configuration)
        preflight(configuration, places)
        self["places"], self["configuration"] = places, configuration


def makeService(options: Options) -> Daemon:  # noqa: N802 - Twisted's name
    """The daemon, constructed; it acts in ``startService``."""
    from twisted.internet import reactor

    foreground = bool(options.parent and options.parent.get("nodaemon"))
    return Daemon(options["configuration"], options["places"], reactor, foreground=foreground)

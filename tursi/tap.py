"""The command line of ``twistd tursi``.

twistd's own options for its PID file and its log are taken over: what twistd does
with them keeps a daemon from starting for a stale PID file, loses the file with
the privileges to remove it, and opens the log before it has changed its user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twisted.python import usage

from tursi import config, launch, logging, signals
from tursi.errors import TursiError
from tursi.model import folders

if TYPE_CHECKING:
    from tursi.service import Daemon

_USAGE = 64
_TWISTDS_PID_FILE = "twistd.pid"
"""Its default, which nobody has asked for."""


class Options(usage.Options):
    """Options of ``twistd tursi``; everything else is in the configuration file."""

    longdesc = "Serve AI models on this machine. The file etc/tursi.toml explains every setting."
    optParameters = [  # noqa: N815, RUF012 - Twisted's name and form
        ["config", "c", None, "Configuration file (TOML)."],
        ["state", "s", None, "Folder of the database and logs."],
        ["runtime", "r", None, "Folder of the control socket."],
        ["cache", None, None, "Folder of downloaded models."],
    ]

    def parseOptions(self, options: Sequence[str] | None = None) -> None:  # noqa: N802 - Twisted's name
        """Read them; from here on no signal kills by accident."""
        if self.parent is None:
            super().parseOptions(options)
            return
        signals.hold()
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            sys.stderr.write(f"tursi: {error} (twistd tursi --help lists the options)\n")
            raise SystemExit(_USAGE) from None

    def postOptions(self) -> None:  # noqa: N802 - Twisted's name
        """Refuse whatever can be known to fail, before twistd forks."""
        # It takes a moment, during which signals are already held.
        from tursi.preflight import exit_status

        try:
            self._read()
        except TursiError as error:
            sys.stderr.write(f"tursi: {error.message}\n")
            raise SystemExit(exit_status(error)) from None

    def _read(self) -> None:
        from tursi.preflight import preflight

        places = folders(os.environ, os.getuid()).moved(
            # Made absolute: a daemonized process has another working directory.
            **{
                name: Path(self[name])
                for name in ("state", "runtime", "cache")
                if self[name] is not None
            }
        )
        given = Path(self["config"]).absolute() if self["config"] is not None else None
        configuration = config.load(given, places.configuration)
        self["places"], self["configuration"] = places, configuration
        self["launch"] = self._take_over(given)
        logging.current.configure(configuration.log)
        preflight(configuration, places)

    def _take_over(self, configuration: Path | None) -> launch.Launch:
        """What twistd was told, and what it shall no longer do."""
        if self.parent is None or "nodaemon" not in self.parent:
            # "twist" stays in the foreground and does none of it.
            return launch.Launch(configuration=configuration)
        twistd: Any = self.parent
        foreground = bool(twistd["nodaemon"] or twistd["debug"])
        pid_file = twistd["pidfile"]
        twistd["pidfile"] = ""
        log_file = twistd["logfile"]
        ours = not twistd["logger"] and not twistd["syslog"]
        if ours:
            twistd["logger"] = "tursi.logging.observer"
        parent = None
        if not foreground:
            launch.close_inherited(os.environ)
            parent = launch.Parent()
        return launch.Launch(
            foreground=foreground,
            configuration=configuration,
            pid_file=Path(pid_file).absolute()
            if pid_file and pid_file != _TWISTDS_PID_FILE
            else None,
            log_file=Path(log_file).absolute() if log_file and log_file != "-" else None,
            owner=_owner(twistd["uid"], twistd["gid"]),
            output=logging.standard_output(),
            parent=parent,
        )


def _owner(uid: int | None, gid: int | None) -> tuple[int, int] | None:
    """The user and the group that twistd will become, if it will."""
    if uid is None and gid is None:
        return None
    if gid is None and uid is not None:
        import pwd

        gid = pwd.getpwuid(uid).pw_gid
    return (os.getuid() if uid is None else uid, os.getgid() if gid is None else gid)


def makeService(options: Options, **other: Any) -> Daemon:  # noqa: N802 - Twisted's name
    """The daemon, constructed; it acts in ``startService``."""
    from twisted.internet import reactor

    from tursi.service import Daemon

    return Daemon(options["configuration"], options["places"], reactor, options["launch"], **other)

"""The daemon as ``twistd -n tursi`` runs it, with scripted workers instead of models."""

from __future__ import annotations

import sys
from pathlib import Path

from twisted.internet import reactor
from twisted.logger import globalLogBeginner, textFileLogObserver

from tursi.service import Daemon
from tursi.tap import Options

WORKER = Path(__file__).parent.parent / "scripted_worker.py"


def main() -> None:
    globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stderr)])
    options = Options()
    options.parseOptions(sys.argv[1:])
    service = Daemon(
        options["configuration"],
        options["places"],
        reactor,
        foreground=True,
        worker_command=(sys.executable, "-I", "-u", str(WORKER)),
    )
    service.startService()
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.run()


if __name__ == "__main__":
    main()

"""A monitor that spawns a program again and again, for ``supervision.py`` to time.

Run: ``python spawning.py FOLDER COMMAND...``. Writes a line to FOLDER/restarts for each end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from twisted.internet import reactor as _reactor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "integration"))

from small_daemon import ProgramChild

from tursi.supervision.leftovers import become_subreaper
from tursi.supervision.monitor import WorkerMonitor

reactor: Any = _reactor


def main(folder: Path, command: tuple[str, ...]) -> None:
    become_subreaper()
    monitor = WorkerMonitor(reactor)
    with (folder / "restarts").open("a", buffering=1) as restarts:

        def tell(event: str, **_: object) -> None:
            if event == "exited":
                restarts.write("\n")

        monitor.addChild(ProgramChild("again", folder, command, tell))
        reactor.callWhenRunning(monitor.startService)
        reactor.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]))

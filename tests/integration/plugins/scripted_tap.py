"""``twistd tursi`` in every detail, but for what its workers run.

``TURSI_TEST_FAULT`` gives the daemon a defect at a certain moment.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from twisted.internet.defer import Deferred

from tursi import service, tap
from tursi.service import Daemon
from tursi.tap import Options

__all__ = ["Options", "makeService"]

WORKER = Path(__file__).parents[2] / "scripted_worker.py"
_SAVE_SECONDS = 1.0


def makeService(options: Options) -> Daemon:  # noqa: N802 - Twisted's name
    daemon = tap.makeService(
        options, worker_command=(sys.executable, "-I", "-u", str(WORKER.resolve()))
    )
    match os.environ.get("TURSI_TEST_FAULT"):
        case "hang before it listens":
            daemon._begin = lambda: time.sleep(600)  # type: ignore[method-assign] # a fault
        case "fail before it listens":
            daemon._begin = _fail  # type: ignore[method-assign] # the same
        case "fail after it listens":
            daemon._fleet.open = _fail  # type: ignore[method-assign] # the same
        case "hang at the end":
            service._SAVE_SECONDS = _SAVE_SECONDS
            daemon._fleet.close = Deferred  # type: ignore[assignment] # the same
        case "block at the end":
            service._SAVE_SECONDS = _SAVE_SECONDS
            daemon._fleet.close = lambda: time.sleep(600)  # type: ignore[assignment,return-value] # the same
    return daemon


def _fail() -> NoReturn:
    raise RuntimeError("a defect")

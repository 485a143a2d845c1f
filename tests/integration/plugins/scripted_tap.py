"""``twistd tursi`` in every detail, but for what its workers run.

``TURSI_TEST_FAULT`` gives the daemon a defect at a certain moment, and
``TURSI_TEST_FETCHER`` is a program that its fetchers are instead, ``TURSI_TEST_HELLO``
how many seconds its workers take to say hello, ``TURSI_TEST_MEMORY`` a file that says how
many bytes of memory the machine has free.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from twisted.internet.defer import Deferred

from tursi import hub, service, tap
from tursi.fleet import retries
from tursi.service import Daemon
from tursi.tap import Options

__all__ = ["Options", "makeService"]

WORKER = Path(__file__).parents[2] / "scripted_worker.py"
_SAVE_SECONDS = 1.0
_RETRY_SECONDS = (0.5, 2.0)


def makeService(options: Options) -> Daemon:  # noqa: N802 - Twisted's name
    hello = os.environ.get("TURSI_TEST_HELLO", "0")
    fetcher = os.environ.get("TURSI_TEST_FETCHER")
    if fetcher is not None:
        hub._COMMAND = (sys.executable, "-I", "-u", fetcher)
        retries.FIRST_SECONDS, retries.MOST_SECONDS = _RETRY_SECONDS
    daemon = tap.makeService(
        options,
        worker_command=(sys.executable, "-I", "-u", str(WORKER.resolve()), "--hello-after", hello),
    )
    memory = os.environ.get("TURSI_TEST_MEMORY")
    if memory is not None:
        daemon._fleet._memory._available = lambda: int(Path(memory).read_text())
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

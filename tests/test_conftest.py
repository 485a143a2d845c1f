"""The fixture that watches every test is itself watched here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CASES = """
from pytest_twisted import ensureDeferred
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail
from twisted.internet.task import deferLater
from twisted.logger import Logger

log = Logger()


def test_bad_timer():
    reactor.callLater(100, int)


def test_bad_log():
    with log.failuresHandled("expected by nobody"):
        1 / 0


def test_bad_deferred():
    fail(ValueError("handled by nobody"))


@ensureDeferred
async def test_bad_timer_after_waiting():
    reactor.callLater(100, int)
    await deferLater(reactor, 0.001, int)


def test_good_cancelled_timer():
    reactor.callLater(100, int).cancel()


def test_good_timer_that_ends_at_once():
    reactor.callLater(0, int)


def test_good_flushed(logged_failures):
    with log.failuresHandled("expected"):
        1 / 0
    deferred = Deferred()
    deferred.errback(ValueError())
    del deferred
    assert len(logged_failures.flush(ZeroDivisionError)) == 1
    assert len(logged_failures.flush()) == 1


@ensureDeferred
async def test_good_waiting():
    await deferLater(reactor, 0.001, int)
"""


def test_leftovers_fail_a_test(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_cases.py").write_text(CASES)
    command = (sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", tmp_path)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    wrong = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert sorted(each.partition("::")[2] for each in wrong) == [
        "test_bad_deferred",
        "test_bad_log",
        "test_bad_timer",
        "test_bad_timer_after_waiting",
    ]
    assert "8 passed, 4 errors" in done.stdout

"""What holds for every test: it leaves no timer running and no error unseen in the log."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from hypothesis import settings
from zope.interface import implementer

from twisted.internet import reactor as _reactor
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.python.failure import Failure

# Two busy cores make the wall-clock deadline of one example meaningless. What chance
# finds is for whoever looks for it, not for whoever lands something else.
settings.register_profile("tursi", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tursi")

reactor: Any = _reactor


@implementer(ILogObserver)
class LoggedFailures:
    """Failures logged during a test; what isn't flushed fails it."""

    def __init__(self) -> None:
        self._failures: list[Failure] = []

    def __call__(self, event: LogEvent) -> None:
        failure = event.get("log_failure")
        if failure is not None:
            self._failures.append(failure)

    def flush(self, *types: type[BaseException]) -> list[Failure]:
        """Take the failures of these types (of any type if none is given): they were expected."""
        # A failed Deferred that nobody handled is logged when it is collected.
        gc.collect()
        taken = [each for each in self._failures if not types or each.check(*types)]
        self._failures = [each for each in self._failures if each not in taken]
        return taken

    def unexpected(self) -> list[str]:
        """A traceback for each that was not flushed."""
        return [each.getTraceback() for each in self._failures]


@pytest.fixture(autouse=True)
def logged_failures() -> Iterator[LoggedFailures]:
    """The failures that the test logs; take the expected ones with ``flush``."""
    before = set(reactor.getDelayedCalls())
    failures = LoggedFailures()
    globalLogPublisher.addObserver(failures)
    try:
        yield failures
        if set(reactor.getDelayedCalls()) - before:
            # What was cancelled or closed at the very end needs one turn to go.
            pytest_twisted.blockon(deferLater(reactor, 0, lambda: None))
        # Only the young generations: a full collection in each test would cost
        # more than most tests.
        gc.collect(1)
    finally:
        globalLogPublisher.removeObserver(failures)
    leftover = [call for call in reactor.getDelayedCalls() if call not in before]
    for call in leftover:
        call.cancel()
    if leftover:
        pytest.fail("The test left timers running:\n" + "\n".join(map(str, leftover)))
    if failures.unexpected():
        pytest.fail("The test logged failures:\n" + "\n".join(failures.unexpected()))


@pytest.fixture(params=[True, False], ids=["hot", "ordinary"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test of the HTTP front with the hot path and without."""
    # Of tests/api, whose tests alone use this; two modules named conftest would
    # get into each other's way.
    import conversation

    monkeypatch.setattr(conversation, "hot_path", request.param)

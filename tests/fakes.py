"""Stand-ins that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet.testing import MemoryReactorClock
from twisted.python.failure import Failure


class InlineReactor(MemoryReactorClock):
    """A reactor in memory whose other threads are this one."""

    def callFromThread(  # noqa: N802 - Twisted's name
        self,
        callable: Callable[..., object],  # noqa: A002
        *args: object,
        **kwargs: object,
    ) -> None:
        """Call at once."""
        callable(*args, **kwargs)


class InlineThreadPool:
    """A thread pool that does everything at once, in the caller's thread."""

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def callInThreadWithCallback(  # noqa: N802 - Twisted's name
        self,
        finished: Callable[[bool, object], None],
        function: Callable[..., object],
        *args: object,
        **kwargs: object,
    ) -> None:
        """Call ``function``, then ``finished`` with its success and result."""
        try:
            result: object = function(*args, **kwargs)
        except Exception:  # noqa: BLE001 - the pool hands over whatever it was
            finished(False, Failure())
        else:
            finished(True, result)


class InlineConnectionPool(ConnectionPool):
    """Database connections without threads: every Deferred has fired when it is returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threadpool: Any = InlineThreadPool()

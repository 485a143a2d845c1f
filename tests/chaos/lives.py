"""Thousands of workers that end at once: what is left of them, and how fast it goes.

``python tests/chaos/lives.py --count 10000`` runs a monitor with keepers and a
worker that ends by itself, again and again, and ends with 1 if descriptors,
zombies, timers or memory are left.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from twisted.internet import reactor as _reactor
from twisted.internet.defer import ensureDeferred
from twisted.internet.task import deferLater

from tursi.supervision.leftovers import become_subreaper
from tursi.supervision.monitor import WorkerMonitor

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "integration")]

from small_daemon import ProgramChild  # noqa: E402 - after the path

reactor: Any = _reactor
WARM = 200
TELL_SECONDS = 20.0
MAX_RSS = 5 * 2**20
CHILDREN = 4


class Counted(ProgramChild):
    """Keeps the number of its ends and nothing else of them."""

    ended = 0

    def exited(self, exit: Any) -> float | None:  # noqa: A002 - the field's word
        self.ended += 1
        for kept in (self.lives, self.pids, self.failures):
            kept.clear()
        for log in self.logs[:-1]:
            log.unlink(missing_ok=True)
        del self.logs[:-1]
        return self.delay


class Used:
    """What this process uses at one time."""

    def __init__(self) -> None:
        process = psutil.Process()
        self.descriptors = process.num_fds()
        self.zombies = sum(
            each.status() == psutil.STATUS_ZOMBIE for each in process.children(recursive=True)
        )
        self.timers = len(reactor.getDelayedCalls())
        self.rss = process.memory_info().rss

    def __str__(self) -> str:
        return (
            f"{self.descriptors} descriptors, {self.zombies} zombies, {self.timers} timers,"
            f" RSS {self.rss / 2**20:.2f} MiB"
        )


async def run(folder: Path, count: int) -> int:
    """The exit status."""
    become_subreaper()
    monitor = WorkerMonitor(reactor)
    children = [Counted(f"child{each}", folder, ("/bin/true",)) for each in range(CHILDREN)]
    for child in children:
        monitor.addChild(child)
    monitor.startService()

    async def reach(total: int) -> None:
        told = time.monotonic()
        while (ended := sum(child.ended for child in children)) < total:
            await deferLater(reactor, 0.02)
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                print(f"{ended} of {total}: {Used()}", flush=True)

    async def at_rest() -> Used:
        for child in children:
            child.delay = None
        while monitor.protocols or monitor.restart:
            await deferLater(reactor, 0.02)
        await deferLater(reactor, 0.2)
        return Used()

    await reach(WARM)
    before = await at_rest()
    began, done = time.monotonic(), sum(child.ended for child in children)
    for child in children:
        child.delay = 0.0
        monitor.startProcess(child.name)
    await reach(done + count)
    seconds = time.monotonic() - began
    after = await at_rest()
    cycles = sum(child.ended for child in children) - done
    await monitor.stopService()
    print(f"{cycles} cycles in {seconds:.1f} s: {cycles / seconds:.0f} a second")
    print(f"before: {before}\nafter:  {after}")
    kept = (
        after.descriptors == before.descriptors
        and not after.zombies
        and after.timers <= before.timers
        and after.rss - before.rss < MAX_RSS
    )
    print("nothing is left" if kept else "VIOLATION: something is left")
    return 0 if kept else 1


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=10_000)
    count: int = options.parse_args().count
    statuses: list[int] = []
    with tempfile.TemporaryDirectory(prefix="tursi-") as folder:

        def begin() -> None:
            running = ensureDeferred(run(Path(folder), count))
            running.addCallbacks(statuses.append, lambda failure: failure.printTraceback())
            running.addBoth(lambda _: reactor.stop())

        reactor.callWhenRunning(begin)
        reactor.run()
    return statuses[0] if statuses else 1


if __name__ == "__main__":
    sys.exit(main())

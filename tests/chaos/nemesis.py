"""Who does harm during a chaos run."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from checker import Fault, Window
from clock_daemon import set_clock
from daemon import Daemon
from scripted_worker import OBEYED
from stand_in_hub import Fault as StandInFault
from stand_in_hub import StandInHub

DEATHS_PER_MINUTE = 18
"""At 21 the daemon rightly stops starting anything for a minute."""
HANGS = 2
"""Of each replica: at the third it is quarantined."""
FOUND_SECONDS = 12.0
"""Until a hung worker has been found, examined and killed, on a busy machine."""
KILLED_SECONDS = 1.0
GONE_SECONDS = 5.0
"""Until nothing is left of a killed daemon; the keeper's own test has the tight bound."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to do harm to a worker."""

    name: str
    weight: int
    number: int
    """Of the signal."""
    deadly: bool = True
    hangs: bool = False
    keeper: bool = False
    """Whether the keeper gets it."""
    anywhere: bool = False
    """Whether a deployment that is being changed may be hit by it, too."""


def obeyed(what: str) -> int:
    """The signal at which a worker does that."""
    return int(signal.SIGRTMIN) + OBEYED.index(what)


KINDS = (
    Kind("kill -9 of a worker", 5, signal.SIGKILL, anywhere=True),
    Kind("crash", 1, signal.SIGSEGV),
    Kind("kill -9 of a keeper", 4, signal.SIGKILL, keeper=True, anywhere=True),
    Kind("worker stopped", 2, signal.SIGSTOP, hangs=True),
    Kind("hang with the lock", 1, obeyed("hang-gil"), hangs=True),
    Kind("hang without the lock", 1, obeyed("hang-nogil"), hangs=True),
    Kind("exit 3", 2, obeyed("exit-3")),
    Kind("exit 0", 1, obeyed("exit-0")),
    Kind("garbage", 1, obeyed("garbage")),
    Kind("closed socket", 1, obeyed("close")),
    Kind("keeper stopped", 1, signal.SIGSTOP, deadly=False, keeper=True),
    Kind("flood", 3, obeyed("flood"), deadly=False),
    Kind("escapee", 2, obeyed("fork"), deadly=False, anywhere=True),
)
DAEMON_KINDS = (
    ("kill -9 of the daemon", 3),
    ("restart of the daemon", 1),
    ("daemon stopped", 1),
    ("reload", 2),
    ("kill -9 of a worker of a stopped daemon", 1),
    ("all workers at once", 1),
    ("clock", 2),
)
DOWNLOAD_KINDS = (
    "kill -9 of a fetcher", "kill -9 of a fetcher", "kill -9 of its keeper", "fetcher stopped",
    "hub in trouble", "hub in trouble",
)  # fmt: skip
HUB_FAULTS = (
    StandInFault("/content/", "truncate", method="GET", times=1),
    StandInFault("/content/", "slow", method="GET", times=2, seconds=0.2),
    StandInFault("/content/", "corrupt", method="GET", times=1),
    StandInFault("/content/", "whole", method="GET", times=2),
    StandInFault("/content/", "stall", method="GET", times=1),
    StandInFault("/api/", status=503, times=1),
    StandInFault("/api/", status=429, headers={"Retry-After": "1"}, times=1),
    StandInFault("/api/", "garbage", times=1),
)
JUMPS = (-3600.0, 3600.0, 0.0, -7.0, 86400.0)


class Nemesis(threading.Thread):
    """Does harm at random, until ``end``; ``heal`` undoes what is still done."""

    def __init__(
        self,
        running: Daemon,
        hit: tuple[str, ...],
        changed: tuple[str, ...],
        clock: Path,
        chance: random.Random,
        environment: dict[str, str],
        hub: StandInHub,
        *,
        pause: float,
        kill_daemon_at: float,
        spare_daemon_after: float,
        tell_fault: Callable[[Fault], None],
        tell_window: Callable[[Window], None],
        tell_violation: Callable[[str], None],
    ) -> None:
        """The daemon is killed ``kill_daemon_at`` seconds from now and whenever chance wants.

        After ``spare_daemon_after`` seconds it isn't any more.
        """
        super().__init__(name="nemesis", daemon=True)
        self._running = running
        self._hit = hit
        self._changed = changed
        self._clock = clock
        self._chance = chance
        self._environment = environment
        self._hub = hub
        self._pause = pause
        self._kill_at = time.monotonic() + kill_daemon_at
        self._spare_after = time.monotonic() + spare_daemon_after
        self._tell_fault = tell_fault
        self._tell_window = tell_window
        self._tell_violation = tell_violation
        self._ending = threading.Event()
        self._deaths: list[float] = []
        self._hangs: dict[tuple[str, int], int] = {}
        self._stopped: list[psutil.Process] = []
        """Keepers that have been stopped."""
        self.daemons = 1
        """How many there have been."""
        self.alive = threading.Event()
        """Whether the daemon is up."""
        self.alive.set()
        self.gone_seconds: list[float] = []
        """How long it took until nothing was left of each killed daemon."""

    def end(self) -> None:
        """Do no more harm."""
        self._ending.set()

    def run(self) -> None:
        while not self._ending.wait(self._pause * (0.5 + self._chance.random())):
            try:
                if time.monotonic() > self._kill_at:
                    self._kill_at = math.inf
                    self._replace_daemon()
                elif self._chance.random() < 0.25:
                    self._hit_daemon()
                elif self._chance.random() < 0.25:
                    self._hit_download()
                else:
                    self._hit_worker()
            except (httpx.HTTPError, psutil.Error, AssertionError) as error:
                self._tell_violation(f"the nemesis failed: {error!r}")

    # -- workers

    def _hit_worker(self) -> None:
        kind = self._chance.choices(KINDS, [each.weight for each in KINDS])[0]
        names = self._hit + self._changed if kind.anywhere else self._hit
        name = self._chance.choice(names)
        workers = self._workers(name)
        if workers:
            self._harm(kind, name, self._chance.choice(workers))

    def _hit_download(self) -> None:
        """Harm to a fetcher or its keeper, or by the hub."""
        kind = self._chance.choice(DOWNLOAD_KINDS)
        now = time.monotonic()
        if kind.startswith("hub"):
            fault = self._chance.choice(HUB_FAULTS)
            self._hub.faults[:] = [each for each in self._hub.faults if each.times > 0]
            self._hub.faults.insert(0, replace(fault))
        else:
            victims = [each for each in self._running.tree() if is_fetcher(each)]
            victims = [each for each in victims if is_keeper(each) is ("keeper" in kind)]
            if not victims:
                return
            number = signal.SIGSTOP if "stopped" in kind else signal.SIGKILL
            with suppress(psutil.NoSuchProcess):
                self._chance.choice(victims).send_signal(number)
        self._tell_fault(Fault(kind, "", now, time.monotonic(), deadly=False))

    def _kill_all(self) -> None:
        """Every worker that may be hit, at once."""
        found = [(name, worker) for name in self._hit for worker in self._workers(name)]
        if len(self._recent()) + len(found) <= DEATHS_PER_MINUTE:
            for name, worker in found:
                self._harm(KINDS[0], name, worker)

    def _workers(self, name: str) -> list[dict[str, Any]]:
        """Those that have a process, whatever they are at."""
        answer = self._running.control.get(f"/deployments/{name}")
        workers = answer.json()["workers"] if answer.status_code == 200 else []
        return [worker for worker in workers if worker["pid"]]

    def _recent(self) -> list[float]:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < 60]
        return self._deaths

    def _harm(self, kind: Kind, name: str, worker: dict[str, Any], unnoticed: float = 0.0) -> None:
        now = time.monotonic()
        replica = (name, worker["replica"])
        if kind.deadly and len(self._recent()) >= DEATHS_PER_MINUTE:
            return
        if kind.hangs and (self._hangs.get(replica, 0) >= HANGS or worker["phase"] != "ready"):
            return
        pid = worker["pid"]
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if kind.keeper:
                pid = psutil.Process(pid).ppid()
                if not is_keeper(psutil.Process(pid)):
                    return  # it has gone already
            if kind.name == "keeper stopped":
                self._stopped.append(psutil.Process(pid))
            os.kill(pid, kind.number)
        if kind.deadly:
            self._deaths.append(now)
        if kind.hangs:
            self._hangs[replica] = self._hangs.get(replica, 0) + 1
        lasts = FOUND_SECONDS if kind.hangs or kind.name == "closed socket" else KILLED_SECONDS
        self._tell_fault(Fault(kind.name, name, now, now + unnoticed + lasts, kind.deadly))

    # -- the daemon

    def _hit_daemon(self) -> None:
        (kind,) = self._chance.choices(
            [name for name, _ in DAEMON_KINDS], [weight for _, weight in DAEMON_KINDS]
        )
        now = time.monotonic()
        process = self._running.process
        assert process is not None
        if kind == "clock":
            set_clock(self._clock, self._chance.choice(JUMPS))
        elif kind == "reload":
            process.send_signal(signal.SIGHUP)
        elif kind == "all workers at once":
            self._kill_all()
        elif "stopped" in kind:
            name = self._chance.choice(self._hit)
            victims = self._workers(name) if "worker" in kind else []
            process.send_signal(signal.SIGSTOP)
            seconds = 0.3 + 2 * self._chance.random()
            for victim in victims:
                self._harm(KINDS[0], name, victim, seconds)
            self._ending.wait(seconds)
            process.send_signal(signal.SIGCONT)
        elif now < self._spare_after:
            self._replace_daemon(graceful=kind == "restart of the daemon")
            return
        else:
            return
        self._tell_fault(Fault(kind, "", now, time.monotonic(), deadly=False))

    def _replace_daemon(self, *, graceful: bool = False) -> None:
        tree = [each for each in self._running.tree() if each.pid != self._pid()]
        self.alive.clear()
        ended = time.monotonic()
        if graceful:
            status = self._running.stop()
            if status != 0:
                self._tell_violation(f"the daemon ended with {status} at SIGTERM")
        else:
            keepers = [each for each in tree if is_keeper(each)]
            killed = self._chance.sample(keepers, min(self._chance.choice((0, 0, 2)), len(keepers)))
            for keeper in killed:
                with suppress(psutil.NoSuchProcess):
                    keeper.kill()
            self._running.kill()
            # A keeper that is stopped or gone clears nothing: that is left to the next daemon.
            clears = not killed and not any(map(lives, self._stopped))
            if clears and self._chance.random() < 0.5:
                self._wait_gone(tree, ended)
                self.gone_seconds.append(time.monotonic() - ended)
        if self._chance.random() < 0.3:
            # One that doesn't come up either.
            self._running.launch(self.environment())
            self._ending.wait(1.5 * self._chance.random())
            self._running.kill()
        self._running.start(self.environment())
        self.daemons += 1
        while self._running.control.get("/deployments").status_code != 200:
            time.sleep(0.02)
        kind = "restart of the daemon" if graceful else "kill -9 of the daemon"
        self._tell_window(Window(ended, time.monotonic()))
        self._tell_fault(Fault(kind, "", ended, time.monotonic(), deadly=False))
        self.alive.set()
        self._deaths.clear()
        self._stopped.clear()
        self._wait_gone(tree, time.monotonic())

    def _wait_gone(self, tree: list[psutil.Process], since: float) -> None:
        while left := [each for each in tree if lives(each)]:
            if time.monotonic() - since > GONE_SECONDS:
                self._tell_violation(f"{left} outlive their daemon by {GONE_SECONDS} s")
                return
            time.sleep(0.005)

    def _pid(self) -> int:
        assert self._running.process is not None
        return self._running.process.pid

    def environment(self) -> dict[str, str]:
        """What the daemon needs to have a clock that can be set, and to find the hub."""
        return {"TURSI_TEST_CLOCK": str(self._clock), **self._environment}

    def heal(self) -> None:
        """Undo whatever doesn't pass by itself."""
        set_clock(self._clock, 0.0)
        self._hub.faults.clear()


def is_fetcher(process: psutil.Process) -> bool:
    """Whether it downloads, or is the keeper of one that does."""
    try:
        return any("tursi.fetcher" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def is_keeper(process: psutil.Process) -> bool:
    """Whether it is a worker's keeper."""
    try:
        return any("keeper.py" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def lives(process: psutil.Process) -> bool:
    """Whether it is there and no zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False

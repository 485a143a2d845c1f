"""What the service manager is told, on a socket of its kind."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from tursi.errors import DatabaseBusy
from tursi.model import DeploymentStatus, Desired, Phase
from tursi.notify import RETRIES, RETRY_SECONDS, STATUS_SECONDS, Notifier, describe


class Manager:
    """A service manager: a datagram socket, and what came in."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.setblocking(False)
        self.environment = {"NOTIFY_SOCKET": address}

    def told(self) -> list[str]:
        """The messages since the last look."""
        found = []
        while True:
            try:
                found.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return found


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest) -> Iterator[Manager]:
    with tempfile.TemporaryDirectory(prefix="tursi-") as folder:
        name = f"@tursi-test-{os.getpid()}"
        one = Manager(name if request.param == "abstract" else str(Path(folder) / "notify"))
        yield one
        one.socket.close()


def test_the_states_of_a_service(manager: Manager) -> None:
    clock = Clock()
    notifier = Notifier(clock, manager.environment)
    notifier.ready()
    notifier.reloading()
    notifier.extend(1.5)
    notifier.stopping()
    ready, reloading, extended, stopping = manager.told()
    assert (ready, extended, stopping) == ("READY=1", "EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1")
    state, at = reloading.split("\n")
    assert state == "RELOADING=1"
    assert at.startswith("MONOTONIC_USEC=")
    assert int(at.partition("=")[2]) > 0
    assert not clock.getDelayedCalls()


def test_the_line_for_people_is_one_line_and_not_repeated(manager: Manager) -> None:
    notifier = Notifier(Clock(), manager.environment)
    notifier.status("all\nis  well")
    notifier.status("all is well")
    notifier.status("not so well")
    assert manager.told() == ["STATUS=all is well", "STATUS=not so well"]


def test_many_changes_are_one_look(manager: Manager) -> None:
    clock = Clock()
    notifier = Notifier(clock, manager.environment)
    looks = iter(["one", "two", "two"])
    for _ in range(100):
        notifier.changed(lambda: next(looks))
    assert manager.told() == []
    clock.advance(STATUS_SECONDS)
    assert manager.told() == ["STATUS=one"]
    for _ in range(2):
        notifier.changed(lambda: next(looks))
        clock.advance(STATUS_SECONDS)
    assert manager.told() == ["STATUS=two"]
    notifier.changed(lambda: next(looks))
    notifier.stopping()
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    "environment",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "@"}, {"NOTIFY_SOCKET": "vsock:2:1234"}],
)
def test_without_a_manager_nothing_happens(environment: dict[str, str]) -> None:
    clock = Clock()
    notifier = Notifier(clock, {**environment, "WATCHDOG_USEC": "3000000"})
    notifier.ready()
    notifier.changed(lambda: pytest.fail("nobody asked"))
    notifier.watch(lambda: pytest.fail("nobody asked"))
    notifier.unwatch()
    notifier.stopping()
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("address", ["/nowhere/at/all", "/" + "x" * 200])
def test_a_manager_that_is_gone_does_no_harm(address: str) -> None:
    clock = Clock()
    Notifier(clock, {"NOTIFY_SOCKET": address}).ready()
    assert not clock.getDelayedCalls()


def fill(manager: Manager) -> int:
    """Send until nobody can; how many messages that were."""
    address = manager.environment["NOTIFY_SOCKET"].replace("@", "\0", 1)
    filled, sent = 0, -1
    while sent:
        sent = 0
        # Each has a buffer of its own, which may be full before the queue is.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one, suppress(BlockingIOError):
            one.setblocking(False)
            while True:
                one.sendto(b"other", address)
                sent += 1
        filled += sent
    return filled


def test_a_full_queue_blocks_nobody_and_loses_no_state(manager: Manager) -> None:
    clock = Clock()
    notifier = Notifier(clock, manager.environment)
    filled = fill(manager)
    notifier.ready()
    notifier.status("lost, and said with the next change")
    notifier.stopping()
    assert manager.told() == ["other"] * filled
    clock.advance(RETRY_SECONDS)
    assert manager.told() == ["READY=1", "STOPPING=1"]
    notifier.status("lost, and said with the next change")
    assert len(manager.told()) == 1
    assert not clock.getDelayedCalls()


def test_a_queue_that_stays_full_is_given_up(manager: Manager, monkeypatch: Any) -> None:
    clock = Clock()
    notifier = Notifier(clock, manager.environment)
    monkeypatch.setattr(notifier, "_send", lambda _: False)
    notifier.ready()
    clock.pump([RETRY_SECONDS] * (RETRIES + 1))
    assert not clock.getDelayedCalls()


# -- watchdog -----------------------------------------------------------------------


def test_the_watchdog_is_fed_at_a_third_of_its_time_after_a_round_trip(manager: Manager) -> None:
    clock = Clock()
    notifier = Notifier(clock, {**manager.environment, "WATCHDOG_USEC": "30000000"})
    trips: list[Deferred[None]] = []

    def trip() -> Deferred[None]:
        trips.append(Deferred())
        return trips[-1]

    notifier.watch(trip)
    assert manager.told() == []
    trips[0].callback(None)
    assert manager.told() == ["WATCHDOG=1"]
    clock.advance(10)
    clock.advance(10)
    clock.advance(10)
    assert len(trips) == 2, "a trip begins only when the last one has come back"
    assert manager.told() == []
    trips[1].callback(None)
    assert manager.told() == ["WATCHDOG=1"]
    notifier.unwatch()
    assert not clock.getDelayedCalls()


def test_a_failed_round_trip_does_not_feed_it_and_the_next_may(manager: Manager) -> None:
    clock = Clock()
    notifier = Notifier(clock, {**manager.environment, "WATCHDOG_USEC": "3000000"})
    outcomes = iter([fail(DatabaseBusy()), succeed(None)])
    notifier.watch(lambda: next(outcomes))
    assert manager.told() == []
    clock.advance(1)
    assert manager.told() == ["WATCHDOG=1"]
    notifier.unwatch()


@pytest.mark.parametrize(
    ("variables", "fed"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "3000000"}, True),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, True),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, False),
        ({"WATCHDOG_USEC": "0"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
    ],
)
def test_the_watchdog_of_another_process_is_left_alone(
    manager: Manager, variables: dict[str, str], fed: bool
) -> None:
    notifier = Notifier(Clock(), {**manager.environment, **variables})
    notifier.watch(lambda: succeed(None))
    notifier.unwatch()
    assert manager.told() == ["WATCHDOG=1"] * fed


# -- the line for people ---------------------------------------------------------------


def status(name: str, phase: Phase, desired: Desired = Desired.RUNNING) -> DeploymentStatus:
    return DeploymentStatus(
        name=name, model=name, task=None, desired=desired, phase=phase, replicas=1,
        ready=int(phase is Phase.READY), generation=1, device=None, dtype=None, commit=None,
        created_at=0.0, updated_at=0.0,
    )  # fmt: skip


def test_how_the_models_are() -> None:
    a, b = status("a", Phase.READY), status("b", Phase.LOADING)
    off = status("off", Phase.STOPPED, Desired.STOPPED)
    assert describe([]) == describe([off]) == "no deployments"
    assert describe([a]) == "1 of 1 deployment ready"
    assert describe([a, b, off]) == "1 of 2 deployments ready"
    failed = [status(name, Phase.FAILED) for name in "vwxyz"]
    assert describe([a, failed[0]]) == "1 of 2 deployments ready, v failed"
    assert describe([a, *failed]) == (
        "1 of 6 deployments ready, v failed, w failed, x failed, 2 more in trouble"
    )

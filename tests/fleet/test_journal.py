"""Notes that the database can't take just now wait for it, in their order and within bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock

from tursi.errors import DatabaseBusy, DatabaseError, DatabaseFull, TursiError
from tursi.fleet import journal as journal_module
from tursi.fleet.journal import RETRY_SECONDS, Journal
from tursi.model import AuditEntry, Dossier, FailureClass, LoadOrder, Phase, WorkerLife

LIFE = WorkerLife("a", "echo", 1, 0, "boot", 1.0)
DOSSIER = Dossier(
    id=1, deployment="echo", generation=1, replica=0, worker="a", at=2.0,
    failure=FailureClass.CRASH, reason="it crashed", phase=Phase.READY, spawned_at=1.0,
    order=LoadOrder("echo", "/model"),
)  # fmt: skip


class FakeStore:
    """Takes what it is told unless there is ``trouble``."""

    def __init__(self) -> None:
        self.trouble: TursiError | None = None
        self.written: list[object] = []

    def _write(self, what: object) -> Deferred[Any]:
        if self.trouble is not None:
            return fail(self.trouble)
        self.written.append(what)
        return succeed(None)

    def record(self, at: float, kind: str, message: str, **more: object) -> Deferred[Any]:
        return self._write((at, message))

    def put_life(self, life: WorkerLife) -> Deferred[Any]:
        return self._write(life)

    def add_crash(self, dossier: Dossier, *, keep: int) -> Deferred[Any]:
        return self._write(dossier)

    def add_audit(self, entry: AuditEntry) -> Deferred[Any]:
        return self._write(entry)


class House:
    def __init__(self) -> None:
        self.store = FakeStore()
        self.clock = Clock()
        store: Any = self.store
        self.journal = Journal(store, self.clock.seconds, self.clock)

    def close(self) -> None:
        closed = Deferred.fromCoroutine(self.journal.close())
        assert closed.called
        closed.addErrback(lambda failure: failure.raiseException())


@pytest.mark.parametrize("trouble", [DatabaseFull, DatabaseBusy])
def test_notes_wait_in_their_order_with_their_time(trouble: Callable[[], TursiError]) -> None:
    house = House()
    house.store.trouble = trouble()
    house.journal.note("note", "one")
    house.clock.advance(1)
    entry = AuditEntry(0, 1.0, "uid 0", "deployments.stop")
    recorded = house.journal.audit(entry)
    assert recorded.called
    assert house.journal.waiting == 2
    house.clock.advance(RETRY_SECONDS)
    house.store.trouble = None
    house.journal.note("note", "three")
    assert house.store.written == []
    house.clock.advance(RETRY_SECONDS)
    assert house.store.written == [(0.0, "one"), entry, (1.0 + RETRY_SECONDS, "three")]
    assert (house.journal.waiting, house.journal.dropped) == (0, 0)
    house.journal.note("note", "four")
    assert len(house.store.written) == 4
    assert house.clock.getDelayedCalls() == []
    house.close()


def test_what_cannot_be_written_at_all_is_not_tried_again() -> None:
    house = House()
    house.store.trouble = DatabaseError("no such table")
    house.journal.note("note", "one")
    assert (house.journal.waiting, house.journal.dropped) == (0, 1)
    house.close()


def test_too_many_notes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_WAITING", 2)
    house = House()
    house.store.trouble = DatabaseFull()
    for number in range(5):
        house.journal.note("note", str(number))
    assert (house.journal.waiting, house.journal.dropped) == (2, 3)
    # These are few, and must not be lost.
    assert house.journal.life(LIFE).called
    house.journal.crash(DOSSIER, 5)
    assert (house.journal.waiting, house.journal.dropped) == (4, 3)
    house.store.trouble = None
    house.clock.advance(RETRY_SECONDS)
    assert house.store.written == [(0.0, "0"), (0.0, "1"), LIFE, DOSSIER]


@pytest.mark.parametrize("recovered", [True, False])
def test_closing_tries_once_more(recovered: bool) -> None:
    house = House()
    house.store.trouble = DatabaseFull()
    house.journal.note("note", "one")
    if recovered:
        house.store.trouble = None
    house.close()
    assert len(house.store.written) == recovered
    assert house.journal.dropped == (not recovered)
    house.clock.advance(RETRY_SECONDS)
    assert house.clock.getDelayedCalls() == []

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import InlineConnectionPool, InlineReactor, result

from twisted.internet.defer import Deferred

from tursi import store as package
from tursi.config import Storage
from tursi.errors import (
    CrashNotFound,
    DatabaseBusy,
    DatabaseError,
    DatabaseFull,
    DeploymentNotFound,
    GenerationNotFound,
    KeyExists,
    KeyNotFound,
    NoCanary,
    ShuttingDown,
    TursiError,
)
from tursi.model import (
    ApiKey,
    Build,
    Crash,
    Desired,
    Dossier,
    Event,
    FailureClass,
    Fate,
    Limits,
    LoadOrder,
    Measurement,
    NewKey,
    Peaks,
    Phase,
    Request,
    Resolution,
    Sample,
    Scope,
    WorkerLife,
)
from tursi.store import Outcome, Store, connection, inspect, prepare, schema
from tursi.store import file as store_file
from tursi.store import store as store_module

MINILM = Request("sentence-transformers/all-MiniLM-L6-v2")
LIFE = WorkerLife(uuid="a1", deployment="e5", generation=1, replica=0, boot_id="b", spawned_at=10.0)


def opened(path: Path) -> Store:
    prepare(path)
    store = Store(path, InlineReactor(), InlineConnectionPool)
    store.start()
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tursi.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = opened(path)
    yield store
    result(store.stop())


# -- deployments ------------------------------------------------------------------


def test_saving_says_what_it_meant(store: Store) -> None:
    def save(request: Request, replicas: int, at: float) -> tuple[Outcome, int, Desired, int]:
        deployment, outcome = result(store.save("e5", request, replicas, by="cli", at=at))
        assert [deployment] == result(store.deployments())
        return outcome, deployment.generation.number, deployment.desired, deployment.replicas

    other = replace(MINILM, dtype="float16")
    assert save(MINILM, 1, 1.0) == (Outcome.CREATED, 1, Desired.RUNNING, 1)
    assert save(MINILM, 1, 2.0) == (Outcome.UNCHANGED, 1, Desired.RUNNING, 1)
    assert save(MINILM, 3, 3.0) == (Outcome.SCALED, 1, Desired.RUNNING, 3)
    assert save(other, 3, 4.0) == (Outcome.REPLACED, 2, Desired.RUNNING, 3)
    result(store.set_desired("e5", Desired.STOPPED, by="cli", at=5.0))
    assert save(other, 2, 6.0) == (Outcome.STARTED, 2, Desired.RUNNING, 2)
    result(store.set_desired("e5", Desired.STOPPED, by="cli", at=7.0))
    assert save(MINILM, 2, 8.0) == (Outcome.REPLACED, 3, Desired.RUNNING, 2)
    (deployment,) = result(store.deployments())
    assert (deployment.created_at, deployment.updated_at) == (1.0, 8.0)
    assert [each.request for each in result(store.generations("e5"))] == [MINILM, other, MINILM]


def test_limits_belong_to_the_generation(store: Store) -> None:
    limited = replace(
        MINILM, limits=Limits(memory=2**40, cpu=1.5, threads=2, files=100, processes=64)
    )
    for request, outcome in ((MINILM, "created"), (limited, "replaced"), (limited, "unchanged")):
        assert result(store.save("e5", request, 1, by="cli", at=1.0))[1] == outcome
    assert [each.request for each in result(store.generations("e5"))] == [MINILM, limited]
    found = Resolution(folder="/models/e5", task="feature-extraction", choices={"device": "cpu."})
    result(store.resolve("e5", 2, found, at=2.0))
    (deployment,) = result(store.deployments())
    assert deployment.generation.request == limited
    assert deployment.generation.resolution == found


def test_quantization_belongs_to_the_generation(store: Store) -> None:
    small = replace(MINILM, quantization="int4")
    for request, outcome in ((MINILM, "created"), (small, "replaced"), (small, "unchanged")):
        assert result(store.save("e5", request, 1, by="cli", at=1.0))[1] == outcome
    assert [each.request for each in result(store.generations("e5"))] == [MINILM, small]


def test_each_change_has_its_event_and_no_change_has_none(store: Store) -> None:
    seen: list[Event] = []
    unwatch = store.watch(seen.append)
    result(store.save("e5", MINILM, 1, by="uid 0", at=1.0))
    result(store.save("e5", MINILM, 1, by="uid 0", at=2.0))
    result(store.set_replicas("e5", 2, by="uid 0", at=3.0))
    result(store.set_replicas("e5", 2, by="uid 0", at=4.0))
    result(store.set_desired("e5", Desired.STOPPED, by="uid 0", at=5.0))
    result(store.set_desired("e5", Desired.STOPPED, by="uid 0", at=6.0))
    result(store.delete("e5", by="uid 0", at=7.0))
    recorded = result(store.record(8.0, "start", "the daemon starts", cause="boot"))
    stored = result(store.events(None, 0, 100))
    assert [(each.at, each.kind, each.deployment, each.cause) for each in stored] == [
        (1.0, "create", "e5", "uid 0"),
        (3.0, "scale", "e5", "uid 0"),
        (5.0, "stop", "e5", "uid 0"),
        (7.0, "delete", "e5", "uid 0"),
        (8.0, "start", None, "boot"),
    ]
    assert seen == stored
    assert recorded == stored[-1]
    unwatch()
    unwatch()
    result(store.record(9.0, "stop", "the daemon stops"))
    assert len(seen) == 5


def test_a_failing_watcher_disturbs_nobody(store: Store, logged_failures: Any) -> None:
    seen: list[Event] = []
    store.watch(lambda event: 1 / 0)
    store.watch(seen.append)
    result(store.record(1.0, "start", "the daemon starts"))
    assert len(seen) == 1
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


def test_measured_memory_is_kept_by_build_and_the_oldest_goes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tursi.store.measurements.KEPT", 3)
    first = Measurement(Build("commit", "cpu"), Peaks(3, 2, None), load_seconds=1.5, at=1.0)
    gpu = Measurement(
        Build("commit", "cuda", "bfloat16", "fill-mask", "int8", 10, 20, 2),
        Peaks(1, 1, 1),
        Peaks(4, 5, 6),
        at=2.0,
    )
    result(store.put_measurements([first, gpu]))
    assert result(store.measurements()) == [first, gpu]
    first = replace(first, host=Peaks(3, 2, 9), at=3.0)
    result(store.put_measurements([first]))
    assert result(store.measurements()) == [gpu, first]
    others = [Measurement(Build(name, "cpu"), at=at) for name, at in (("a", 4.0), ("b", 5.0))]
    result(store.put_measurements(others))
    assert result(store.measurements()) == [first, *others]


def test_a_deleted_deployment_keeps_its_history(store: Store) -> None:
    result(store.save("e5", MINILM, 1, by="cli", at=1.0))
    result(store.put_life(LIFE))
    result(store.delete("e5", by="cli", at=2.0))
    assert result(store.deployments()) == []
    assert result(store.lives("e5", 10)) == [LIFE]
    assert len(result(store.events("e5", 0, 10))) == 2
    deployment, outcome = result(store.save("e5", MINILM, 1, by="cli", at=3.0))
    assert (outcome, deployment.generation.number) == (Outcome.CREATED, 2)
    assert deployment.created_at == 3.0
    assert [each.number for each in result(store.generations("e5"))] == [1, 2]


@pytest.mark.parametrize(
    "act",
    [
        lambda store: store.set_desired("no", Desired.RUNNING, by="cli", at=1.0),
        lambda store: store.set_replicas("no", 1, by="cli", at=1.0),
        lambda store: store.roll_back("no", None, by="cli", at=1.0),
        lambda store: store.delete("no", by="cli", at=1.0),
        lambda store: store.resolve("no", 1, Resolution("/m"), at=1.0),
        lambda store: store.generations("no"),
    ],
)
def test_an_unknown_deployment(store: Store, act: Callable[[Store], Deferred[Any]]) -> None:
    with pytest.raises(DeploymentNotFound, match="'no'"):
        result(act(store))
    assert result(store.events(None, 0, 10)) == []


def test_a_resolution_is_appended_when_it_is_news(store: Store, path: Path) -> None:
    result(store.save("e5", MINILM, 1, by="cli", at=1.0))
    found = Resolution("/cache/m", "feature-extraction", None, None, "f" * 40, ("a", "b"), 99)
    loaded = replace(found, device="cpu", dtype="float32")
    for resolution in (found, found, loaded, loaded):
        result(store.resolve("e5", 1, resolution, at=2.0))
        assert result(store.deployments())[0].generation.resolution == resolution
    plain = Resolution("/models/m")
    result(store.save("e5", Request("/models/m"), 1, by="cli", at=3.0))
    result(store.resolve("e5", 2, plain, at=4.0))
    assert [each.resolution for each in result(store.generations("e5"))] == [loaded, plain]
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT count(*) FROM resolutions").fetchone() == (3,)
        assert other.execute("SELECT count(*) FROM models").fetchone() == (2,)
    other.close()


def test_the_way_back_is_a_new_generation_with_the_old_files(store: Store) -> None:
    def back(number: int | None) -> tuple[Outcome, int, Request, Resolution | None]:
        deployment, outcome = result(store.roll_back("e5", number, by="cli", at=9.0))
        assert [deployment] == result(store.deployments())
        generation = deployment.generation
        return outcome, generation.number, generation.request, generation.resolution

    other = replace(MINILM, dtype="float16")
    first = Resolution("/cache/m/1", commit="1" * 40, files=("a",), size=3)
    second = Resolution("/cache/m/2", commit="2" * 40, files=("a",), size=4)
    result(store.save("e5", MINILM, 2, by="cli", at=1.0))
    result(store.resolve("e5", 1, first, at=1.0))
    with pytest.raises(GenerationNotFound, match="no way back"):
        back(None)
    result(store.save("e5", other, 2, by="cli", at=2.0))
    assert back(None) == (Outcome.REPLACED, 3, MINILM, first)
    # The branch has moved on meanwhile: the same request means other files.
    result(store.resolve("e5", 3, second, at=3.0))
    assert back(1) == (Outcome.REPLACED, 4, MINILM, first)
    assert back(1) == (Outcome.UNCHANGED, 4, MINILM, first)
    assert back(4) == (Outcome.UNCHANGED, 4, MINILM, first)
    assert back(2) == (Outcome.REPLACED, 5, other, None)
    assert back(None) == (Outcome.REPLACED, 6, MINILM, first)
    with pytest.raises(GenerationNotFound, match="tursi history e5"):
        back(99)
    result(store.set_desired("e5", Desired.STOPPED, by="cli", at=5.0))
    back(2)
    (deployment,) = result(store.deployments())
    assert (deployment.desired, deployment.replicas) == (Desired.RUNNING, 2)
    told = [each for each in result(store.events("e5", 0, 100)) if each.kind == "rollback"]
    assert told[0].message == f"cli rolls e5 back to generation 1: {MINILM.model}"
    assert len(told) == 5


def fates(store: Store) -> list[list[tuple[Fate, str | None]]]:
    """What became of each generation."""
    return [
        [(turn.fate, turn.reason) for turn in each.turns]
        for each in result(store.generations("e5"))
    ]


def test_a_generation_serves_until_the_next_one_does(store: Store) -> None:
    other = replace(MINILM, dtype="float16")
    result(store.save("e5", MINILM, 1, by="cli", at=1.0))
    result(store.save("e5", other, 1, by="cli", at=2.0))
    (found,) = result(store.deployments())
    # The first has never served, so that there is nothing to keep.
    assert (found.generation.number, found.stable) == (2, None)
    result(store.serve("e5", 2, at=3.0))
    result(store.save("e5", MINILM, 1, by="cli", at=4.0))
    (found,) = result(store.deployments())
    assert found.stable is not None
    assert (found.generation.number, found.stable.number, found.failed) == (3, 2, False)
    result(store.serve("e5", 1, at=5.0))
    result(store.fail("e5", 3, "it is broken", at=5.0))
    (found,) = result(store.deployments())
    assert found.failed
    _, outcome = result(store.save("e5", MINILM, 1, by="cli", at=6.0))
    assert outcome is Outcome.UNCHANGED
    assert not result(store.deployments())[0].failed
    result(store.serve("e5", 3, at=7.0))
    (found,) = result(store.deployments())
    assert (found.generation.number, found.stable, found.canary) == (3, None, None)
    result(store.roll_back("e5", None, by="cli", at=8.0))
    result(store.serve("e5", 4, at=9.0))
    result(store.delete("e5", by="cli", at=10.0))
    assert fates(store) == [
        [],
        [(Fate.SERVING, None), (Fate.REPLACED, "by generation 3")],
        [
            (Fate.FAILED, "it is broken"),
            (Fate.RETRIED, "cli"),
            (Fate.SERVING, None),
            (Fate.ROLLED_BACK, "by generation 4"),
        ],
        [(Fate.SERVING, None), (Fate.REMOVED, "cli")],
    ]
    result(store.save("e5", MINILM, 1, by="cli", at=11.0))
    (found,) = result(store.deployments())
    assert (found.generation.number, found.generation.turns) == (5, ())
    told = [event.message for event in result(store.events("e5", 0, 100)) if event.kind == "serve"]
    assert told[1] == "generation 3 of e5 serves in place of generation 2"


def test_a_canary_is_weighed_promoted_or_given_up(store: Store) -> None:
    other, third = replace(MINILM, dtype="float16"), replace(MINILM, dtype="bfloat16")
    result(store.save("e5", MINILM, 1, by="cli", at=1.0, canary=10))
    with pytest.raises(NoCanary):
        result(store.promote("e5", by="cli", at=1.0))
    result(store.serve("e5", 1, at=2.0))

    def canary(request: Request, weight: int | None) -> tuple[Outcome, int, int | None]:
        saved = store.save("e5", request, 1, by="cli", at=3.0, canary=weight)
        deployment, outcome = result(saved)
        assert [deployment] == result(store.deployments())
        return outcome, deployment.generation.number, deployment.canary

    assert canary(MINILM, 10) == (Outcome.UNCHANGED, 1, None)
    assert canary(other, 10) == (Outcome.REPLACED, 2, 10)
    assert canary(other, None) == (Outcome.UNCHANGED, 2, 10)
    assert canary(other, 20) == (Outcome.WEIGHED, 2, 20)
    # What is to take over becomes a canary.
    result(store.promote("e5", by="cli", at=3.0))
    assert canary(other, 20) == (Outcome.WEIGHED, 2, 20)
    assert result(store.set_canary("e5", 30, by="cli", at=4.0)).canary == 30
    # What serves is asked for again, so that the canary is given up.
    assert canary(MINILM, None) == (Outcome.BACK, 1, None)
    assert canary(other, 10) == (Outcome.REPLACED, 3, 10)
    deployment, outcome = result(store.roll_back("e5", None, by="cli", at=5.0))
    assert (outcome, deployment.generation.number, deployment.stable) == (Outcome.BACK, 1, None)
    with pytest.raises(GenerationNotFound):
        # What has never served is no way back.
        result(store.roll_back("e5", None, by="cli", at=5.0))
    assert canary(other, 0) == (Outcome.REPLACED, 4, 0)
    result(store.fail("e5", 4, "it crashes", at=6.0))
    assert result(store.deployments())[0].generation.number == 1
    assert canary(third, 5) == (Outcome.REPLACED, 5, 5)
    promoted = result(store.promote("e5", by="cli", at=7.0))
    assert (promoted.canary, promoted.stable and promoted.stable.number) == (None, 1)
    result(store.serve("e5", 5, at=8.0))
    with pytest.raises(NoCanary):
        result(store.set_canary("e5", 30, by="cli", at=9.0))
    assert fates(store) == [
        [(Fate.SERVING, None), (Fate.REPLACED, "by generation 5")],
        [(Fate.GIVEN_UP, "cli")],
        [(Fate.GIVEN_UP, "cli")],
        [(Fate.FAILED, "it crashes")],
        [(Fate.SERVING, None)],
    ]


def test_a_range_of_replicas_needs_no_generation(store: Store) -> None:
    result(store.save("e5", MINILM, 1, by="cli", at=1.0, max_replicas=4))
    (found,) = result(store.deployments())
    assert (found.replicas, found.max_replicas) == (1, 4)
    _, outcome = result(store.save("e5", MINILM, 1, by="cli", at=2.0, max_replicas=3))
    assert outcome is Outcome.SCALED
    result(store.set_replicas("e5", 2, by="cli", at=3.0))
    (found,) = result(store.deployments())
    assert (found.replicas, found.max_replicas, found.generation.number) == (2, None, 1)
    told = [event.message for event in result(store.events("e5", 0, 100))]
    assert told[-1] == "cli scales e5 from 1-3 to 2"


# -- history ------------------------------------------------------------------------


def test_lives(store: Store) -> None:
    result(store.save("e5", MINILM, 1, by="cli", at=1.0))
    second = replace(LIFE, uuid="b2", spawned_at=20.0)
    result(store.put_life(LIFE))
    result(store.put_life(second))
    assert result(store.unfinished_lives()) == [LIFE, second]
    ended = replace(
        LIFE,
        keeper_pid=11,
        keeper_start_time=12,
        worker_pid=13,
        ready_at=14.0,
        ended_at=15.0,
        intent="stop",
        failure=FailureClass.CRASH,
        reason="segmentation fault",
        exit_status=None,
        signal=11,
        peak_rss=1 << 40,
        cpu_seconds=1.5,
    )
    result(store.put_life(ended))
    assert result(store.lives("e5", 10)) == [second, ended]
    assert result(store.lives("e5", 1)) == [second]
    assert result(store.unfinished_lives()) == [second]


def test_a_life_belongs_to_a_generation(store: Store) -> None:
    with pytest.raises(DatabaseError, match="FOREIGN KEY"):
        result(store.put_life(LIFE))


def dossier(store: Store, number: int, name: str = "e5") -> Dossier:
    """Of a life that is put into the store."""
    life = replace(
        LIFE,
        uuid=f"life-{number}",
        deployment=name,
        ready_at=20.0,
        ended_at=30.0,
        failure=FailureClass.CRASH,
        reason="crashed with signal 11 (SIGSEGV)",
        signal=11,
        peak_rss=1000,
        cpu_seconds=1.5,
    )
    result(store.put_life(life))
    return Dossier(
        id=number,
        deployment=name,
        generation=1,
        replica=0,
        worker=life.uuid,
        at=30.0,
        failure=FailureClass.CRASH,
        reason="crashed with signal 11 (SIGSEGV)",
        phase=Phase.READY,
        spawned_at=10.0,
        ready_at=20.0,
        signal=11,
        peak_rss=1000,
        cpu_seconds=1.5,
        requests=("r1", "r\u20ac"),
        error="ValueError: so",
        order=LoadOrder(name, "/models/e5", dtype="float32"),
        versions={"torch": "2.13"},
        traceback="Traceback:\nValueError: so\n",
        stacks="Thread 0x1",
        log=("one", "two"),
        usage=(Sample(11.0, 500, 0.5), Sample(12.0, 1000, 1.5)),
    )


def test_a_crash_is_kept_whole_and_listed_short(store: Store) -> None:
    assert result(store.last_crash()) == 0
    result(store.save("e5", MINILM, 1, by="me", at=1.0))
    crash = dossier(store, 4)
    result(store.add_crash(crash, keep=9))
    assert result(store.crash("e5", 4)) == crash
    [short] = result(store.crashes("e5", 9))
    assert type(short) is Crash
    assert short == Crash(**{name: getattr(crash, name) for name in Crash.__slots__})
    for name, number in (("e5", 5), ("other", 4)):
        with pytest.raises(CrashNotFound, match="tursi crashes"):
            result(store.crash(name, number))


def test_the_newest_crashes_of_each_deployment_stay_and_no_number_comes_twice(
    store: Store,
) -> None:
    for name in ("e5", "other"):
        result(store.save(name, MINILM, 1, by="me", at=1.0))
    result(store.add_crash(dossier(store, 1, "other"), keep=2))
    for number in range(2, 6):
        result(store.add_crash(dossier(store, number), keep=2))
    assert [each.id for each in result(store.crashes("e5", 9))] == [5, 4]
    assert [each.id for each in result(store.crashes("e5", 1))] == [5]
    assert [each.id for each in result(store.crashes("other", 9))] == [1]
    # Lives that are pruned take their crashes along.
    result(store.put_life(replace(LIFE, uuid="later", spawned_at=99.0)))
    result(store.prune(Storage(worker_lives=1), at=100.0))
    assert result(store.crashes("e5", 9)) == []
    assert result(store.last_crash()) == 5


def test_events_are_the_newest_in_order(store: Store) -> None:
    for number in range(1, 8):
        name = "e5" if number % 2 else "bge"
        result(store.record(float(number), "note", "x", deployment=name, worker=f"{name}/0"))
    ids = [event.id for event in result(store.events(None, 0, 3))]
    assert ids == [5, 6, 7]
    assert [event.id for event in result(store.events("e5", 1, 2))] == [5, 7]
    assert [event.id for event in result(store.events(None, 6, 10))] == [7]
    assert result(store.events("none", 0, 10)) == []


def test_pruning_keeps_the_newest(store: Store) -> None:
    result(store.save("e5", MINILM, 1, by="cli", at=1.0))
    for number in range(10):
        result(store.record(float(number), "note", "x"))
        ended = None if number == 0 else number + 1.0
        life = replace(LIFE, uuid=str(number), spawned_at=float(number), ended_at=ended)
        result(store.put_life(life))
    limits = Storage(event_count=4, worker_lives=3)
    for _ in range(2):
        result(store.prune(limits, at=20.0))
        assert [each.id for each in result(store.events(None, 0, 100))] == [8, 9, 10, 11]
        # The oldest has not ended: that it is there must not be forgotten.
        assert [each.uuid for each in result(store.lives("e5", 100))] == ["9", "8", "7", "0"]
    assert result(store.record(1.0, "note", "x")).id == 12


# -- trouble --------------------------------------------------------------------------


def test_what_failed_left_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise sqlite3.OperationalError("no such luck")

    monkeypatch.setattr("tursi.store.deployments.record", fail)
    with pytest.raises(DatabaseError, match="no such luck"):
        result(store.save("e5", MINILM, 1, by="cli", at=1.0))
    monkeypatch.undo()
    assert result(store.deployments()) == []
    assert result(store.save("e5", MINILM, 1, by="cli", at=1.0))[1] is Outcome.CREATED


def test_another_process_holds_the_file(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    now = 100.0

    def wait(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += 1.0

    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(connection, "BUSY_MILLISECONDS", 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseBusy) as caught:
        result(store.record(1.0, "note", "x"))
    assert caught.value.retry_after == 5
    assert len(waits) == store_module.PATIENCE_SECONDS
    assert result(store.events(None, 0, 1)) == []  # reading goes on
    monkeypatch.setattr("time.sleep", lambda seconds: other.execute("ROLLBACK"))
    assert result(store.record(1.0, "note", "x")).id == 1
    other.close()


def test_only_busy_is_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def fail(txn: object, *args: object, **keywords: object) -> None:
        calls.append(txn)
        raise sqlite3.IntegrityError("broken")

    monkeypatch.setattr("tursi.store.events.record", fail)
    with pytest.raises(DatabaseError, match="broken"):
        result(store.record(1.0, "note", "x"))
    assert len(calls) == 1
    # Else the thread that throws the error away would wait for the connection.
    assert calls[0]._cursor is None


def test_a_full_disk(store: Store, path: Path) -> None:
    def limit(txn: Any, pages: int) -> None:
        txn.execute(f"PRAGMA max_page_count={pages}")

    pool = store._writer
    result(pool.runInteraction(limit, 1))  # SQLite takes the present size for less
    with pytest.raises(DatabaseFull, match="nothing was changed"):
        result(store.record(1.0, "note", "x" * 1_000_000))
    assert result(store.events(None, 0, 10)) == []
    result(pool.runInteraction(limit, 1_000_000))
    assert result(store.record(1.0, "note", "x" * 1_000_000)).id == 1


def test_readers_cannot_write(store: Store) -> None:
    pool = store._reader
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        result(pool.runInteraction(lambda txn: txn.execute("DELETE FROM events")))


def test_the_settings_of_the_connections(store: Store) -> None:
    def settings(txn: Any) -> dict[str, Any]:
        names = ("journal_mode", "foreign_keys", "synchronous", "query_only", "wal_autocheckpoint")
        return {name: txn.execute(f"PRAGMA {name}").fetchone()[0] for name in names}

    assert result(store._writer.runInteraction(settings)) == {
        "journal_mode": "wal",
        "foreign_keys": 1,
        "synchronous": 2,
        "query_only": 0,
        "wal_autocheckpoint": 1000,
    }
    reader = result(store._reader.runInteraction(settings))
    assert (reader["query_only"], reader["wal_autocheckpoint"]) == (1, 0)


class PausedConnectionPool(InlineConnectionPool):
    """Leaves everything undone until ``go``."""

    waiting: list[Callable[[], None]]

    def runInteraction(self, interaction: Any, *args: Any, **kw: Any) -> Deferred[Any]:  # noqa: N802
        deferred: Deferred[Any] = Deferred()
        run = super().runInteraction
        self.waiting.append(lambda: run(interaction, *args, **kw).chainDeferred(deferred))
        return deferred


def test_calls_that_wait_are_bounded_and_stop_waits_for_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_PENDING", 2)
    monkeypatch.setattr(PausedConnectionPool, "waiting", [], raising=False)
    prepare(path)
    store = Store(path, InlineReactor(), PausedConnectionPool)
    with pytest.raises(ShuttingDown):
        result(store.deployments())
    result(store.stop())
    store.start()
    first, second = store.record(1.0, "note", "x"), store.record(2.0, "note", "y")
    with pytest.raises(DatabaseBusy):
        result(store.record(3.0, "note", "z"))
    # These are few, and must not be lost.
    kept = store.put_life(LIFE)
    assert not kept.called
    first.addErrback(lambda failure: None)
    first.cancel()
    monkeypatch.setattr(store_module, "MAX_PENDING", 4)
    kept.addErrback(lambda failure: None)  # nothing is deployed that it could refer to
    stopped, again = store.stop(), store.stop()
    with pytest.raises(ShuttingDown):
        result(store.record(3.0, "note", "z"))
    while PausedConnectionPool.waiting:
        assert not stopped.called
        PausedConnectionPool.waiting.pop(0)()
    result(stopped)
    result(again)
    assert result(second).message == "y"
    assert not path.with_name("tursi.sqlite-wal").exists()


# -- the file -----------------------------------------------------------------------------


def dump(path: Path) -> list[str]:
    other = sqlite3.connect(path)
    lines = [line for line in other.iterdump() if "schema_history" not in line]
    other.close()
    return lines


def test_a_missing_file_is_made_for_its_owner_only(path: Path) -> None:
    inspect(path)
    assert not path.exists()
    store = opened(path)
    result(store.record(1.0, "note", "x"))
    for name in ("tursi.sqlite", "tursi.sqlite-wal", "tursi.sqlite-shm"):
        assert path.with_name(name).stat().st_mode & 0o777 == 0o600
    inspect(path)
    result(store.stop())
    inspect(path)
    prepare(path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["tursi.sqlite"]


def test_an_empty_file_is_version_0(path: Path) -> None:
    path.touch()
    inspect(path)
    prepare(path)
    assert any("CREATE TABLE deployments" in line for line in dump(path))


def test_every_table_is_strict_and_commented(path: Path) -> None:
    prepare(path)
    other = sqlite3.connect(path)
    tables = other.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    ).fetchall()
    history = other.execute("SELECT version, description, at FROM schema_history").fetchall()
    (identity,) = other.execute("PRAGMA application_id").fetchone()
    other.close()
    assert {name for name, _ in tables} == {
        "models",
        "deployments",
        "generations",
        "resolutions",
        "workers",
        "events",
        "crashes",
        "rollups",
        "keys",
        "audit",
        "pulls",
        "schema_history",
        "turns",
        "measurements",
    }
    assert all("STRICT" in sql for _, sql in tables)
    for statement in (each for upgrade in schema.UPGRADES for each in upgrade.statements):
        assert "CREATE TABLE" not in statement or statement.strip().startswith("-- ")
    assert [version for version, _, _ in history] == [*range(1, NEWEST + 1)]
    assert history[0][2] > 1_700_000_000
    assert identity == int.from_bytes(b"Turs", "big")


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all, but quite a bit of text " * 100)


def foreign(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE deployments (x)")
    other.close()


def newer(path: Path) -> None:
    prepare(path)
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA user_version={len(schema.UPGRADES) + 1}")
    other.close()


def damaged(path: Path) -> None:
    store = opened(path)
    for number in range(500):
        result(store.record(float(number), "note", "x" * 200))
    result(store.stop())
    content = bytearray(path.read_bytes())
    content[-4096 * 4 : -4096 * 3] = b"\xa5" * 4096
    path.write_bytes(content)


def killed(path: Path, spoil: Callable[[Path], None] = prepare) -> None:
    """``spoil`` it in a process that then dies with its log unwritten."""
    child = os.fork()
    if not child:
        try:
            spoil(path)
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("PRAGMA wal_autocheckpoint=0")
            other.execute("INSERT INTO events (at, kind, message) VALUES (1, 'note', 'x')")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.with_name("tursi.sqlite-wal").stat().st_size


def newer_and_killed(path: Path) -> None:
    killed(path, newer)


def damaged_and_killed(path: Path) -> None:
    damaged(path)
    content = path.read_bytes()
    path.unlink()
    killed(path)
    path.write_bytes(content)


def damaged_without_shared_memory(path: Path) -> None:
    damaged_and_killed(path)
    path.with_name("tursi.sqlite-shm").unlink()


def files(folder: Path) -> dict[str, bytes | None]:
    return {each.name: None if each.is_dir() else each.read_bytes() for each in folder.iterdir()}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (garbage, "isn't a database"),
        (foreign, "another program"),
        (newer, "newer Tursi"),
        (damaged, "is damaged"),
        (Path.mkdir, "no plain file"),
        (newer_and_killed, "newer Tursi"),
        (damaged_and_killed, "is damaged"),
        (damaged_without_shared_memory, "is damaged"),
    ],
)
def test_a_file_that_is_refused_stays_as_it_is(
    path: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(path)
    before = files(path.parent)
    for attempt in (inspect, prepare):
        with pytest.raises(DatabaseError, match=sentence) as caught:
            attempt(path)
        assert str(path) in caught.value.message
        assert "\n" not in caught.value.message
    after = files(path.parent)
    if spoil is damaged_without_shared_memory:
        # Without it the log can't be read; a lost one means nothing.
        after.pop("tursi.sqlite-shm")
    assert after == before


def test_a_refusal_names_the_newest_copy(path: Path) -> None:
    garbage(path)
    with pytest.raises(DatabaseError, match="`tursi db restore FILE`"):
        inspect(path)
    for version in (2, 9, 10):
        path.with_name(f"tursi.sqlite.v{version}").touch()
    with pytest.raises(DatabaseError, match=r"`tursi db restore \S+/tursi\.sqlite\.v10`\.$"):
        inspect(path)


def test_a_daemon_that_was_killed_is_no_reason_to_refuse(path: Path) -> None:
    killed(path)
    before = files(path.parent)
    inspect(path)
    assert files(path.parent) == before
    store = opened(path)
    assert [each.message for each in result(store.events(None, 0, 9))] == ["x"]
    result(store.stop())


def test_a_rollback_journal_is_played_back(path: Path) -> None:
    prepare(path)
    child = os.fork()
    if not child:
        try:
            other = sqlite3.connect(path, isolation_level=None)
            other.execute("PRAGMA journal_mode=DELETE")
            other.execute("PRAGMA cache_spill=1")
            other.execute("PRAGMA cache_size=1")
            other.execute("BEGIN")
            other.executemany(
                "INSERT INTO events (at, kind, message) VALUES (1, 'note', ?)",
                [("x" * 2000,) for _ in range(100)],
            )
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.with_name("tursi.sqlite-journal").stat().st_size
    inspect(path)
    store = opened(path)
    assert result(store.events(None, 0, 9)) == []
    result(store.stop())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="No such file"):
        prepare(tmp_path / "none" / "tursi.sqlite")


def with_upgrades(monkeypatch: pytest.MonkeyPatch, *more: schema.Upgrade) -> None:
    monkeypatch.setattr(store_file, "UPGRADES", (*schema.UPGRADES, *more))


NEWEST = len(schema.UPGRADES)
COLOUR = schema.Upgrade("colours", ("ALTER TABLE deployments ADD COLUMN colour TEXT",))
SIZE = schema.Upgrade("sizes", ("ALTER TABLE deployments ADD COLUMN width INTEGER",))
BROKEN = schema.Upgrade("broken", (*SIZE.statements, "ALTER TABLE absent ADD COLUMN x"))


def test_an_upgraded_file_is_like_a_new_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(path)
    new = path.with_name("new.sqlite")
    with_upgrades(monkeypatch, COLOUR, SIZE)
    prepare(path)
    prepare(new)
    assert dump(path) == dump(new)
    other = sqlite3.connect(path)
    history = other.execute("SELECT version, description FROM schema_history").fetchall()
    other.close()
    released = len(schema.UPGRADES)
    assert history[0] == (1, "the first schema")
    assert history[released:] == [(released + 1, "colours"), (released + 2, "sizes")]


def test_before_an_upgrade_the_file_is_copied_and_three_copies_stay(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result(opened(path).stop())
    old, released = dump(path), len(schema.UPGRADES)
    path.with_name(f"tursi.sqlite.v{released}.part").write_bytes(b"left by a kill")
    for count in range(1, 6):
        more = [
            schema.Upgrade(f"step {step}", (f"CREATE TABLE step_{step} (x TEXT) STRICT",))
            for step in range(count)
        ]
        with_upgrades(monkeypatch, *more)
        prepare(path)
        if count == 1:
            copy = path.with_name(f"tursi.sqlite.v{released}")
            # VACUUM puts indexes before triggers.
            assert sorted(dump(copy)) == sorted(old)
            assert copy.stat().st_mode & 0o777 == 0o600
    names = sorted(each.name for each in path.parent.iterdir())
    kept = [f"tursi.sqlite.v{released + step}" for step in (2, 3, 4)]
    assert names == sorted(["tursi.sqlite", *kept])


def test_a_failed_upgrade_leaves_the_version_before_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(path)
    with_upgrades(monkeypatch, COLOUR, BROKEN)
    with pytest.raises(DatabaseError, match="no such table: absent"):
        prepare(path)
    sql = "\n".join(dump(path))
    assert "colour" in sql
    assert "width" not in sql
    with_upgrades(monkeypatch, COLOUR, SIZE)
    prepare(path)
    assert "width" in "\n".join(dump(path))


def test_the_package_shows_only_what_is_needed() -> None:
    assert sorted(package.__all__) == [
        "NEWEST", "Outcome", "Store", "backup", "foretell", "give", "inspect", "prepare",
        "report", "restore",
    ]  # fmt: skip
    assert issubclass(DatabaseBusy, TursiError)


# -- keys -----------------------------------------------------------------------------------


def test_a_key_is_kept_by_its_digest_and_revoked_for_good(store: Store) -> None:
    wanted = NewKey("ci", (Scope.INFER,), 1.0, "uid 0", ("e5",), 5, None)
    made = result(store.add_key(wanted, b"d" * 32))
    assert made == ApiKey(1, "ci", (Scope.INFER,), 1.0, "uid 0", ("e5",), 5, None)
    assert result(store.keys()) == [(made, b"d" * 32)]
    with pytest.raises(KeyExists):
        result(store.add_key(NewKey("ci", (Scope.READ,), 2.0, "x"), b"e" * 32))
    result(store.keys_used({1: 7.0, 99: 8.0}))
    assert result(store.keys())[0][0].last_used_at == 7.0
    for name in ("nobody", "2", "²"):
        with pytest.raises(KeyNotFound):
            result(store.revoke_key(name, at=9.0))
    assert result(store.revoke_key("ci", at=9.0)).revoked_at == 9.0
    assert result(store.revoke_key("1", at=10.0)).revoked_at == 9.0

"""The fleet on a real store in memory's speed, with workers and a hub that do as they are told."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fakes import InlineConnectionPool, InlineReactor

from twisted.internet.defer import Deferred, fail, succeed
from twisted.python.failure import Failure

from tursi import store
from tursi.config import Configuration, Hub, Memory, Requests, Workers
from tursi.errors import (
    CatalogueEntryNotFound,
    DeploymentNotFound,
    DeploymentUnavailable,
    FetchInterrupted,
    HubOffline,
    HubUnreachable,
    InvalidRequest,
    ModelFilesMissing,
    ModelInUse,
    ModelLoading,
    ModelNotFound,
    ModelRefused,
    QueueFull,
    RepositoryNotFound,
    ShuttingDown,
    StartingUp,
    TursiError,
)
from tursi.fleet import Fleet, Work
from tursi.footprint import Blueprint
from tursi.model import (
    CatalogueEntry,
    Dossier,
    Event,
    FailureClass,
    Gpu,
    Host,
    Limits,
    Load,
    Loaded,
    LoadOrder,
    Phase,
    Progress,
    Reference,
    Request,
    Resolution,
    Schedule,
    Trust,
    WorkerLife,
    WorkerStatus,
)
from tursi.plan import Key
from tursi.store import Store

T = TypeVar("T")
NOW = 1_800_000_000.0


class FakeWorker:
    """A replica that is in whatever phase the test puts it."""

    log = None
    uuid: str | None = None
    in_flight = 0
    loaded = Loaded(
        task="feature-extraction", device="cpu", dtype="float32", choices={"device": "cpu: so."}
    )
    pid: int | None = None
    rss: int | None = None

    def __init__(
        self, name: str, key: Key, order: LoadOrder, limits: Limits, observer: Any, place: Any
    ) -> None:
        self.place = place
        self.name, self.order, self.limits = name, order, limits
        self.threads = order.threads
        self.folder = order.folder
        self.deployment, self.generation, self.replica, _ = key
        self.phase = Phase.STOPPED
        self.reason: str | None = None
        self.failure: FailureClass | None = None
        self.next_try_at: float | None = None
        self.observer = observer
        self.stopped: Deferred[None] = Deferred()
        self.resets = self.hastened = 0
        self.hurried = False
        self.settings: tuple[Workers, Requests] | None = None
        self.past: list[WorkerLife] = []

    def become(self, phase: Phase, reason: str | None = None) -> None:
        self.phase, self.reason = phase, reason
        self.observer.changed(self, reason or "as the test says")

    def remember(self, lives: Sequence[WorkerLife]) -> None:
        self.past += lives

    def start(self) -> None:
        self.become(Phase.QUEUED)

    def admit(self) -> None:
        self.become(Phase.SPAWNING)

    def stop(self) -> Deferred[None]:
        self.become(Phase.DRAINING)
        return self.stopped

    def configure(self, settings: Workers, requests: Requests) -> None:
        self.settings = settings, requests

    def hurry(self) -> None:
        self.hurried = True

    def reset(self) -> None:
        self.resets += 1
        self.become(Phase.QUEUED)

    def hasten(self) -> None:
        self.hastened += 1
        self.become(Phase.QUEUED)

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            self.name,
            self.replica,
            self.phase,
            NOW,
            generation=self.generation,
            reason=self.reason,
            failure=self.failure,
            next_try_at=self.next_try_at,
            pid=self.pid,
            rss=self.rss,
        )

    def submit(self, ask: object, sink: object) -> int:
        raise QueueFull


class FakeHub:
    """A hub whose answers the test gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[Reference, Deferred[Resolution], Any]] = []
        self.cancelled = 0
        self.trusted: list[Trust] = []
        self.entries = [CatalogueEntry("org/name", "/cache/name", 10)]
        self.touched: list[str] = []
        self.blueprints: dict[str, Blueprint] = {}
        self.lacking: set[str] = set()
        """Folders whose files are gone."""
        self.listed: dict[str, int] = {}
        """The size of what isn't here."""
        self.removing: Callable[[], object] = lambda: None
        """Called when something is removed."""

    def lacks(self, resolution: Resolution) -> Deferred[bool]:
        return succeed(resolution.folder in self.lacking)

    def resolve(self, reference: Reference, progress: Any, trust: Trust) -> Deferred[Resolution]:
        def cancel(_: object) -> None:
            self.cancelled += 1

        waiting: Deferred[Resolution] = Deferred(cancel)
        self.asked.append((reference, waiting, progress))
        self.trusted.append(trust)
        return waiting

    def look(self, reference: Reference, trust: Trust) -> Deferred[Resolution]:
        size = self.listed.get(str(reference))
        if size is None:
            return fail(HubUnreachable("The hub can't be reached."))
        return succeed(Resolution(f"hub:{reference}", commit="c" * 40, size=size))

    def catalogue(self) -> Deferred[list[CatalogueEntry]]:
        return succeed([*self.entries])

    def remove(self, repository: str, commits: Sequence[str]) -> Deferred[None]:
        self.entries = [
            entry
            for entry in self.entries
            if entry.name != repository or entry.commit not in commits
        ]
        self.removing()
        return succeed(None)

    def commit(self, repository: str, revision: str) -> Deferred[str]:
        return succeed("2" * 40 if revision == "main" else revision)

    def unfinished(self, repository: str) -> Deferred[list[str]]:
        return succeed([])

    def sweep(self, now: float) -> Deferred[None]:
        return succeed(None)

    def blueprint(self, folder: str) -> Deferred[Blueprint]:
        found = self.blueprints.get(folder)
        return fail(ModelFilesMissing("gone")) if found is None else succeed(found)

    def is_imported(self, folder: str) -> bool:
        return folder.startswith("/imported/")

    def discard(self, folder: str) -> Deferred[None]:
        self.entries = [entry for entry in self.entries if entry.folder != folder]
        return succeed(None)

    def touch(self, folder: str) -> Deferred[None]:
        self.touched.append(folder)
        return succeed(None)


class Bench:
    """A fleet with everything around it in the test's hands."""

    def __init__(self, folder: Path) -> None:
        self.reactor = InlineReactor()
        path = folder / "tursi.sqlite"
        store.prepare(path)
        self.store = Store(path, self.reactor, pool=InlineConnectionPool)
        self.store.start()
        self.hub = FakeHub()
        self.workers: list[FakeWorker] = []
        self.available: int | None = None
        self.gpus: list[Gpu] = []
        self.fleet = Fleet(
            store=self.store,
            hub=self.hub,  # type: ignore[arg-type] # a fake
            make_worker=self.make,  # type: ignore[arg-type] # makes fakes
            configuration=Configuration(),
            logs=folder / "logs",
            reactor=self.reactor,
            now=lambda: NOW,
            host=Host(memory=2**36, cores=4, files=1024, gpus=("cuda:0", "cuda:1")),
            available=lambda: self.available,
            gpus=lambda: self.gpus,
        )

    def make(
        self, *, name: str, key: Key, order: LoadOrder, limits: Limits, observer: Any, place: Any
    ) -> FakeWorker:
        worker = FakeWorker(name, key, order, limits, observer, place)
        self.workers.append(worker)
        return worker

    def open(self) -> None:
        self.do(self.fleet.open())
        self.turn()

    def turn(self) -> None:
        """Let the reactor do what is due."""
        for _ in range(4):
            self.reactor.advance(0)

    def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        outcome: list[T | Failure] = []
        Deferred.fromCoroutine(coroutine).addBoth(outcome.append)
        self.turn()
        [result] = outcome
        if isinstance(result, Failure):
            result.raiseException()
        return result

    def deploy(self, name: str = "a", replicas: int | None = None, **fields: Any) -> str:
        request = Request(**{"model": "/models/a", **fields})
        _, outcome = self.do(self.fleet.deploy(name, request, replicas, "uid 0"))
        return outcome

    def found(self, **fields: Any) -> None:
        """The hub knows the files of the oldest question."""
        _, waiting, _ = self.hub.asked.pop(0)
        waiting.callback(Resolution(**{"folder": "/models/a", **fields}))
        self.turn()

    def not_found(self, error: Exception) -> None:
        _, waiting, _ = self.hub.asked.pop(0)
        waiting.errback(error)
        self.turn()

    def phase(self, name: str = "a") -> Phase:
        return self.fleet.deployment(name).phase


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    one = Bench(tmp_path)
    one.open()
    yield one
    for call in one.reactor.getDelayedCalls():
        call.cancel()
    one.store.stop()


def test_before_it_has_been_opened_nothing_is_said(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for look in (bench.fleet.deployments, lambda: bench.fleet.find("a")):
        with pytest.raises(StartingUp):
            look()
    with pytest.raises(StartingUp):
        bench.do(bench.fleet.scale("a", 1, "uid 0"))
    bench.store.stop()


def test_a_deployment_is_found_loaded_and_served(bench: Bench) -> None:
    assert bench.deploy(replicas=2) == "created"
    [(reference, _, progress)] = bench.hub.asked
    assert reference == Reference(folder="/models/a")
    progress(Progress("fetch", 1, 2))
    assert bench.fleet.deployment("a").progress == Progress("fetch", 1, 2)
    bench.found(size=5)
    assert [worker.phase for worker in bench.workers] == [Phase.SPAWNING] * 2
    assert bench.workers[0].order.folder == "/models/a"
    for worker in bench.workers:
        worker.become(Phase.READY)
    status = bench.fleet.deployment("a")
    assert (status.phase, status.ready, status.task) == (Phase.READY, 2, "feature-extraction")
    assert bench.fleet.find("/models/a") == "a"
    [generation] = bench.do(bench.fleet.records.generations("a"))
    assert generation.resolution is not None
    assert generation.resolution.dtype == "float32"
    assert generation.resolution.choices == {"device": "cpu: so."}


def test_the_same_again_changes_nothing_and_keeps_the_replicas(bench: Bench) -> None:
    bench.deploy(replicas=3)
    assert bench.deploy() == "unchanged"
    assert bench.fleet.deployment("a").replicas == 3
    assert bench.deploy(replicas=1) == "scaled"
    assert bench.deploy(dtype="bfloat16") == "replaced"
    assert bench.fleet.deployment("a").generation == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "gpu"},
        {"device": "cuda:0,cuda:0"},
        {"device": "cuda:0,cpu"},
        {"quantization": "int3"},
        {"dtype": "int3"},
        {"task": "cooking"},
        {"model": "../a"},
    ],
)
def test_what_can_not_be_is_refused_and_nothing_is_kept(
    bench: Bench, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bench.deploy(**fields)
    assert refused.value.param == next(iter(fields))
    assert bench.fleet.deployments() == []


def test_a_model_that_is_not_there_fails_with_its_sentence_until_asked_again(
    bench: Bench,
) -> None:
    bench.deploy()
    bench.not_found(ModelFilesMissing("There is no folder /models/a."))
    status = bench.fleet.deployment("a")
    assert (status.phase, status.reason) == (Phase.FAILED, "There is no folder /models/a.")
    with pytest.raises(DeploymentUnavailable, match="There is no folder"):
        bench.fleet.submit("a", Work("r", "i", "", b"", 1.0), None)  # type: ignore[arg-type] # refused first
    assert bench.hub.asked == []
    assert bench.deploy() == "retried"
    bench.found()
    assert bench.phase() is Phase.SPAWNING


@pytest.mark.parametrize("kind", [HubUnreachable, FetchInterrupted])
def test_what_may_pass_is_tried_again_ever_later(
    bench: Bench, kind: type[HubUnreachable] | type[FetchInterrupted]
) -> None:
    bench.deploy(model="org/name")
    for delay in (5, 10, 20):
        bench.not_found(kind("The hub is away."))
        status = bench.fleet.deployment("a")
        assert (status.phase, status.next_try_at) == (Phase.BACKOFF, NOW + delay)
        bench.reactor.advance(delay - 0.1)
        assert bench.hub.asked == []
        bench.reactor.advance(0.2)
        bench.turn()
    bench.found()
    assert bench.phase() is Phase.SPAWNING


def test_removing_cancels_the_fetch_and_forgets_it(bench: Bench) -> None:
    bench.deploy(model="org/name")
    bench.do(bench.fleet.remove("a", "uid 0"))
    assert bench.hub.cancelled == 1
    with pytest.raises(DeploymentNotFound):
        bench.fleet.deployment("a")


def test_a_removed_deployment_stays_visible_until_its_workers_have_gone(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    [worker] = bench.workers
    worker.become(Phase.READY)
    bench.do(bench.fleet.remove("a", "uid 0"))
    assert bench.phase() is Phase.DRAINING
    with pytest.raises(ModelNotFound):
        bench.fleet.find("a")
    with pytest.raises(DeploymentNotFound):
        bench.do(bench.fleet.remove("a", "uid 0"))
    worker.phase = Phase.STOPPED
    worker.stopped.callback(None)
    bench.turn()
    assert bench.fleet.deployments() == []


def test_one_that_is_wanted_again_while_it_drains_waits_for_its_predecessor(
    bench: Bench,
) -> None:
    bench.deploy()
    bench.found()
    [first] = bench.workers
    first.become(Phase.READY)
    bench.do(bench.fleet.remove("a", "uid 0"))
    assert bench.deploy() == "created"
    bench.found()
    second = bench.workers[-1]
    assert second.generation == 2
    first.stopped.callback(None)
    bench.turn()
    second.become(Phase.READY)
    assert bench.phase() is Phase.READY


def test_going_back_brings_the_old_generation_up_beside_the_new(bench: Bench) -> None:
    bench.deploy()
    bench.found(folder="/models/a", commit="1" * 40)
    bench.deploy(model="/models/b")
    bench.found(folder="/models/b")
    status, outcome = bench.do(bench.fleet.roll_back("a", None, "uid 0"))
    assert (outcome, status.generation, status.model) == ("replaced", 3, "/models/a")
    # Its files are known: nobody is asked again.
    assert bench.hub.asked == []
    assert [each.generation for each in bench.workers] == [1, 2, 3]
    assert bench.workers[-1].order.folder == "/models/a"
    with pytest.raises(DeploymentNotFound):
        bench.do(bench.fleet.roll_back("none", None, "uid 0"))


def test_stopping_and_starting(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    [worker] = bench.workers
    worker.become(Phase.READY)
    bench.do(bench.fleet.stop("a", "uid 0"))
    worker.stopped.callback(None)
    bench.turn()
    assert bench.phase() is Phase.STOPPED
    with pytest.raises(DeploymentUnavailable, match="stopped"):
        bench.fleet.submit("a", Work("r", "i", "", b"", 1.0), None)  # type: ignore[arg-type] # refused first
    bench.do(bench.fleet.start("a", "uid 0"))
    assert len(bench.workers) == 2


def test_a_failed_worker_is_tried_again_on_demand(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    [worker] = bench.workers
    worker.become(Phase.FAILED, "the weights are damaged")
    assert bench.fleet.health()[0] == "degraded"
    assert bench.deploy() == "retried"
    assert worker.resets == 1


def test_a_restart_looks_again_for_files_that_were_not_there(bench: Bench) -> None:
    bench.deploy()
    bench.not_found(ModelFilesMissing("There is no folder /models/a."))
    bench.do(bench.fleet.restart("a", "uid 0"))
    bench.found()
    assert bench.phase() is Phase.SPAWNING


def test_a_reload_may_mend_what_kept_the_files_away(bench: Bench) -> None:
    bench.deploy(model="org/a")
    bench.not_found(HubOffline("It is offline."))
    assert bench.phase() is Phase.FAILED
    bench.fleet.configure(Configuration())
    bench.turn()
    bench.found()
    assert bench.phase() is Phase.SPAWNING


def test_events_are_written_and_watched(bench: Bench) -> None:
    seen: list[Event] = []
    unwatch = bench.fleet.records.watch("a", seen.append)
    bench.deploy()
    bench.deploy("b", model="org/b")
    bench.not_found(RepositoryNotFound("There is no such repository."))
    unwatch()
    bench.do(bench.fleet.stop("b", "uid 0"))
    assert {event.deployment for event in seen} == {"a"}
    written = bench.do(bench.fleet.records.events("a", 0, 100))
    assert [event.kind for event in written] == [event.kind for event in seen]
    assert "fetch.failed" in [event.kind for event in written]


def test_what_was_deployed_comes_back_with_a_new_daemon(tmp_path: Path) -> None:
    first = Bench(tmp_path)
    first.open()
    first.deploy()
    first.found()
    first.deploy("b")
    first.do(first.fleet.stop("b", "uid 0"))
    for call in first.reactor.getDelayedCalls():
        call.cancel()
    first.store.stop()
    second = Bench(tmp_path)
    second.open()
    assert [worker.deployment for worker in second.workers] == ["a"]
    assert second.hub.asked == []
    for call in second.reactor.getDelayedCalls():
        call.cancel()
    second.store.stop()


def life(uuid: str, at: float, *, replica: int = 0) -> WorkerLife:
    return WorkerLife(
        uuid, "a", 1, replica, "boot", at, ended_at=at + 1, failure=FailureClass.CRASH
    )


def test_a_new_daemon_tells_each_worker_how_it_has_failed_since_the_last_reset(
    tmp_path: Path,
) -> None:
    first = Bench(tmp_path)
    first.open()
    first.deploy(replicas=2)
    first.found()
    first.store.put_life(life("early", NOW - 10))
    first.workers[0].become(Phase.FAILED)
    assert first.deploy() == "retried"
    for each in (
        life("second", NOW + 20),
        life("first", NOW + 10),
        life("other", NOW + 10, replica=1),
    ):
        first.store.put_life(each)
    for call in first.reactor.getDelayedCalls():
        call.cancel()
    first.store.stop()
    second = Bench(tmp_path)
    second.open()
    assert [[each.uuid for each in worker.past] for worker in second.workers] == [
        ["first", "second"],
        ["other"],
    ]
    for call in second.reactor.getDelayedCalls():
        call.cancel()
    second.store.stop()


def test_when_workers_die_everywhere_nothing_is_started_for_a_minute(bench: Bench) -> None:
    bench.deploy(replicas=3)
    bench.found()
    observer = bench.workers[0].observer

    def die(failure: FailureClass) -> None:
        for number in range(21):
            begun = replace(life(f"{failure} {number}", NOW), ended_at=None)
            observer.life(begun)
            observer.life(replace(begun, ended_at=NOW, failure=failure))
        for worker in bench.workers:
            worker.become(Phase.QUEUED)
        bench.turn()

    # That is the model.
    die(FailureClass.WEIGHTS)
    assert [worker.phase for worker in bench.workers].count(Phase.SPAWNING) == 2
    die(FailureClass.CRASH)
    assert [worker.phase for worker in bench.workers] == [Phase.QUEUED] * 3
    impatient = submit(bench, seconds=1.0)
    bench.reactor.advance(1)
    assert isinstance(impatient.error, ModelLoading)
    assert "queued: More than 20 workers died within 60 s: nothing is" in impatient.error.message
    status, parts = bench.fleet.health()
    assert status == "degraded"
    assert parts[-1].name == "starts"
    assert "nothing is started" in parts[-1].message
    bench.reactor.advance(61)
    bench.turn()
    assert [worker.phase for worker in bench.workers].count(Phase.SPAWNING) == 1
    bench.workers[0].become(Phase.READY)
    bench.turn()
    assert [worker.phase for worker in bench.workers].count(Phase.SPAWNING) == 2
    assert "starts" not in [part.name for part in bench.fleet.health()[1]]


def told(bench: Bench, kind: str) -> list[Event]:
    return [
        each for each in bench.do(bench.fleet.records.events(None, 0, 1000)) if each.kind == kind
    ]


def test_when_the_system_refuses_processes_nothing_is_started_until_it_has_some(
    bench: Bench,
) -> None:
    bench.deploy(replicas=3)
    bench.found()
    first, second, third = bench.workers
    for _ in range(3):
        first.observer.refused(first, "Too many open files")
        first.become(Phase.QUEUED)
        second.become(Phase.QUEUED)
        bench.turn()
        assert first.phase is second.phase is third.phase is Phase.QUEUED
        part = bench.fleet.health()[1][-1]
        assert (part.name, part.healthy) == ("starts", False)
        assert part.message == (
            "The system refuses another process (Too many open files): nothing is started for "
            "another 5 s."
        )
        bench.reactor.advance(5.2)
        bench.turn()
        assert [worker.phase for worker in bench.workers].count(Phase.SPAWNING) == 1
    assert len(told(bench, "starts.paused")) == 1, "told once, however long it lasts"
    first.become(Phase.READY)
    assert bench.fleet.health()[1][-1].name == "a"
    first.observer.refused(first, "Cannot allocate memory")
    assert len(told(bench, "starts.paused")) == 2


def crash(number: int, device: str, worker: str) -> Dossier:
    return Dossier(
        id=0, deployment="a", generation=1, replica=0, worker=worker, at=NOW + number,
        failure=FailureClass.GPU_CONTEXT, reason="the GPU's context is lost", phase=Phase.READY,
        spawned_at=NOW, order=LoadOrder("a", "/models/a", device=device),
    )  # fmt: skip


def test_a_gpu_that_loses_contexts_is_told_of_and_avoided(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    [worker] = bench.workers
    for number in range(3):
        assert worker.place("auto") == "auto"
        worker.observer.life(replace(life(f"lost-{number}", NOW), ended_at=None))
        worker.observer.crashed(crash(number, "auto", f"lost-{number}"))
    assert worker.place("auto") == "cuda:1"
    [event] = told(bench, "device.suspect")
    assert event.message.startswith("cuda:0 is suspect: ")
    assert event.cause == "the GPU's context is lost"
    status, parts = bench.fleet.health()
    assert status == "degraded"
    assert [part.message for part in parts if part.name == "cuda:0"] == [event.message]
    bench.reactor.advance(3601)
    assert worker.place("auto") == "auto"
    assert "cuda:0" not in [part.name for part in bench.fleet.health()[1]]


def test_the_catalogue_says_who_uses_what(bench: Bench) -> None:
    bench.deploy(model="org/name")
    bench.found(folder="/cache/name")
    bench.deploy("b", model="/elsewhere")
    bench.found(folder="/elsewhere")
    entries = bench.do(bench.fleet.catalogue.entries())
    assert [(entry.folder, entry.used_by) for entry in entries] == [
        ("/cache/name", ("a",)),
        ("/elsewhere", ("b",)),
    ]


def test_only_what_nobody_uses_is_removed_from_the_disk(bench: Bench) -> None:
    bench.hub.entries = [
        CatalogueEntry("org/name", f"/cache/{each}", 10, commit=each * 40) for each in "12"
    ]
    bench.deploy(model="org/name")
    bench.found(folder="/cache/1", commit="1" * 40)
    with pytest.raises(ModelInUse, match="is used by a;"):
        bench.do(bench.fleet.catalogue.remove("org/name", "uid 0"))
    [gone] = bench.do(bench.fleet.catalogue.remove("org/name@main", "uid 0"))
    assert gone.folder == "/cache/2"
    with pytest.raises(CatalogueEntryNotFound, match="tursi models"):
        bench.do(bench.fleet.catalogue.remove("org/name@2222", "uid 0"))
    with pytest.raises(InvalidRequest, match="not a folder of yours"):
        bench.do(bench.fleet.catalogue.remove("/cache/1", "uid 0"))
    bench.deploy(model="/elsewhere")
    bench.found(folder="/elsewhere")
    # What the older generation serves from is in use until it has gone.
    with pytest.raises(ModelInUse):
        bench.do(bench.fleet.catalogue.remove("org/name", "uid 0"))
    bench.workers[1].become(Phase.READY)
    bench.turn()
    bench.workers[0].stopped.callback(None)
    bench.turn()
    bench.do(bench.fleet.pulls.start("org/name", Trust(), "uid 0"))
    with pytest.raises(ModelInUse, match="is being pulled"):
        bench.do(bench.fleet.catalogue.remove("org/name", "uid 0"))
    bench.do(bench.fleet.pulls.cancel(1, "uid 0"))
    bench.do(bench.fleet.catalogue.remove("org/name", "uid 0"))
    assert bench.hub.entries == []


def test_a_limit_of_the_cache_holds_from_a_reload_on_and_never_takes_what_came_into_use(
    bench: Bench,
) -> None:
    bench.hub.entries = [
        CatalogueEntry(f"org/{each}", f"/cache/{each}", 10, commit=each * 40, used_at=float(each))
        for each in "1234"
    ]
    bench.fleet.configure(Configuration(hub=Hub(cache_bytes=5)))

    def deploy() -> None:
        bench.hub.removing = lambda: None
        bench.deploy("found", model="org/2")
        bench.found(folder="/cache/2", commit="2" * 40)
        bench.deploy("looking", model="org/3")

    # While the first of them goes, another two are wanted.
    bench.hub.removing = deploy
    bench.do(bench.fleet.catalogue.collect(0.0))
    assert [entry.name for entry in bench.hub.entries] == ["org/2", "org/3"]
    with pytest.raises(ModelInUse, match="looked for"):
        bench.do(bench.fleet.catalogue.remove("org/3", "uid 0"))


def test_files_that_are_gone_are_fetched_again_as_they_were(bench: Bench) -> None:
    bench.deploy(model="org/name")
    commit = "1" * 40
    bench.found(folder="/cache/1", commit=commit)
    [first] = bench.workers
    first.failure = FailureClass.NOT_FOUND
    first.become(Phase.FAILED, "There is no model folder.")
    bench.turn()
    # They are there: it is something else that is missing.
    assert (bench.phase(), bench.hub.asked) == (Phase.FAILED, [])
    bench.hub.lacking.add("/cache/1")
    first.stopped.callback(None)
    first.become(Phase.FAILED, "There is no model folder.")
    bench.turn()
    first.become(Phase.QUEUED)
    first.become(Phase.FAILED, "There is no model folder.")
    bench.turn()
    assert [str(reference) for reference, _, _ in bench.hub.asked] == [f"org/name@{commit}"]
    assert bench.phase() is Phase.QUEUED
    bench.found(folder="/cache/1", commit=commit)
    assert len(bench.workers) == 2
    bench.workers[1].become(Phase.READY)
    assert bench.phase() is Phase.READY
    kinds = [event.kind for event in bench.do(bench.fleet.records.events("a", 0, 100))]
    assert kinds.count("files.lost") == 1


def test_what_has_failed_is_not_unloaded_and_forgets_nothing(bench: Bench) -> None:
    schedule = Schedule(Load.ON_DEMAND, 1.0)
    bench.do(bench.fleet.deploy("a", Request("/models/a"), 1, "uid 0", schedule))
    bench.found()
    [worker] = bench.workers
    worker.become(Phase.READY)
    bench.turn()
    worker.become(Phase.QUARANTINED, "it has failed 5 times")
    for _ in range(20):
        bench.reactor.advance(1)
    assert bench.workers == [worker]
    assert bench.phase() is Phase.QUARANTINED
    worker.become(Phase.READY)
    bench.reactor.advance(2)
    bench.turn()
    assert worker.phase is Phase.DRAINING


class Answer:
    """Who waits for an answer."""

    def __init__(self) -> None:
        self.error: TursiError | None = None

    def failed(self, error: TursiError) -> None:
        self.error = error


def submit(bench: Bench, seconds: float = 600.0) -> Answer:
    answer = Answer()
    bench.fleet.submit("a", Work("r", "i", "", b"", seconds), answer)  # type: ignore[arg-type] # all it needs
    return answer


def test_who_waits_for_a_model_is_told_when_it_is_unloaded_instead(bench: Bench) -> None:
    schedule = Schedule(Load.ON_DEMAND, None)
    bench.do(bench.fleet.deploy("a", Request("/models/a"), 1, "uid 0", schedule))
    answer = submit(bench)
    bench.do(bench.fleet.unload("a", "uid 0"))
    assert isinstance(answer.error, DeploymentUnavailable)
    assert answer.error.retry_after == 1
    again = submit(bench)
    bench.found()
    assert again.error is None
    bench.workers[0].become(Phase.FAILED, "it is broken")
    assert isinstance(again.error, DeploymentUnavailable)
    assert "it is broken" in again.error.message


def test_what_can_never_have_memory_has_failed(bench: Bench) -> None:
    bench.deploy()
    answer = submit(bench)
    bench.found(size=2**40)
    status = bench.fleet.deployment("a")
    assert (status.phase, status.failure) == (Phase.FAILED, FailureClass.RESOURCE)
    assert "more than the 64.0 GiB" in (status.reason or "")
    assert isinstance(answer.error, DeploymentUnavailable)
    with pytest.raises(DeploymentUnavailable, match="It needs about"):
        submit(bench)
    assert bench.fleet.health()[0] == "degraded"
    bench.fleet.configure(Configuration(memory=Memory(limit_bytes=2**42)))
    bench.turn()
    assert bench.phase() is Phase.SPAWNING


def test_a_model_that_is_loaded_is_noted_as_used(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    bench.workers[0].become(Phase.READY)
    assert bench.hub.touched == ["/models/a"]


def test_closing_stops_every_worker_and_refuses_the_rest(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    [worker] = bench.workers
    closing = Deferred.fromCoroutine(bench.fleet.close())
    assert worker.phase is Phase.DRAINING
    assert not closing.called
    worker.stopped.callback(None)
    bench.turn()
    assert closing.called
    with pytest.raises(ShuttingDown):
        bench.fleet.submit("a", Work("r", "i", "", b"", 1.0), None)


# -- limits ---------------------------------------------------------------------------


def test_limits_reach_the_worker_and_the_status(bench: Bench) -> None:
    limits = Limits(memory=2**29, threads=3)
    bench.deploy(limits=limits)
    bench.found()
    (worker,) = bench.workers
    assert (worker.limits, worker.order.threads) == (limits, 3)
    assert bench.fleet.deployment("a").limits == limits
    with pytest.raises(InvalidRequest, match=r"64\.0 GiB here"):
        bench.deploy(limits=Limits(memory=2**37))


def test_what_a_model_may_bring_reaches_the_hub_the_worker_and_the_status(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    assert not bench.workers[-1].order.allow_pickle
    request = Request("/models/a", allow_pickle=True, trust_remote_code=True)
    _, outcome = bench.do(bench.fleet.deploy("a", request, None, "uid 0"))
    assert outcome == "replaced"
    bench.turn()
    assert bench.hub.trusted == [Trust(), Trust(allow_pickle=True, trust_remote_code=True)]
    bench.found()
    order = bench.workers[-1].order
    assert (order.allow_pickle, order.trust_remote_code) == (True, True)
    status = bench.fleet.deployment("a")
    assert (status.allow_pickle, status.trust_remote_code) == (True, True)
    [first, second] = bench.do(bench.fleet.records.generations("a"))
    assert (first.request.trust, second.request.trust) == (Trust(), request.trust)
    assert any(
        "pickle files allowed, its own code trusted" in event.message
        for event in bench.do(bench.fleet.records.events("a", 0, 10))
    )


def test_quantization_makes_a_generation_and_reaches_the_worker_and_the_status(
    bench: Bench,
) -> None:
    bench.deploy()
    bench.found()
    assert bench.deploy(quantization="int8") == "replaced"
    assert bench.deploy(quantization="int8") == "unchanged"
    bench.turn()
    bench.found()
    assert bench.workers[-1].order.quantization == "int8"
    assert bench.fleet.deployment("a").quantization == "int8"
    events = bench.do(bench.fleet.records.events("a", 0, 10))
    assert any(event.message.endswith("as int8") for event in events)


def test_clients_are_told_why_but_not_where(bench: Bench) -> None:
    bench.deploy()
    bench.not_found(ModelRefused("/models/a has only /models/a/pytorch_model.bin; see /etc/x."))
    status = bench.fleet.deployment("a")
    assert (status.failure, status.phase) == (FailureClass.REFUSED, Phase.FAILED)
    assert "/models/a" in str(status.reason)
    with pytest.raises(DeploymentUnavailable) as caught:
        bench.fleet.submit("a", Work("r", "i", "", b"", 1.0), None)  # type: ignore[arg-type] # refused first
    assert "[folder]/pytorch_model.bin" in caught.value.message
    assert "/models" not in caught.value.message
    assert "/etc" not in caught.value.message
    _, [part] = bench.fleet.health()
    assert "/models" not in part.message
    assert "/etc" not in part.message


def test_another_configuration_replaces_the_workers_that_are_told_something_else(
    bench: Bench,
) -> None:
    bench.deploy("a")
    bench.found()
    bench.deploy("own", limits=Limits(threads=1))
    bench.found()
    first, own = bench.workers
    for worker in bench.workers:
        worker.become(Phase.READY)
    settings, requests = Workers(threads=2, max_failures=9), Requests(max_in_flight=3)
    assert bench.fleet.configure(Configuration(workers=settings, requests=requests)) == ["a"]
    bench.turn()
    assert first.settings == own.settings == (settings, requests)
    first_again = bench.workers[2]
    assert (first_again.deployment, first_again.order.threads) == ("a", 2)
    assert first_again.generation == first.generation
    # It serves until the other does.
    assert first.phase is Phase.READY
    assert bench.fleet.deployment("a").ready == 1
    first_again.become(Phase.READY)
    bench.turn()
    assert first.phase is not Phase.READY
    assert len(bench.workers) == 3
    assert own.phase is Phase.READY


def test_who_drains_can_be_hurried(bench: Bench) -> None:
    bench.deploy(replicas=2)
    bench.found()
    bench.fleet.hurry()
    assert all(worker.hurried for worker in bench.workers)


def test_everything_is_described_in_lines(bench: Bench) -> None:
    bench.deploy("b")
    bench.deploy("a", replicas=2)
    bench.found()
    lines = bench.fleet.describe()
    assert lines[0].startswith("deployment a: queued, wanted running")
    assert lines[1].startswith("  its files are being looked for")
    assert len([line for line in lines if line.startswith("  worker b.")]) == 1


def test_threads_beyond_the_cores_are_told_when_it_comes_to_that(bench: Bench) -> None:
    def told() -> list[str]:
        events = bench.do(bench.fleet.records.events(None, 0, 1000))
        return [event.message for event in events if event.kind == "threads.overcommitted"]

    bench.deploy(replicas=3, limits=Limits(threads=2))
    bench.found()
    for worker in bench.workers[:2]:
        worker.become(Phase.READY)
    bench.turn()
    assert told() == []
    for phase in (Phase.LOADING, Phase.READY):
        bench.workers[2].become(phase)
        bench.turn()
    assert told() == [
        (
            "3 workers compute with 6 threads on 4 cores and slow each other down when they are "
            "all busy"
        )
    ]
    bench.workers[2].become(Phase.BACKOFF)
    bench.workers[2].become(Phase.LOADING)
    bench.turn()
    assert len(told()) == 2


def test_a_load_waits_until_the_machine_has_memory_for_it(bench: Bench) -> None:
    bench.available = 2**30
    bench.deploy()
    bench.found(size=2**30)
    status = bench.fleet.deployment("a")
    assert status.phase is Phase.QUEUED
    assert status.reason == "It waits for memory: it needs about 1.6 GiB, 512.0 MiB are free."
    # What others on the machine give back tells nobody: it is looked for.
    bench.available = 2**32
    bench.reactor.advance(1.1)
    bench.turn()
    assert bench.phase() is Phase.SPAWNING


def test_what_a_worker_warns_of_is_an_event(bench: Bench) -> None:
    bench.deploy()
    bench.found()
    (worker,) = bench.workers
    worker.observer.warned(worker, "worker.memory", "it uses much")
    bench.turn()
    (event,) = [
        each
        for each in bench.do(bench.fleet.records.events("a", 0, 100))
        if each.kind == "worker.memory"
    ]
    assert event.message == "it uses much"

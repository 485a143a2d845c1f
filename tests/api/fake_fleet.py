"""A fleet in memory, whose answers a test writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred

from tursi.api.fleet import Sink, Upload
from tursi.errors import (
    CatalogueEntryNotFound,
    CrashNotFound,
    DatabaseBusy,
    DeploymentNotFound,
    FilesUnavailable,
    ModelInUse,
    ModelNotFound,
    NoCanary,
    PullNotFound,
    RequestCancelled,
    TursiError,
)
from tursi.fleet import Part, Work
from tursi.model import (
    AuditEntry,
    AuditQuery,
    CatalogueEntry,
    Crash,
    DatabaseReport,
    DeploymentStatus,
    Desired,
    Dossier,
    Estimate,
    Event,
    FailureClass,
    Fit,
    Footprint,
    Generation,
    ImportPlan,
    LoadOrder,
    ModelCard,
    ModelFile,
    ModelReport,
    Peaks,
    Phase,
    Progress,
    PullState,
    PullStatus,
    Request,
    Room,
    Sample,
    Schedule,
    StorageStatus,
    Story,
    Trust,
    Usage,
    Verdict,
    WorkerLife,
    WorkerStatus,
)
from tursi.rollup import Observation, Rollup, StatisticsQuery, Summary


class Head(NamedTuple):
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = {}  # noqa: RUF012 - the tests don't change it


class End(NamedTuple):
    usage: Usage = Usage(3, 5, 2, 0.01, 0.02)
    error: str = ""


@dataclass
class Passage:
    """A request that the fleet holds."""

    model: str
    work: Work
    sink: Sink
    cancelled: bool = False
    waited: float = 0.5
    generation: int = 1

    def cancel(self) -> None:
        self.cancelled = True

    def answer(self, body: bytes, head: Head = Head(), end: End = End()) -> None:  # noqa: B008 - frozen values
        self.sink.head(head)
        self.sink.body(body)
        self.sink.end(end)


def status(name: str, **changes: object) -> DeploymentStatus:
    """A deployment that serves."""
    one = DeploymentStatus(
        name=name,
        model=f"org/{name}",
        task="feature-extraction",
        desired=Desired.RUNNING,
        phase=Phase.READY,
        replicas=1,
        ready=1,
        generation=1,
        device="cpu",
        dtype="float32",
        commit=None,
        created_at=1_700_000_000.0,
        updated_at=1_700_000_000.5,
        workers=(
            WorkerStatus(
                name=f"{name}.1.0#1",
                replica=0,
                phase=Phase.READY,
                since=1_700_000_001.0,
                uuid=f"uuid-{name}",
                restarts=1,
                rss=1000,
                gpus={"cuda:0": 500},
                cpu_seconds=2.5,
            ),
        ),
    )
    return replace(one, **changes)  # type: ignore[arg-type] # fields by name


_CRASH: dict[str, Any] = {
    "id": 3,
    "deployment": "small",
    "generation": 1,
    "replica": 0,
    "worker": "uuid",
    "at": 1_700_000_001.0,
    "failure": FailureClass.CRASH,
    "reason": "crashed",
    "phase": Phase.READY,
    "spawned_at": 1_700_000_000.25,
}


class FakeCatalogue:
    """One model, which nobody may remove but who does it well."""

    def __init__(self) -> None:
        self.removed: list[tuple[str, str]] = []

    async def entries(self) -> list[CatalogueEntry]:
        return [CatalogueEntry("org/small", "/models/small", 1000, used_by=("small",))]

    async def show(self, model: str) -> ModelReport:
        if model not in {"small", "org/small"}:
            raise CatalogueEntryNotFound
        card = ModelCard((ModelFile("config.json", 1000),), "BertModel", dimensions=2)
        return ModelReport("org/small", "/models/small", "a" * 40, 1000, card)

    async def remove(self, model: str, by: str) -> list[CatalogueEntry]:
        if model != "org/small@v1":
            raise ModelInUse(f"{model} is used by small.")
        self.removed.append((model, by))
        return await self.entries()


class FakePulls:
    """One pull, number 7, which a test moves on."""

    def __init__(self) -> None:
        self.status = PullStatus(
            id=7,
            model="org/small",
            state=PullState.RUNNING,
            asked_at=1_700_000_000.0,
            asked_by="uid 0",
            progress=Progress("download", 1.0, 4.0),
        )
        self.calls: list[tuple[Any, ...]] = []
        self.watchers: list[Callable[[PullStatus], None]] = []

    async def start(self, model: str, trust: Trust, by: str) -> PullStatus:
        self.calls.append(("start", model, trust, by))
        return self.status

    async def pause(self, number: int, by: str) -> PullStatus:
        return await self._turn("pause", number, by)

    async def resume(self, number: int, by: str) -> PullStatus:
        return await self._turn("resume", number, by)

    async def cancel(self, number: int, by: str) -> PullStatus:
        return await self._turn("cancel", number, by)

    async def _turn(self, how: str, number: int, by: str) -> PullStatus:
        self.calls.append((how, number, by))
        return await self.one(number)

    async def newest(self) -> list[PullStatus]:
        return [self.status]

    async def one(self, number: int) -> PullStatus:
        if number != self.status.id:
            raise PullNotFound(f"There is no pull {number}.")
        return self.status

    def watch(self, number: int, callback: Callable[[PullStatus], None]) -> Callable[[], None]:
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)


@dataclass
class FakeExport:
    name: str
    size: int
    pieces: Iterator[bytes]


class FakeArchives:
    """Answers exports with ``exported``, and keeps what is imported; ``refuse`` is raised."""

    def __init__(self) -> None:
        self.exported: list[bytes] | None = None
        self.size = len(b"an archive")
        self.taken: list[bytes] = []
        self.calls: list[tuple[Any, ...]] = []
        self.refuse: TursiError | None = None
        self.left = 0
        """Imports whose sender has gone."""
        self.wait: Deferred[None] | None = None
        """What each piece waits for."""

    async def export(self, name: str, by: str) -> FakeExport:
        self.calls.append(("export", name, by))
        if self.exported is None:
            raise FilesUnavailable
        return FakeExport(name, self.size, iter(self.exported))

    async def take(
        self, upload: Upload, *, name: str | None, trust: Trust, dry_run: bool, by: str
    ) -> tuple[DeploymentStatus, str] | ImportPlan:
        self.calls.append(("import", name, trust, dry_run, by))
        try:
            while data := await upload.read():
                self.taken.append(data)
                if self.refuse is not None:
                    raise self.refuse
                if self.wait is not None:
                    await self.wait
        except RequestCancelled:
            self.left += 1
            raise
        if dry_run:
            return ImportPlan("small", "org/small", "created", None, 1, 2, 0, 9, 0.0, "me", "1")
        return status(name or "small"), "created"


@dataclass
class FakeFleet:
    """Keeps what it is told; ``refuse`` is raised by the next ``submit``."""

    statuses: dict[str, DeploymentStatus] = field(
        default_factory=lambda: {"small": status("small")}
    )
    passages: list[Passage] = field(default_factory=list)
    counted: list[Observation] = field(default_factory=list)
    refuse: Exception | None = None
    calls: list[tuple[object, ...]] = field(default_factory=list)
    history: list[Event] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    watchers: list[Callable[[Event], None]] = field(default_factory=list)
    followers: list[Callable[[str], None]] = field(default_factory=list)
    broken: Exception | None = None
    audited: list[AuditEntry] = field(default_factory=list)
    recording: Deferred[None] | None = None
    """What the next record waits for."""
    copy: Path | None = None
    schedules: list[Schedule | None] = field(default_factory=list)
    rollouts: list[tuple[int | None, int | None]] = field(default_factory=list)
    """Most replicas and the canary's weight, of each wish."""
    catalogue: FakeCatalogue = field(default_factory=FakeCatalogue)
    pulls: FakePulls = field(default_factory=FakePulls)
    archives: FakeArchives = field(default_factory=FakeArchives)
    meanwhile: Callable[[], None] = lambda: None

    @property
    def prospect(self) -> FakeFleet:
        """It tells of memory itself."""
        return self

    @property
    def records(self) -> FakeFleet:
        """And of the past."""
        return self

    def submit(self, model: str, work: Work, sink: Sink) -> Passage:
        if self.refuse is not None:
            raise self.refuse
        passage = Passage(model, work, sink)
        self.passages.append(passage)
        return passage

    def count(self, seen: Observation) -> None:
        self.counted.append(seen)

    def find(self, model: str) -> str:
        for one in self.statuses.values():
            if model in {one.name, one.model}:
                return one.name
        raise ModelNotFound(f"The model {model!r} does not exist.", param="model")

    def deployments(self) -> list[DeploymentStatus]:
        if self.broken is not None:
            raise self.broken
        return list(self.statuses.values())

    def deployment(self, name: str) -> DeploymentStatus:
        try:
            return self.statuses[name]
        except KeyError:
            raise DeploymentNotFound(f"There is no deployment {name!r}.") from None

    async def deploy(
        self,
        name: str | None,
        request: Request,
        replicas: int,
        by: str,
        schedule: Schedule | None = None,
        max_replicas: int | None = None,
        canary: int | None = None,
    ) -> tuple[DeploymentStatus, str]:
        self.calls.append(("deploy", name, request, replicas, by))
        self.schedules.append(schedule)
        self.rollouts.append((max_replicas, canary))
        assert name is not None
        outcome = "unchanged" if name in self.statuses else "created"
        span = (replicas, max_replicas) if max_replicas else (None, None)
        self.statuses[name] = status(
            name,
            model=request.model,
            replicas=replicas,
            min_replicas=span[0],
            max_replicas=span[1],
        )
        return self.statuses[name], outcome

    async def _change(self, kind: str, name: str, by: str) -> DeploymentStatus:
        self.calls.append((kind, name, by))
        return self.deployment(name)

    async def remove(self, name: str, by: str) -> DeploymentStatus:
        return await self._change("remove", name, by)

    async def start(self, name: str, by: str) -> DeploymentStatus:
        return await self._change("start", name, by)

    async def stop(self, name: str, by: str) -> DeploymentStatus:
        return await self._change("stop", name, by)

    async def restart(self, name: str, by: str) -> DeploymentStatus:
        return await self._change("restart", name, by)

    async def scale(
        self, name: str, replicas: int, by: str, max_replicas: int | None = None
    ) -> DeploymentStatus:
        self.calls.append(("scale", name, replicas, by))
        self.rollouts.append((max_replicas, None))
        return self.deployment(name)

    async def weigh(self, name: str, weight: int, by: str) -> DeploymentStatus:
        self.calls.append(("weigh", name, weight, by))
        return self.deployment(name)

    async def promote(self, name: str, by: str) -> DeploymentStatus:
        self.calls.append(("promote", name, by))
        raise NoCanary(f"{name} has no canary.")

    async def roll_back(
        self, name: str, number: int | None, by: str
    ) -> tuple[DeploymentStatus, str]:
        self.calls.append(("roll_back", name, number, by))
        return self.deployment(name), "replaced"

    async def fit(
        self,
        name: str | None,
        request: Request,
        replicas: int | None,
        most: int | None = None,
        *,
        beside: bool = False,
    ) -> Fit:
        self.calls.append(("fit", name, request.model, replicas))
        return Fit(Verdict.FITS, "It fits.", 1000)

    async def memory(self, name: str) -> Fit:
        self.deployment(name)
        peaks = Peaks(3000, 2000, 2500)
        estimate = Estimate(900, 225, "float32", 900, 100, 0, from_headers=True)
        footprint = Footprint("cpu", 3000, 2500, 0, estimate, peaks)
        rooms = (Room("host", 10_000, 7000),)
        return Fit(Verdict.FITS, "It fits.", 3000, measured=True, footprint=footprint, rooms=rooms)

    async def load(self, name: str, by: str) -> DeploymentStatus:
        return await self._change("load", name, by)

    async def unload(self, name: str, by: str) -> DeploymentStatus:
        return await self._change("unload", name, by)

    async def generations(self, name: str) -> list[Generation]:
        return [Generation(1, Request(self.deployment(name).model), 1_700_000_000.0, "uid 0")]

    async def lives(self, name: str, limit: int) -> list[WorkerLife]:
        self.deployment(name)
        return [WorkerLife("uuid", name, 1, 0, "boot", 1_700_000_000.25)][:limit]

    async def crashes(self, name: str, limit: int) -> list[Crash]:
        self.deployment(name)
        return [Crash(**_CRASH)][:limit]

    async def crash(self, name: str, number: int) -> Dossier:
        self.deployment(name)
        if number != _CRASH["id"]:
            raise CrashNotFound
        return Dossier(
            **_CRASH,
            order=LoadOrder(name, "/models/small"),
            log=("line",),
            usage=(Sample(1_700_000_000.5, 1000, 0.5),),
        )

    async def why(self, name: str) -> Story:
        self.deployment(name)
        return Story(("It is so.",), (), 3)

    async def events(self, deployment: str | None, after: int, limit: int) -> list[Event]:
        found = [
            event
            for event in self.history
            if event.id > after and deployment in {None, event.deployment}
        ]
        self.meanwhile()
        return found[-limit:] if limit else []

    def watch(
        self, deployment: str | None, callback: Callable[[Event], None]
    ) -> Callable[[], None]:
        self.watchers.append(callback)
        return lambda: self.watchers.remove(callback)

    def happen(self, event: Event) -> None:
        self.history.append(event)
        for watcher in list(self.watchers):
            watcher(event)

    async def log_tail(self, name: str, lines: int) -> list[str]:
        self.deployment(name)
        self.meanwhile()
        return self.lines[-lines:] if lines else []

    def follow_log(self, name: str, callback: Callable[[str], None]) -> Callable[[], None]:
        self.followers.append(callback)
        return lambda: self.followers.remove(callback)

    def write(self, line: str) -> None:
        self.lines.append(line)
        for follower in list(self.followers):
            follower(line)

    async def statistics(self, query: StatisticsQuery) -> Summary:
        self.calls.append(("statistics", query))
        rollup = Rollup()
        for seconds in (0.1, 0.2, 0.3):
            rollup.count("", True, seconds, 0.01, 0.05, 4, 10, 20)
        rollup.count("overload", False, 0.0, 0.0, None, 0, 0, 0)
        rollup.sample(1000, 0)
        return Summary(
            rollup, {1_700_000_000: rollup}, {query.deployment or "small": rollup}, {0: rollup}
        )

    def recent(self, seconds: float) -> dict[str, Rollup]:
        rollup = Rollup()
        rollup.count("", True, seconds / 100, 0.01, None, 4, 10, 20)
        return {"small": rollup}

    def recent_of(self, name: str, seconds: float) -> dict[int, Rollup]:
        rollup = Rollup()
        rollup.count("", True, seconds / 100, 0.01, None, 4, 10, 20)
        return {0: Rollup(), 2: rollup}

    def rooms(self) -> list[Room]:
        return [Room("host", 4000, 1000)]

    async def record(self, entry: AuditEntry) -> None:
        if self.recording is not None:
            await self.recording
        self.audited.append(replace(entry, id=len(self.audited) + 1))

    async def audit(self, query: AuditQuery) -> list[AuditEntry]:
        self.calls.append(("audit", query))
        return self.audited[-query.limit :]

    async def backup(self) -> Path:
        if self.copy is None:
            raise DatabaseBusy(retry_after=5)
        return self.copy

    async def database_report(self) -> DatabaseReport:
        return DatabaseReport("/state/tursi.sqlite", 4096, 2, ("page 3",), ("/state/copy",))

    def storage(self) -> StorageStatus:
        return StorageStatus(1, 2, 3, 4)

    def health(self) -> tuple[str, list[Part]]:
        return "healthy", [Part("small", True, "ready")]

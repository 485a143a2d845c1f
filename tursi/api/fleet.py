"""The fleet, as far as the HTTP front needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tursi.errors import TursiError
from tursi.fleet import Part, Work
from tursi.model import (
    AuditEntry,
    AuditQuery,
    CatalogueEntry,
    Crash,
    DatabaseReport,
    DeploymentStatus,
    Dossier,
    Event,
    Fit,
    Generation,
    ImportPlan,
    ModelReport,
    PullStatus,
    Request,
    Room,
    Schedule,
    StorageStatus,
    Story,
    Trust,
    Usage,
    WorkerLife,
)
from tursi.rollup import Observation, Rollup, StatisticsQuery, Summary


class Head(Protocol):
    """Status and headers of an answer."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def content_type(self) -> str:
        """Also says whether the answer is a stream of events."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Further headers."""
        ...


class End(Protocol):
    """The end of an answer."""

    @property
    def usage(self) -> Usage:
        """What it cost."""
        ...

    @property
    def error(self) -> str:
        """The code of the error that the answer told, or empty."""
        ...


class Sink(Protocol):
    """Where an answer goes; exactly one of ``end`` and ``failed`` ends it."""

    def head(self, head: Head) -> None:
        """The answer begins."""
        ...

    def body(self, data: bytes) -> None:
        """Bytes of it."""
        ...

    def end(self, end: End) -> None:
        """It is complete."""
        ...

    def failed(self, error: TursiError) -> None:
        """There is no more of it, because of ``error``."""
        ...


class Ticket(Protocol):
    """A request on its way."""

    @property
    def waited(self) -> float:
        """Seconds until a worker got it."""
        ...

    @property
    def generation(self) -> int:
        """Of that worker; 0 if none got it."""
        ...

    def cancel(self) -> None:
        """Do no more work for it; its sink hears nothing any more."""
        ...


class Catalogue(Protocol):
    """The models on this machine's disk."""

    async def entries(self) -> list[CatalogueEntry]:
        """All of them."""
        ...

    async def show(self, model: str) -> ModelReport:
        """A deployment's model, or one on the disk; ``CatalogueEntryNotFound``."""
        ...

    async def remove(self, model: str, by: str) -> Sequence[CatalogueEntry]:
        """Delete files; ``CatalogueEntryNotFound``, ``ModelInUse``."""
        ...


class Export(Protocol):
    """An archive that is to be sent."""

    @property
    def name(self) -> str:
        """Of its deployment."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def pieces(self) -> Iterator[bytes]:
        """All of it, to be taken in a thread."""
        ...


class Upload(Protocol):
    """A body that arrives."""

    async def read(self) -> bytes:
        """The next bytes, none at the end."""
        ...


class Archives(Protocol):
    """Deployments with their files."""

    async def export(self, name: str, by: str) -> Export:
        """The deployment as it is now; ``FilesUnavailable``."""
        ...

    async def take(
        self, upload: Upload, *, name: str | None, trust: Trust, dry_run: bool, by: str
    ) -> tuple[DeploymentStatus, str] | ImportPlan:
        """Import what arrives, or tell what that would do."""
        ...


class Pulls(Protocol):
    """Downloads; every method with a ``number`` raises ``PullNotFound``."""

    async def start(self, model: str, trust: Trust, by: str) -> PullStatus:
        """Download a model of the hub."""
        ...

    async def pause(self, number: int, by: str) -> PullStatus:
        """Stop; what has arrived is kept."""
        ...

    async def resume(self, number: int, by: str) -> PullStatus:
        """Go on."""
        ...

    async def cancel(self, number: int, by: str) -> PullStatus:
        """Give it up."""
        ...

    async def newest(self) -> list[PullStatus]:
        """Those that have not ended and the latest others, newest first."""
        ...

    async def one(self, number: int) -> PullStatus:
        """How it is."""
        ...

    def watch(self, number: int, callback: Callable[[PullStatus], None]) -> Callable[[], None]:
        """Call back with each news of it until the returned function is called."""
        ...


class Prospect(Protocol):
    """Tells whether there is room in memory (``tursi.fleet.prospect``)."""

    async def fit(
        self,
        name: str | None,
        request: Request,
        replicas: int | None,
        most: int | None = None,
        *,
        beside: bool = False,
    ) -> Fit:
        """Whether ``deploy`` of the same would find room, ``beside`` what serves if need be."""
        ...

    async def memory(self, name: str) -> Fit:
        """What each of its workers needs of memory, and what there is; ``DeploymentNotFound``."""
        ...

    def rooms(self) -> Sequence[Room]:
        """Memory of the host and of each GPU."""
        ...


class Records(Protocol):
    """What is kept of the past (``tursi.fleet.records``)."""

    async def generations(self, name: str) -> list[Generation]:
        """Its generations, oldest first."""
        ...

    async def lives(self, name: str, limit: int) -> list[WorkerLife]:
        """Its latest worker lives, newest first."""
        ...

    async def crashes(self, name: str, limit: int) -> list[Crash]:
        """Its latest crashes, newest first."""
        ...

    async def crash(self, name: str, number: int) -> Dossier:
        """One of them with all its evidence; ``CrashNotFound``."""
        ...

    async def why(self, name: str) -> Story:
        """Why it is as it is."""
        ...

    async def events(self, deployment: str | None, after: int, limit: int) -> list[Event]:
        """The newest ``limit`` events after the id ``after``, oldest first."""
        ...

    def watch(
        self, deployment: str | None, callback: Callable[[Event], None]
    ) -> Callable[[], None]:
        """Call back with each new event until the returned function is called."""
        ...

    async def log_tail(self, name: str, lines: int) -> list[str]:
        """The last lines of its workers' logs."""
        ...

    def follow_log(self, name: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call back with each new line until the returned function is called."""
        ...

    async def statistics(self, query: StatisticsQuery) -> Summary:
        """What was done; ``InvalidRequest`` where that is too much at once."""
        ...

    def recent(self, seconds: float) -> Mapping[str, Rollup]:
        """What each deployment did in the last ``seconds``."""
        ...

    def recent_of(self, name: str, seconds: float) -> Mapping[int, Rollup]:
        """What each of its generations did in the last ``seconds``."""
        ...

    async def record(self, entry: AuditEntry) -> None:
        """Add to the audit; returns when that is on the disk, or has to wait for it."""
        ...

    async def audit(self, query: AuditQuery) -> list[AuditEntry]:
        """The newest entries of the audit that ``query`` asks for, oldest first."""
        ...

    async def backup(self) -> Path:
        """A consistent copy of the database, which the caller removes."""
        ...

    async def database_report(self) -> DatabaseReport:
        """How the database is, all of it read."""
        ...

    def storage(self) -> StorageStatus:
        """What waits for the disk, and what is lost."""
        ...


class Fleet(Protocol):
    """What serves models; every change it answers for is durable."""

    def submit(self, model: str, work: Work, sink: Sink) -> Ticket:
        """Hand over a request, or raise the error to answer with."""
        ...

    def count(self, seen: Observation) -> None:
        """Count a request at its end, the refused ones too."""
        ...

    def find(self, model: str) -> str:
        """The deployment's name for its name or full reference; ``ModelNotFound``."""
        ...

    def deployments(self) -> Sequence[DeploymentStatus]:
        """All deployments, by name."""
        ...

    def deployment(self, name: str) -> DeploymentStatus:
        """One of them; ``DeploymentNotFound``, like every method with a ``name``."""
        ...

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
        """Create or change a deployment; says which it was."""
        ...

    async def roll_back(
        self, name: str, number: int | None, by: str
    ) -> tuple[DeploymentStatus, str]:
        """Go back to an earlier generation; ``None``: the last other one."""
        ...

    async def remove(self, name: str, by: str) -> DeploymentStatus:
        """Delete it; its workers drain in the background."""
        ...

    async def start(self, name: str, by: str) -> DeploymentStatus:
        """Want it running."""
        ...

    async def stop(self, name: str, by: str) -> DeploymentStatus:
        """Want it stopped."""
        ...

    async def load(self, name: str, by: str) -> DeploymentStatus:
        """Have it in memory."""
        ...

    async def unload(self, name: str, by: str) -> DeploymentStatus:
        """Free its memory."""
        ...

    async def restart(self, name: str, by: str) -> DeploymentStatus:
        """Drain its workers and start them again."""
        ...

    async def scale(
        self, name: str, replicas: int, by: str, max_replicas: int | None = None
    ) -> DeploymentStatus:
        """Run that many replicas, or as many up to ``max_replicas`` as are needed."""
        ...

    async def weigh(self, name: str, weight: int, by: str) -> DeploymentStatus:
        """Give the canary that share of the requests, in percent; ``NoCanary``."""
        ...

    async def promote(self, name: str, by: str) -> DeploymentStatus:
        """Let the canary take over; ``NoCanary``."""
        ...

    @property
    def prospect(self) -> Prospect:
        """Whether there is room in memory."""
        ...

    @property
    def records(self) -> Records:
        """What is kept of the past."""
        ...

    @property
    def catalogue(self) -> Catalogue:
        """The models on this machine's disk."""
        ...

    @property
    def archives(self) -> Archives:
        """Deployments with their files."""
        ...

    @property
    def pulls(self) -> Pulls:
        """Downloads."""
        ...

    def health(self) -> tuple[str, list[Part]]:
        """``healthy`` or ``degraded``, and the parts that say why."""
        ...

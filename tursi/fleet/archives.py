"""Deployments that leave and come as archives with all their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from tursi import __version__, archive
from tursi.archive import Complete, Content, Event, File, Manifest, Parser
from tursi.errors import ArchiveRefused, DeploymentNotFound, FilesUnavailable, ShuttingDown
from tursi.fleet.journal import Journal
from tursi.fleet.member import Member
from tursi.hub import Hub, Room, Staging
from tursi.model import (
    Deployment,
    DeploymentStatus,
    Host,
    ImportPlan,
    Request,
    Resolution,
    Schedule,
    Trust,
    check_replicas,
    deployment_name,
)
from tursi.store import foretell


@dataclass(frozen=True, slots=True)
class Export:
    """An archive that is to be sent."""

    name: str
    """Of the deployment."""
    size: int
    """Bytes."""
    pieces: Iterator[bytes]
    """All of it; each takes a while, so take them in a thread. Some are empty."""


class Upload(Protocol):
    """An archive that arrives."""

    async def read(self) -> bytes:
        """The next bytes, none at its end; raises when whoever sends it is gone."""
        ...


class Deploy(Protocol):
    """Creates or changes a deployment."""

    def __call__(
        self,
        name: str | None,
        request: Request,
        replicas: int | None,
        by: str,
        schedule: Schedule | None = None,
        max_replicas: int | None = None,
        canary: int | None = None,
        imported: Resolution | None = None,
    ) -> Awaitable[tuple[DeploymentStatus, str]]:
        """How it is, and what came of it."""
        ...


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to become of an archive."""

    name: str
    request: Request
    schedule: Schedule
    manifest: Manifest


class Archives:
    """Exports and imports; ``now`` gives UTC epoch seconds."""

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        hub: Hub,
        journal: Journal,
        deploy: Deploy,
        host: Host,
        now: Callable[[], float],
    ) -> None:
        self._members = members
        self._hub = hub
        self._journal = journal
        self._deploy = deploy
        self._host = host
        self._now = now
        self._coming: Counter[str] = Counter()
        """Repositories that are being imported."""
        self._closed = False

    def close(self) -> None:
        """Give up what is under way."""
        self._closed = True

    def using(self, repository: str | None) -> bool:
        """Whether this repository is being imported."""
        return self._coming[repository or ""] > 0

    async def export(self, name: str, by: str) -> Export:
        """The deployment as it is now; ``DeploymentNotFound``, ``FilesUnavailable``."""
        member = self._members.get(name)
        if member is None or member.leaving:
            raise DeploymentNotFound(
                f"There is no deployment {name[:100]!r}; `tursi ps` lists them."
            )
        deployment = member.deployment.served
        resolution = deployment.generation.resolution
        if resolution is None:
            raise FilesUnavailable(
                f"The files of {name} aren't all on the disk yet; `tursi ps` says how far they are."
            )
        request = deployment.generation.request
        found = await self._hub.exportable(request.model, resolution.folder, request.trust)
        describe = partial(_describe, deployment, at=self._now(), by=by)
        size = archive.length(describe([each.file for each in found]))
        self._journal.note("export", f"{by} exports {name}", deployment=name, cause=by)
        return Export(name, size, self._hub.archive(found, describe))

    async def take(
        self, upload: Upload, *, name: str | None, trust: Trust, dry_run: bool, by: str
    ) -> tuple[DeploymentStatus, str] | ImportPlan:
        """Import what arrives: check all of it, publish its files, and deploy them.

        ``trust`` is what whoever imports it allows its model. With ``dry_run`` nothing
        is written, and no more than the manifest has to arrive. Raises ``ArchiveInvalid``,
        ``ArchiveNewer``, ``ArchiveRefused``, ``DiskFull`` and others.
        """
        parser = Parser()
        staging: Staging | None = None
        wanted: _Wanted | None = None
        plan: ImportPlan | None = None
        try:
            while data := await upload.read():
                if self._closed:
                    raise ShuttingDown
                events = parser.feed(data)
                while manifest := await self._hub.step(_advance, events, staging):
                    wanted, plan = await self._judge(manifest, name, trust)
                    if not dry_run:
                        staging = await self._hub.stage(manifest)
                        self._coming[manifest.repository or ""] += 1
            if wanted is None or plan is None or not dry_run:
                parser.close()
            if plan is not None and (staging is None or wanted is None):
                return plan
            if staging is None or wanted is None:
                raise AssertionError("an archive without a manifest is no whole one")
            # From here on it goes on whatever becomes of who has sent it.
            resolution = await self._hub.step(staging.publish, wanted.manifest.trust)
            return await self._deploy(
                wanted.name,
                wanted.request,
                wanted.manifest.replicas,
                by,
                wanted.schedule,
                wanted.manifest.max_replicas,
                imported=resolution,
            )
        finally:
            if staging is not None:
                self._coming[parser.manifest.repository or "" if parser.manifest else ""] -= 1
                await self._hub.step(staging.discard)

    async def _judge(
        self, manifest: Manifest, name: str | None, trust: Trust
    ) -> tuple[_Wanted, ImportPlan]:
        """What the archive means here; raises what speaks against it."""
        chosen = deployment_name(name if name is not None else manifest.name)
        _check_trust(manifest.trust, trust)
        room = await self._hub.room(manifest)
        model = manifest.model if manifest.repository else room.folder
        request, schedule = manifest.wanted(model)
        request = request.checked(self._host)
        check_replicas(manifest.replicas, manifest.max_replicas)
        wanted = _Wanted(chosen, request, schedule, manifest)
        return wanted, self._plan(wanted, room)

    def _plan(self, wanted: _Wanted, room: Room) -> ImportPlan:
        manifest, member = wanted.manifest, self._members.get(wanted.name)
        outcome = foretell(
            member.deployment if member is not None and not member.leaving else None,
            wanted.request,
            (manifest.replicas, manifest.max_replicas),
            wanted.schedule,
            Resolution(room.folder, commit=manifest.commit),
        )
        return ImportPlan(
            name=wanted.name,
            model=wanted.request.model,
            outcome=outcome.value,
            commit=manifest.commit,
            files=len(manifest.files),
            size=manifest.size,
            present=room.present,
            free=room.free,
            exported_at=manifest.created_at,
            exported_by=manifest.created_by,
            version=manifest.version,
            allow_pickle=manifest.trust.allow_pickle,
            trust_remote_code=manifest.trust.trust_remote_code,
        )


def _describe(deployment: Deployment, files: Sequence[File], *, at: float, by: str) -> Manifest:
    return archive.describe(deployment, files, version=__version__, at=at, by=by)


def _advance(events: Iterator[Event], staging: Staging | None) -> Manifest | None:
    """Write what the archive has, up to its manifest or for as long as there is something."""
    for event in events:
        if isinstance(event, Manifest):
            return event
        if staging is None:
            continue
        if isinstance(event, Content):
            staging.write(event.file, event.data)
        elif isinstance(event, Complete):
            staging.complete(event.file)
    return None


def _check_trust(wanted: Trust, given: Trust) -> None:
    """Nobody is made to trust a model by its archive."""
    if wanted.allow_pickle and not given.allow_pickle:
        raise ArchiveRefused(
            "The archive's deployment loads pickle files, which can run code; if you trust who "
            "made it, import it with --allow-pickle."
        )
    if wanted.trust_remote_code and not given.trust_remote_code:
        raise ArchiveRefused(
            "The archive's deployment runs Python code that is in the archive; if you trust who "
            "made it, import it with --trust-remote-code."
        )

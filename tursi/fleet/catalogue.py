"""The models on this machine's disk: listed, removed, and kept to a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from twisted.logger import Logger

from tursi.errors import (
    CatalogueEntryNotFound,
    FilesUnavailable,
    InvalidRequest,
    ModelInUse,
    TursiError,
)
from tursi.fleet.archives import Archives
from tursi.fleet.journal import Journal
from tursi.fleet.member import Member
from tursi.fleet.pulls import Pulls
from tursi.hub import Hub
from tursi.model import CatalogueEntry, Footprint, ModelCard, ModelReport, Reference, mebibytes

log = Logger()


class Catalogue:
    """What is in the cache, and who uses it; ``limit`` is in bytes, 0 for none."""

    def __init__(
        self,
        *,
        members: Mapping[str, Member],
        hub: Hub,
        pulls: Pulls,
        archives: Archives,
        journal: Journal,
        footprint: Callable[[Member], Footprint | None],
        limit: int,
    ) -> None:
        self._members = members
        self._hub = hub
        self._pulls = pulls
        self._archives = archives
        self._journal = journal
        self._footprint = footprint
        self._limit = limit

    def configure(self, limit: int) -> None:
        """Keep the cache to this many bytes from now on."""
        self._limit = limit

    async def entries(self) -> list[CatalogueEntry]:
        """All models in the cache, and the folders outside it that deployments use."""
        entries = await self._hub.catalogue()
        users = self._users()
        known = {entry.folder for entry in entries}
        outside = [
            CatalogueEntry(Path(folder).name, folder, size=0)
            for folder in sorted(users)
            if folder not in known
        ]
        return [
            replace(entry, used_by=tuple(users.get(entry.folder, ())))
            for entry in (*entries, *outside)
        ]

    async def show(self, model: str) -> ModelReport:
        """A deployment's model, or the one of that name, its revision after an ``@``.

        Raises ``CatalogueEntryNotFound``, or ``FilesUnavailable``.
        """
        entries = await self.entries()
        member = self._members.get(model)
        if member is not None and not member.leaving:
            return await self._of_member(member, entries)
        reference = Reference.parse(model)
        commit = await self._commit(reference)
        found = [
            entry
            for entry in entries
            if entry.name == reference.repository and (entry.commit or "").startswith(commit)
        ]
        if not found:
            raise CatalogueEntryNotFound(
                f"There is neither a deployment nor a model {model[:200]} here; `tursi ps` and "
                "`tursi models` list what there is."
            )
        entry = max(found, key=lambda entry: entry.used_at or 0.0)
        card = await self._hub.card(entry.folder)
        return _report(entry, card)

    async def _of_member(self, member: Member, entries: Sequence[CatalogueEntry]) -> ModelReport:
        name, resolution = member.deployment.name, member.deployment.generation.resolution
        if resolution is None:
            raise FilesUnavailable(
                f"The files of {name} aren't all on the disk yet; `tursi ps` says how far they are."
            )
        entry = next(
            (each for each in entries if each.folder == resolution.folder),
            CatalogueEntry(Path(resolution.folder).name, resolution.folder, 0, used_by=(name,)),
        )
        report = _report(entry, await self._hub.card(resolution.folder))
        return replace(report, footprint=self._footprint(member))

    async def remove(self, model: str, by: str) -> Sequence[CatalogueEntry]:
        """Delete the files of ``org/name``, or of its one revision after an ``@``.

        An import that isn't of the hub has the name of its folder.
        Raises ``CatalogueEntryNotFound``, or ``ModelInUse`` with who uses it.
        """
        reference = Reference.parse(model)
        if reference.repository is None:
            raise InvalidRequest(
                "Tursi only removes what it has downloaded or imported, not a folder of yours.",
                param="model",
            )
        commit = await self._commit(reference)
        entries = [
            entry
            for entry in await self.entries()
            if (
                entry.name == reference.repository
                and entry.commit is not None
                and entry.commit.startswith(commit)
            )
            or (entry.name == str(reference) and self._hub.is_imported(entry.folder))
        ]
        commits = [entry.commit for entry in entries if entry.commit]
        if reference.revision is None:
            commits += await self._hub.unfinished(reference.repository)
        if not (commits or entries):
            raise CatalogueEntryNotFound(
                f"There is no {model[:200]} on the disk; `tursi models` lists what there is."
            )
        users = sorted({user for entry in entries for user in entry.used_by})
        if users:
            raise ModelInUse(
                f"{model} is used by {', '.join(users)}; `tursi down` or change that first."
            )
        self._check_unused(model, reference.repository)
        if commits:
            await self._hub.remove(reference.repository, commits)
        for entry in entries:
            if entry.commit is None:
                await self._hub.discard(entry.folder)
        self._journal.note("model.removed", f"{by} removes {model} from the disk", cause=by)
        return entries

    async def _commit(self, reference: Reference) -> str:
        """How the commits begin that it means; all of them without a revision."""
        if reference.repository is None or reference.revision is None:
            return ""
        return await self._hub.commit(reference.repository, reference.revision)

    def _check_unused(self, model: str, repository: str) -> None:
        if self._archives.using(repository):
            raise ModelInUse(f"{model} is being imported; remove it when that has ended.")
        if self._pulls.using(repository):
            raise ModelInUse(f"{model} is being pulled; cancel that first.")
        if self._fetching(repository):
            raise ModelInUse(f"{model} is being looked for by a deployment; `tursi ps` shows it.")

    async def collect(self, now: float) -> None:
        """Bring the cache to its limit: what was used longest ago goes first.

        Also what downloads have left that nobody goes on with. ``now`` is UTC epoch
        seconds.
        """
        try:
            await self._hub.sweep(now)
        except TursiError as error:
            log.warn("leftovers of downloads stay: {message}", message=error.message)
        if not self._limit:
            return
        try:
            for entry in excess(await self.entries(), self._limit):
                # Removing the ones before it has taken a while.
                if not self._in_use(entry):
                    await self._drop(entry)
        except TursiError as error:
            log.warn("the cache keeps its size: {message}", message=error.message)

    async def _drop(self, entry: CatalogueEntry) -> None:
        try:
            await self._hub.remove(entry.name, [entry.commit] if entry.commit else [])
        except ModelInUse:
            return
        self._journal.note(
            "model.removed",
            f"{entry.name} ({mebibytes(entry.size)}) is removed from the disk",
            cause=f"downloaded models take more than {mebibytes(self._limit)}",
        )

    def _in_use(self, entry: CatalogueEntry) -> bool:
        return (
            self._pulls.using(entry.name)
            or self._archives.using(entry.name)
            or self._fetching(entry.name)
            or entry.folder in self._users()
        )

    def _fetching(self, repository: str) -> bool:
        """Whether a deployment has its files looked for; they may be found at any moment."""
        return any(
            member.fetch is not None
            and Reference.parse(member.deployment.generation.request.model).repository == repository
            for member in self._members.values()
        )

    def _users(self) -> dict[str, list[str]]:
        """By folder, the deployments that use it, older generations that still serve too."""
        users: dict[str, list[str]] = {}
        for name, member in sorted(self._members.items()):
            folders = {worker.folder for worker in member.workers.values()}
            # What has served comes back if the other one fails.
            for generation in (member.deployment.generation, member.deployment.served.generation):
                if generation.resolution is not None:
                    folders.add(generation.resolution.folder)
            for folder in folders:
                users.setdefault(folder, []).append(name)
        return users


def _report(entry: CatalogueEntry, card: ModelCard) -> ModelReport:
    return ModelReport(
        name=entry.name,
        folder=entry.folder,
        commit=entry.commit,
        size=sum(file.size for file in card.files),
        card=card,
        used_by=entry.used_by,
        used_at=entry.used_at,
    )


def excess(entries: Sequence[CatalogueEntry], limit: int) -> list[CatalogueEntry]:
    """What has to go so that the rest fits into ``limit`` bytes; never what is used."""
    over = sum(entry.size for entry in entries) - limit
    going = []
    for entry in sorted(entries, key=lambda entry: entry.used_at or 0.0):
        if over <= 0:
            break
        if entry.used_by or entry.commit is None:
            continue
        over -= entry.size
        going.append(entry)
    return going

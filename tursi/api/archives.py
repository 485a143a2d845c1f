"""Archives: a deployment with its files goes out, and comes in."""

from __future__ import annotations

from tursi.api.download import Download
from tursi.api.endpoint import Status, endpoint
from tursi.api.fleet import Fleet
from tursi.api.messages import Deployed, ImportQuery
from tursi.api.upload import Upload
from tursi.model import ImportPlan, Role, Trust

_TAR = "application/x-tar"


class ArchiveControl:
    """Handlers of exports and imports."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @endpoint(
        "POST", "/deployments/<name>/export", role=Role.CONTROL, reply=bytes, media=_TAR
    )  # fmt: skip
    async def export(self, name: str, by: str) -> Download:
        """Answer with the deployment and all its files, a tar archive."""
        found = await self._fleet.archives.export(name, by)
        return Download(lambda: (found.size, found.pieces), f"{found.name}.tar", _TAR)

    @endpoint(
        "POST", "/imports", role=Role.CONTROL, query=ImportQuery, upload=_TAR,
        reply=(Deployed, ImportPlan), statuses=(200, 201),
    )  # fmt: skip
    async def imports(
        self,
        upload: Upload,
        name: str | None,
        allow_pickle: bool,
        trust_remote_code: bool,
        dry_run: bool,
        by: str,
    ) -> Deployed | Status[Deployed] | ImportPlan:
        """Take an archive of an export: check it, keep its files, and deploy them."""
        done = await self._fleet.archives.take(
            upload,
            name=name,
            trust=Trust(allow_pickle, trust_remote_code),
            dry_run=dry_run,
            by=by,
        )
        if isinstance(done, ImportPlan):
            return done
        reply = Deployed(*done)
        return Status(201, reply) if reply.outcome == "created" else reply

"""The database: a copy of it, whether it is whole, and the audit that it keeps."""

from __future__ import annotations

from datetime import datetime

from tursi.api.download import Download
from tursi.api.endpoint import endpoint
from tursi.api.fleet import Fleet
from tursi.api.messages import AuditLog, AuditLogQuery
from tursi.model import AuditQuery, DatabaseReport, Role


class Database:
    """Handlers under ``/database``, and of ``/audit``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @endpoint("GET", "/audit", role=Role.CONTROL, query=AuditLogQuery, reply=AuditLog)
    async def audit(
        self,
        since: datetime | None,
        who: str | None,
        action: str | None,
        target: str | None,
        limit: int,
    ) -> AuditLog:
        """List who changed what, or was refused it."""
        begin = since.timestamp() if since is not None else 0.0
        return AuditLog(await self._fleet.audit(AuditQuery(begin, who, action, target, limit)))

    @endpoint("GET", "/database", role=Role.CONTROL, reply=DatabaseReport)
    async def check(self) -> DatabaseReport:
        """Read all of the database, and tell how it is."""
        return await self._fleet.database_report()

    @endpoint(
        "POST", "/database/backup", role=Role.CONTROL, reply=bytes, media="application/vnd.sqlite3"
    )
    async def backup(self) -> Download:
        """Answer with a consistent copy of the database, an SQLite file."""
        return Download(await self._fleet.backup(), "tursi.sqlite")

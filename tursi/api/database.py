"""The database: a copy of it, whether it is whole, and the audit that it keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

from tursi.api.download import Download
from tursi.api.endpoint import endpoint
from tursi.api.fleet import Fleet
from tursi.api.messages import AuditLog, AuditLogQuery
from tursi.model import AuditQuery, DatabaseReport, Role

_SQLITE = "application/vnd.sqlite3"
_PIECE = 256 * 1024


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
        return AuditLog(
            await self._fleet.records.audit(AuditQuery(begin, who, action, target, limit))
        )

    @endpoint("GET", "/database", role=Role.CONTROL, reply=DatabaseReport)
    async def check(self) -> DatabaseReport:
        """Read all of the database, and tell how it is."""
        return await self._fleet.records.database_report()

    @endpoint("POST", "/database/backup", role=Role.CONTROL, reply=bytes, media=_SQLITE)
    async def backup(self) -> Download:
        """Answer with a consistent copy of the database, an SQLite file."""
        return Download(
            partial(_opened, await self._fleet.records.backup()), "tursi.sqlite", _SQLITE
        )


def _opened(path: Path) -> tuple[int, Iterator[bytes]]:
    """The file at ``path``, which has no name any more."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    path.unlink()
    return os.fstat(file).st_size, _pieces(file)


def _pieces(file: int) -> Iterator[bytes]:
    try:
        while piece := os.read(file, _PIECE):
            yield piece
    finally:
        os.close(file)

"""Interactions on the audit: who changed what, or was refused it. Rows are only ever added."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from tursi.config import Storage
from tursi.model import AuditEntry, AuditQuery

_NAMES = tuple(field.name for field in fields(AuditEntry) if field.name != "id")
_COLUMNS = ", ".join(_NAMES)
_PLACES = ", ".join("?" * len(_NAMES))
_FILTERS = (
    # "key 3" also finds "key 3 (laptop)", and "deployments" also "deployments.stop".
    ("by", "(by = :by OR substr(by, 1, length(:by) + 1) = :by || ' ')"),
    (
        "action",
        "(action = :action OR substr(action, 1, length(:action) + 1) = :action || '.')",
    ),
    ("target", "target = :target"),
)


def add(txn: Any, entry: AuditEntry) -> AuditEntry:
    """Append ``entry``; the same with its id."""
    values = [getattr(entry, name) for name in _NAMES]
    # Built of our own field names only, like the rest here.
    cursor = txn.execute(f"INSERT INTO audit ({_COLUMNS}) VALUES ({_PLACES})", values)  # noqa: S608
    return replace(entry, id=cursor.lastrowid)


def newest(txn: Any, query: AuditQuery) -> list[AuditEntry]:
    """The newest entries that ``query`` asks for, oldest first."""
    values: dict[str, object] = {"since": query.since, "limit": query.limit}
    conditions = ["at >= :since"]
    for name, condition in _FILTERS:
        value = getattr(query, name)
        if value is not None:
            conditions.append(condition)
            values[name] = value
    txn.execute(
        f"SELECT id, {_COLUMNS} FROM audit WHERE {' AND '.join(conditions)}"  # noqa: S608
        " ORDER BY id DESC LIMIT :limit",
        values,
    )
    return [AuditEntry(*row) for row in reversed(txn.fetchall())]


def prune(txn: Any, storage: Storage) -> None:
    """Forget the oldest entries, which is all that the table's triggers allow."""
    txn.execute(
        "DELETE FROM audit WHERE id <= (SELECT max(id) FROM audit) - ?", (storage.audit_count,)
    )

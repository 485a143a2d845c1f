"""Interactions on API keys."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from tursi.errors import KeyExists, KeyNotFound
from tursi.model import ApiKey, NewKey, Scope

_SELECT = (
    "SELECT id, name, scopes, created_at, created_by, deployments, requests_per_minute,"
    " tokens_per_minute, last_used_at, revoked_at, digest FROM keys"
)


def every(txn: Any) -> list[tuple[ApiKey, bytes]]:
    """All keys with their digests, the revoked ones too, oldest first."""
    txn.execute(f"{_SELECT} ORDER BY id")
    return [_key(row) for row in txn.fetchall()]


def add(txn: Any, key: NewKey, digest: bytes) -> ApiKey:
    """Insert a key; ``KeyExists``."""
    try:
        txn.execute(
            "INSERT INTO keys (name, digest, scopes, deployments, requests_per_minute,"
            " tokens_per_minute, created_at, created_by) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key.name,
                digest,
                json.dumps(key.scopes),
                None if key.deployments is None else json.dumps(key.deployments),
                key.requests_per_minute,
                key.tokens_per_minute,
                key.created_at,
                key.created_by,
            ),
        )
    except sqlite3.IntegrityError:
        raise KeyExists(f"A key named {key.name!r} exists, or did; choose another name.") from None
    return _one(txn, "id = ?", txn.lastrowid)


def revoke(txn: Any, name: str, *, at: float) -> ApiKey:
    """Make the key with this name or id invalid for ever; ``KeyNotFound``."""
    key = _one(txn, "id = ?", int(name)) if name.isdecimal() else _one(txn, "name = ?", name)
    txn.execute("UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?", (at, key.id))
    return _one(txn, "id = ?", key.id)


def used(txn: Any, times: Mapping[int, float]) -> None:
    """Note when keys were last used."""
    txn.executemany(
        "UPDATE keys SET last_used_at = ? WHERE id = ?", [(at, key) for key, at in times.items()]
    )


def _one(txn: Any, where: str, value: object) -> ApiKey:
    txn.execute(f"{_SELECT} WHERE {where}", (value,))
    row = txn.fetchone()
    if row is None:
        raise KeyNotFound
    key, _ = _key(row)
    return key


def _key(row: tuple[Any, ...]) -> tuple[ApiKey, bytes]:
    number, name, scopes, at, by, deployments, *rest, digest = row
    key = ApiKey(
        number,
        name,
        tuple(Scope(each) for each in json.loads(scopes)),
        at,
        by,
        None if deployments is None else tuple(json.loads(deployments)),
        *rest,
    )
    return key, digest

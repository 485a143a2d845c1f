"""A store of keys in memory, with one key of each kind in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256

from twisted.internet.defer import Deferred, fail, succeed

from tursi.errors import DatabaseBusy, KeyExists, KeyNotFound
from tursi.model import ApiKey, NewKey, Scope


def key(number: int) -> str:
    """The key with this id."""
    return f"tursi_{number}_{number:064x}"


ADMIN, READ, INFER = key(1), key(2), key(3)


def digest(number: int) -> bytes:
    return sha256(f"{number:064x}".encode()).digest()


class FakeKeys:
    """Keeps keys, and what it is told of their use."""

    def __init__(self) -> None:
        self.held: list[tuple[ApiKey, bytes]] = []
        self.used: dict[int, float] = {}
        self.locked = False
        for number, scope in enumerate((Scope.ADMIN, Scope.READ, Scope.INFER), 1):
            self.put(ApiKey(number, scope.value, (scope,), 1_700_000_000.0, "uid 0"))

    def put(self, one: ApiKey, secret: bytes | None = None) -> ApiKey:
        self.held.append((one, secret or digest(one.id)))
        return one

    def keys(self) -> Deferred[list[tuple[ApiKey, bytes]]]:
        return succeed(list(self.held))

    def add_key(self, key: NewKey, digest: bytes) -> Deferred[ApiKey]:
        if any(one.name == key.name for one, _ in self.held):
            return fail(KeyExists())
        made = ApiKey(len(self.held) + 1, **asdict(key))
        return succeed(self.put(made, digest))

    def revoke_key(self, name: str, *, at: float) -> Deferred[ApiKey]:
        if self.locked:
            return fail(DatabaseBusy("It is locked.", retry_after=1))
        for index, (one, secret) in enumerate(self.held):
            if name in {one.name, str(one.id)}:
                revoked = replace(one, revoked_at=at)
                self.held[index] = revoked, secret
                return succeed(revoked)
        return fail(KeyNotFound())

    def keys_used(self, times: Mapping[int, float]) -> Deferred[None]:
        if self.locked:
            return fail(DatabaseBusy())
        self.used.update(times)
        return succeed(None)

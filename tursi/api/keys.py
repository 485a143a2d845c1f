"""API keys: made, listed and revoked, in the store and in the keyring alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from tursi.api.endpoint import endpoint, identity
from tursi.api.keyring import Keyring, new_secret, written
from tursi.api.messages import IssuedKey, KeyBody, KeyList
from tursi.errors import DatabaseBusy, DatabaseFull, InvalidRequest, KeyNotFound, TursiError
from tursi.model import ApiKey, NewKey, Role, Scope, deployment_name, key_name

log = Logger()

_ADMIN: dict[str, Any] = {"role": Role.CONTROL, "scope": Scope.ADMIN}
_SAVE_SECONDS = 10.0
"""How long the last use of a key may be known in memory only."""


class KeyStore(Protocol):
    """The store, as far as keys need it."""

    def keys(self) -> Deferred[list[tuple[ApiKey, bytes]]]:
        """All keys with their digests, the revoked ones too, oldest first."""
        ...

    def add_key(self, key: NewKey, digest: bytes) -> Deferred[ApiKey]:
        """Keep a key's digest and what it allows; ``KeyExists``."""
        ...

    def revoke_key(self, name: str, *, at: float) -> Deferred[ApiKey]:
        """Make the key with this name or id invalid for ever; ``KeyNotFound``."""
        ...

    def keys_used(self, times: Mapping[int, float]) -> Deferred[None]:
        """Note when keys, by their ids, were last used."""
        ...


class Keys:
    """Handlers under ``/keys``, and the keyring that every request is judged by."""

    def __init__(self, store: KeyStore, reactor: Any, now: Callable[[], float] = time.time) -> None:
        self._store = store
        self._now = now
        self._revoking: dict[int, float] = {}
        """When keys were revoked of which the store doesn't know yet, by their ids."""
        self._saving = LoopingCall(self._save)
        self._saving.clock = reactor
        self.ring = Keyring(reactor.seconds, now)

    async def start(self) -> None:
        """Read the keys; from now on keys are judged."""
        found = await self._store.keys()
        self.ring.load((key, digest) for key, digest in found if key.revoked_at is None)
        self._saving.start(_SAVE_SECONDS, now=False)

    async def stop(self) -> None:
        """Store what is known in memory only."""
        if self._saving.running:
            self._saving.stop()
        await self._save()

    async def _save(self) -> None:
        await self._revoke()
        used = self.ring.take_used()
        if used:
            try:
                await self._store.keys_used(used)
            except TursiError as error:
                self.ring.put_back(used)
                log.warn("the last use of keys waits: {message}", message=error.message)

    async def names(self) -> Mapping[int, str]:
        """The name of each key by its id, the revoked ones too."""
        return {key.id: key.name for key, _ in await self._store.keys()}

    @endpoint("GET", "/keys", reply=KeyList, **_ADMIN)
    async def list(self) -> KeyList:
        """List the API keys, without their secrets."""
        found = [self.ring.up_to_date(key) for key, _ in await self._store.keys()]
        return KeyList(
            [replace(key, revoked_at=key.revoked_at or self._revoking.get(key.id)) for key in found]
        )

    @endpoint("POST", "/keys", body=KeyBody, reply=IssuedKey, statuses=(201,), **_ADMIN)
    async def create(
        self,
        name: str,
        scopes: Sequence[Scope],
        deployments: Sequence[str] | None,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        by: str,
    ) -> IssuedKey:
        """Make an API key; its secret is in this answer and nowhere else."""
        limited = (
            None if deployments is None else tuple(sorted({*map(deployment_name, deployments)}))
        )
        if limited is not None and {*scopes} != {Scope.INFER}:
            raise InvalidRequest(
                "A key for certain deployments can only have the scope 'infer'.", param="scopes"
            )
        secret = new_secret()
        wanted = NewKey(
            key_name(name),
            tuple(each for each in Scope if each in scopes),
            self._now(),
            by,
            limited,
            requests_per_minute,
            tokens_per_minute,
        )
        key = await self._store.add_key(wanted, secret.digest)
        self.ring.add(key, secret.digest)
        return IssuedKey(key, written(key.id, secret))

    @endpoint("DELETE", "/keys/<name>", reply=ApiKey, **_ADMIN)
    async def revoke(self, name: str) -> ApiKey:
        """Revoke an API key, by its name or id; it is invalid at once and for ever."""
        if name.isdigit() and identity(name) is None:
            raise KeyNotFound
        at = self._now()
        # First of all: nobody who has it shall gain from a database that takes nothing.
        dropped = self.ring.named(name)
        if dropped is not None:
            self.ring.drop(dropped)
        try:
            key = await self._store.revoke_key(name, at=at)
        except (DatabaseBusy, DatabaseFull) as error:
            if dropped is None:
                raise
            self._revoking[dropped] = at
            raise type(error)(
                f"The key is refused from now on, but that isn't on the disk yet: {error.message} "
                "It is written as soon as that can be; until then a restart would forget it.",
                retry_after=error.retry_after,
            ) from error
        self._revoking.pop(key.id, None)
        self.ring.drop(key.id)
        return self.ring.up_to_date(key)

    async def _revoke(self) -> None:
        """Write down which keys are refused, as far as it couldn't be done at once."""
        for number, at in list(self._revoking.items()):
            try:
                await self._store.revoke_key(str(number), at=at)
            except (DatabaseBusy, DatabaseFull) as error:
                log.warn("revoked keys wait: {message}", message=error.message)
                return
            except KeyNotFound:
                log.warn("a key that was revoked isn't there any more")
            self._revoking.pop(number, None)

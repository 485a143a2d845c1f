"""API keys in memory: whose a key is, what it allows, and how fast.

The daemon looks keys up here and nowhere else while it answers requests; the
table in the store is read once, and both change together.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from math import ceil
from typing import NamedTuple

from tursi.errors import KeyRefused, RateLimited, StartingUp
from tursi.model import ALL_SCOPES, ApiKey, Caller, Scope

MARK = b"tursi_"
"""What a key begins with, so that it is known for one wherever it turns up."""
_KEY = re.compile(rb"tursi_([0-9]{1,18})_([0-9a-f]{64})")
_NOBODY = bytes(32)


class Secret(NamedTuple):
    """The secret part of a new key, and what is stored of it."""

    text: str
    digest: bytes


def new_secret() -> Secret:
    """256 random bits; that many need no slow hash."""
    text = secrets.token_hex(32)
    return Secret(text, sha256(text.encode("ascii")).digest())


def written(number: int, secret: Secret) -> str:
    """The whole key, as its owner sends it."""
    return f"tursi_{number}_{secret.text}"


def included(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """``scopes`` and all that they include."""
    given = frozenset(scopes)
    return ALL_SCOPES if Scope.ADMIN in given else given


class Bucket:
    """So much a minute, as much at once, and more only as time goes by."""

    __slots__ = ("_at", "_capacity", "_level")

    def __init__(self, per_minute: int, now: float) -> None:
        self._capacity = float(per_minute)
        self._level = self._capacity
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken; 0 if it may be now."""
        rate = self._capacity / 60
        self._level = min(self._capacity, self._level + (now - self._at) * rate)
        self._at = now
        # Of tokens it is known only afterwards how many they were, so all that is
        # asked for beforehand is that the last ones are paid.
        return max(0.0, (1 - self._level) / rate)

    def take(self, amount: int) -> None:
        """Take ``amount``, also if that is more than there is."""
        self._level -= amount


class Held:
    """One key that is valid."""

    __slots__ = ("deployments", "digest", "key", "requests", "scopes", "tokens")

    def __init__(self, key: ApiKey, digest: bytes, now: float) -> None:
        self.key = key
        self.digest = digest
        self.scopes = included(key.scopes)
        self.deployments = None if key.deployments is None else frozenset(key.deployments)
        self.requests = key.requests_per_minute and Bucket(key.requests_per_minute, now)
        self.tokens = key.tokens_per_minute and Bucket(key.tokens_per_minute, now)

    def caller(self, address: str | None, uid: int | None) -> Caller:
        """Who sends this key from there."""
        key = self.key
        return Caller(self.scopes, address, uid, key.id, key.name, self.deployments)


class Keyring:
    """Every valid key; ``seconds`` is monotonic time, ``now`` the time of day."""

    def __init__(self, seconds: Callable[[], float], now: Callable[[], float]) -> None:
        self._seconds = seconds
        self._now = now
        self._held: dict[int, Held] | None = None
        self._used: dict[int, float] = {}

    def load(self, keys: Iterable[tuple[ApiKey, bytes]]) -> None:
        """Hold these keys with their digests; until then no key is judged."""
        seconds = self._seconds()
        self._held = {key.id: Held(key, digest, seconds) for key, digest in keys}

    def add(self, key: ApiKey, digest: bytes) -> None:
        """Hold another key."""
        if self._held is not None:
            self._held[key.id] = Held(key, digest, self._seconds())

    def named(self, name: str) -> int | None:
        """The id of the valid key with this name or id."""
        for number, held in (self._held or {}).items():
            if name in {held.key.name, str(number)}:
                return number
        return None

    def drop(self, number: int) -> None:
        """The key isn't valid any more."""
        if self._held is not None:
            self._held.pop(number, None)

    def find(self, token: bytes) -> Held:
        """The key that ``token`` is, else ``KeyRefused``."""
        if self._held is None:
            raise StartingUp(retry_after=1)
        matched = _KEY.fullmatch(token)
        held = self._held.get(int(matched[1])) if matched else None
        # As long for an id that doesn't exist as for one that does.
        digest = sha256(matched[2] if matched else b"").digest()
        if not hmac.compare_digest(digest, held.digest if held else _NOBODY) or held is None:
            raise KeyRefused
        return held

    def admit(self, caller: Caller) -> None:
        """Count a request of ``caller``; ``RateLimited`` if it is one too many."""
        held = self._of(caller)
        if held is None:
            return
        self._used[held.key.id] = self._now()
        seconds = self._seconds()
        for bucket, what in ((held.requests, "requests"), (held.tokens, "tokens")):
            wait = bucket.wait(seconds) if bucket else 0.0
            if wait > 0:
                raise RateLimited(
                    f"The key {held.key.name!r} has used up its {what} for now; "
                    f"try again in {ceil(wait)} s.",
                    retry_after=ceil(wait),
                )
        if held.requests:
            held.requests.take(1)

    def charge(self, caller: Caller, tokens: int) -> None:
        """Count tokens that a request of ``caller`` has used."""
        held = self._of(caller)
        if held is not None and held.tokens:
            held.tokens.wait(self._seconds())
            held.tokens.take(tokens)

    def _of(self, caller: Caller) -> Held | None:
        if caller.key is None or self._held is None:
            return None
        return self._held.get(caller.key)

    # -- last used -----------------------------------------------------------------------

    def take_used(self) -> Mapping[int, float]:
        """When which keys were last used, of those that were since this was last asked."""
        used, self._used = self._used, {}
        return used

    def put_back(self, used: Mapping[int, float]) -> None:
        """They could not be stored."""
        self._used = {**used, **self._used}

    def up_to_date(self, key: ApiKey) -> ApiKey:
        """``key`` with its last use, stored or not."""
        at = self._used.get(key.id)
        return key if at is None else replace(key, last_used_at=at)

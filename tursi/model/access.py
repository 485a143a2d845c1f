"""Who may do what, and where they are let in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DEFAULT_PORT = 8430
"""The TCP port of the default inference listener on 127.0.0.1."""


class Role(StrEnum):
    """What a listener answers."""

    INFERENCE = "inference"
    HEALTH = "health"
    METRICS = "metrics"
    CONTROL = "control"


class Scope(StrEnum):
    """What a key allows; ``admin`` includes the others."""

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may do."""

    scopes: frozenset[Scope] = frozenset()
    """All that they may do, what one scope includes being listed too."""
    address: str | None = None
    """The client's IP address; ``None`` on a Unix socket."""
    uid: int | None = None
    """The user at the other end of a Unix socket."""
    key: int | None = None
    """Id of the API key, if one was sent."""
    key_name: str | None = None
    deployments: frozenset[str] | None = None
    """Names of the only deployments they may use; ``None`` means all."""

    @property
    def trusted(self) -> bool:
        """Whether they may read about this machine, the paths in its messages included."""
        return Scope.READ in self.scopes

    def __str__(self) -> str:
        """In words, for the history."""
        if self.key is not None:
            return f"key {self.key} ({self.key_name})"
        if self.uid is not None:
            return f"uid {self.uid}"
        return self.address or "unknown"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A bearer key that is to be made."""

    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    created_by: str
    deployments: tuple[str, ...] | None = None
    """Names of the only deployments it may use; ``None`` means all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A bearer key as it may be shown: without its secret."""

    id: int
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    created_by: str
    deployments: tuple[str, ...] | None = None
    """Names of the only deployments it may use; ``None`` means all."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    last_used_at: float | None = None
    revoked_at: float | None = None

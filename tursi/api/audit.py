"""The audit: every request that changes something is recorded here, the refused ones too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from tursi.api.endpoint import Contract
from tursi.api.fleet import Fleet
from tursi.api.request import Request
from tursi.errors import InternalError, TursiError
from tursi.faces.route import status_of
from tursi.model import AuditEntry, Role

log = Logger()

REFUSALS = 10
"""A minute that are recorded of those that got nowhere: strangers must not wash the audit out."""
_LONG = 200
_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})


class Audit:
    """Records into ``fleet``; ``now`` gives UTC epoch seconds, ``seconds`` monotonic ones."""

    def __init__(
        self, fleet: Fleet, now: Callable[[], float], seconds: Callable[[], float]
    ) -> None:
        self._fleet = fleet
        self._now = now
        self._seconds = seconds
        self._routes: Map | None = None
        self._actions: dict[str, str] = {}
        self._minute = 0.0
        self._refusals = 0
        self.dropped = 0
        """Refusals that were too many to be recorded."""

    def watch(self, routes: Map, handlers: Iterable[tuple[Contract, Callable[..., Any]]]) -> None:
        """Know the routes, by whose endpoints the actions are found."""
        self._routes = routes
        self._actions = {
            contract.name: action(contract, handler)
            for contract, handler in handlers
            if is_change(contract)
        }

    def refused(self, request: Request, method: bytes, target: bytes, error: TursiError) -> None:
        """Record a request that is refused by its headers alone, if it would change something."""
        if method in _SAFE or request.match is not None or self._routes is None:
            return
        path = target.partition(b"?")[0].decode("latin-1")
        try:
            name, parts = self._routes.bind("").match(path, method.decode("latin-1"))
        except HTTPException:
            return
        if name in self._actions:
            self._refused(request, self._actions[name], _target(parts), error)

    async def done(
        self,
        request: Request,
        contract: Contract,
        arguments: Mapping[str, object],
        status: int,
    ) -> None:
        """Record a change; returns when that is on the disk, or has to wait for it."""
        if contract.name in self._actions:
            await self._record(
                request, self._actions[contract.name], _target(arguments), status, None
            )

    def failed(
        self,
        request: Request,
        contract: Contract,
        arguments: Mapping[str, object],
        error: Exception,
    ) -> None:
        """Record that a change was asked for in vain."""
        if contract.name not in self._actions:
            return
        known = error if isinstance(error, TursiError) else InternalError()
        self._refused(request, self._actions[contract.name], _target(arguments), known)

    def _refused(self, request: Request, what: str, target: str | None, error: TursiError) -> None:
        status = status_of(error)
        if status in {401, 403, 429} and not self._may_record():
            self.dropped += 1
            return
        recording = self._record(request, what, target, status, error.code)
        Deferred.fromCoroutine(recording).addErrback(
            lambda failure: log.failure("the audit failed", failure)
        )

    def _may_record(self) -> bool:
        now = self._seconds()
        if now - self._minute >= 60:
            self._minute, self._refusals = now, 0
        self._refusals += 1
        return self._refusals <= REFUSALS

    async def _record(
        self, request: Request, what: str, target: str | None, status: int, code: str | None
    ) -> None:
        caller = request.caller
        await self._fleet.records.record(
            AuditEntry(
                id=0,
                at=self._now(),
                by=str(caller),
                action=what,
                target=target,
                status=status,
                code=code,
                request=request.request_id.decode("latin-1") or None,
                key=caller.key,
                uid=caller.uid,
                address=caller.address,
            )
        )


def is_change(contract: Contract) -> bool:
    """Whether requests of this contract are recorded."""
    return contract.role is Role.CONTROL and contract.method.encode() not in _SAFE


def action(contract: Contract, handler: Callable[..., Any]) -> str:
    """What it does in a word or two, such as ``deployments.stop``."""
    first = contract.path.split("/")[1]
    return first if handler.__name__ == first else f"{first}.{handler.__name__}"


def _target(arguments: Mapping[str, object]) -> str | None:
    """The name of what is changed; never more of the body."""
    for name in ("name", "id", "model"):
        value = arguments.get(name)
        if value is not None:
            return str(value)[:_LONG]
    return None

"""Downloads of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tursi.api.endpoint import endpoint, identity, jsonable
from tursi.api.fleet import Fleet
from tursi.api.messages import PullBody, PullList, PullQuery
from tursi.api.stream import Follow
from tursi.errors import PullNotFound
from tursi.model import PullStatus, Role, Trust

_CONTROL: dict[str, Any] = {"role": Role.CONTROL}
_ACCEPTED: dict[str, Any] = {**_CONTROL, "reply": PullStatus, "statuses": (202,)}


class PullControl:
    """Handlers under ``/pulls``."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @endpoint("GET", "/pulls", reply=PullList, **_CONTROL)
    async def list(self) -> PullList:
        """List the downloads that have not ended, and the latest others."""
        return PullList(await self._fleet.pulls.newest())

    @endpoint("POST", "/pulls", body=PullBody, **_ACCEPTED)
    async def start(
        self, model: str, allow_pickle: bool | None, trust_remote_code: bool | None, by: str
    ) -> PullStatus:
        """Download a model of the hub, or go on with that; it survives a restart."""
        trust = Trust(bool(allow_pickle), bool(trust_remote_code))
        return await self._fleet.pulls.start(model, trust, by)

    @endpoint(
        "GET", "/pulls/<number>", query=PullQuery, reply=PullStatus, follow=PullStatus, **_CONTROL
    )
    async def show(self, number: str, follow: bool) -> PullStatus | Follow[PullStatus]:
        """Show how the download goes."""
        found = _number(number)
        status = await self._fleet.pulls.one(found)
        if not follow:
            return status

        async def history() -> Sequence[PullStatus]:
            return [await self._fleet.pulls.one(found)]

        return Follow(
            subscribe=lambda callback: self._fleet.pulls.watch(found, callback),
            history=history,
            unseen=lambda _, early: early,
            encode=_event,
            last=lambda status: status.ended_at is not None,
        )

    @endpoint("POST", "/pulls/<number>/pause", **_ACCEPTED)
    async def pause(self, number: str, by: str) -> PullStatus:
        """Stop the download; what has arrived is kept."""
        return await self._fleet.pulls.pause(_number(number), by)

    @endpoint("POST", "/pulls/<number>/resume", **_ACCEPTED)
    async def resume(self, number: str, by: str) -> PullStatus:
        """Go on with a download that was paused."""
        return await self._fleet.pulls.resume(_number(number), by)

    @endpoint("DELETE", "/pulls/<number>", **_ACCEPTED)
    async def cancel(self, number: str, by: str) -> PullStatus:
        """Give the download up."""
        return await self._fleet.pulls.cancel(_number(number), by)


def _number(text: str) -> int:
    found = identity(text)
    if found is None:
        raise PullNotFound(f"{text[:50]!r} is no pull's id; `tursi pulls` lists those there are.")
    return found


def _event(status: PullStatus) -> bytes:
    return b"data: " + msgspec.json.encode(jsonable(status)) + b"\n\n"

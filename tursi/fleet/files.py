"""The files of deployments: found on the disk or fetched, and fetched again when they are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure

from tursi.errors import FetchError, InternalError, TursiError
from tursi.fleet import retries
from tursi.fleet.journal import Journal
from tursi.fleet.member import Fetch, Member
from tursi.hub import Hub
from tursi.model import FailureClass, Progress, Reference, Resolution
from tursi.store import Store
from tursi.supervision.worker import Worker

log = Logger()


class Files:
    """Finds what members are to load; ``soon`` is called when something has come of that.

    ``now`` gives UTC epoch seconds.
    """

    def __init__(
        self,
        *,
        store: Store,
        hub: Hub,
        journal: Journal,
        reactor: Any,
        now: Callable[[], float],
        soon: Callable[[], None],
    ) -> None:
        self._store = store
        self._hub = hub
        self._journal = journal
        self._reactor = reactor
        self._now = now
        self._soon = soon

    def find(self, member: Member, generation: int) -> None:
        """Look for the files of a generation, or download them, unless that goes on already."""
        fetch = member.fetch
        if fetch is None:
            fetch = member.fetch = Fetch(generation)
        elif fetch.running is not None or fetch.error is not None:
            return
        request = member.deployment.generation.request
        reference = Reference.parse(request.model)
        known = member.deployment.generation.resolution
        if known is not None and known.commit is not None:
            # What it was, whatever the name means by now.
            reference = replace(reference, revision=known.commit)

        def advanced(progress: Progress) -> None:
            fetch.advance(progress, self._reactor.seconds())

        # Held before its callbacks are added: they may run at once.
        fetch.running = running = self._hub.resolve(reference, advanced, request.trust)
        running.addCallbacks(
            lambda resolution: self._resolved(member, fetch, resolution),
            lambda failure: self._unresolved(member, fetch, failure),
        )

    def _resolved(self, member: Member, fetch: Fetch, resolution: Resolution) -> None:
        fetch.running = None
        if member.fetch is fetch:
            member.fetch = None
            member.lost = False
            self.learn(member, resolution)
            self._soon()

    def learn(self, member: Member, resolution: Resolution) -> None:
        """Remember, also in the store, what the current generation means."""
        deployment = member.deployment
        number = deployment.generation.number
        member.deployment = replace(
            deployment, generation=replace(deployment.generation, resolution=resolution)
        )
        at = self._now()
        self._journal.hold(lambda: self._store.resolve(deployment.name, number, resolution, at=at))

    def _unresolved(self, member: Member, fetch: Fetch, failure: Failure) -> None:
        fetch.running = None
        if failure.check(CancelledError) or member.fetch is not fetch:
            return
        name, error = member.deployment.name, failure.value
        if not isinstance(error, TursiError):
            log.failure("finding the files of {name} failed", failure, name=name)
            error = InternalError(f"Finding the model's files failed: {error}")
        fetch.error = error
        message = f"the files of {name} can't be had"
        if isinstance(error, FetchError) and error.passing:
            delay = retries.delay(fetch.attempts, error.retry_after)
            fetch.attempts += 1
            fetch.retry_at = self._now() + delay
            message += f"; the next try is in {delay:.0f} s"
            fetch.timer = self._reactor.callLater(delay, self._fetch_again, fetch)
        self._journal.note("fetch.failed", message, deployment=name, cause=error.message)
        member.queue.pump()

    def _fetch_again(self, fetch: Fetch) -> None:
        fetch.timer = fetch.error = fetch.retry_at = None
        self._soon()

    def reconsider(self, member: Member) -> None:
        """Look again for what could not be had: with other settings it may."""
        fetch = member.fetch
        if fetch is not None and fetch.error is not None:
            fetch.cancel()
            self._fetch_again(fetch)

    def look_again(self, member: Member, worker: Worker) -> None:
        """Have files of the hub fetched again that were there and are gone."""
        generation = member.deployment.generation
        resolution = generation.resolution
        if (
            resolution is None
            or resolution.commit is None
            or worker.generation != generation.number
            or worker.status().failure is not FailureClass.NOT_FOUND
        ):
            return

        def looked(lacks: bool) -> None:
            if lacks and member.deployment.generation == generation and not member.lost:
                member.lost = True
                name = member.deployment.name
                self._journal.note(
                    "files.lost",
                    f"the files of {name} are gone from the disk; they are fetched again",
                    deployment=name,
                )
                self._soon()

        self._hub.lacks(resolution).addCallbacks(
            looked, lambda failure: log.warn("{error}", error=failure.getErrorMessage())
        )

"""The worker's main thread: waits on the socket and on signals, never computes.

So a PING is answered while the model computes, and the end of the daemon ends
the worker whatever it is doing.
"""

from __future__ import annotations

import gc
import os
import queue
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tursi import wire
from tursi.errors import AcceleratorLost, LoadError, RouteNotFound, ShuttingDown
from tursi.faces.route import Table
from tursi.heartbeat import Operation, Pulse, Writer
from tursi.inference.connection import Connection
from tursi.inference.imports import hide
from tursi.inference.job import Job
from tursi.inference.outbox import Outbox
from tursi.inference.readahead import Readahead, weight_files
from tursi.inference.scheduler import Scheduler, StickyError
from tursi.model import LoadOrder, Progress
from tursi.wire import Frame, Kind, LastWords

_STAGES = {"import": Operation.IMPORT, "warm": Operation.WARM}
"""What isn't named here is part of loading."""
_ORDER = msgspec.msgpack.Decoder(LoadOrder)


class Worker:
    """One model behind one connection."""

    def __init__(
        self,
        connection: Connection,
        table: Table,
        page: Writer,
        pulse: Pulse,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._table = table
        self._page = page
        self._pulse = pulse
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._arrivals: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outbox = Outbox(connection.send, self._ended)
        """Of the main thread, for what never reaches the compute thread."""
        self._compute: threading.Thread | None = None
        self._ready = False
        self._draining = False
        self._status: int | None = None
        self._wakeup, self._waker = socket.socketpair()

    def run(self) -> int:
        """Serve; the exit status once everything is done. Call it in the main thread."""
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._terminated)
        # Ctrl-C in the daemon's terminal is for the daemon.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            while self._status is None:
                for key, _ in selector.select():
                    if key.fileobj is self._wakeup:
                        self._wakeup.recv(4096)
                        continue
                    frames = self._connection.receive()
                    if frames is None:
                        # The daemon is gone, as in Connection.send.
                        os._exit(0)
                    for frame in frames:
                        self._received(frame)
        return self._status

    def _received(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.REQUEST:
                self._request(frame)
            case Kind.CANCEL:
                job = self._jobs.get(frame.id)
                if job is not None:
                    job.cancelled = True
            case Kind.PING:
                self._connection.send(wire.encode(Kind.PONG, frame.id))
            case Kind.SHUTDOWN:
                self._drain()
            case Kind.LOAD:
                self._load(frame)
            case _:
                raise wire.WireError(f"the daemon sent a frame of kind {frame.kind}")

    def _load(self, frame: Frame) -> None:
        if self._compute is not None:
            raise wire.WireError("the daemon sent a second LOAD")
        order = _ORDER.decode(frame.body)
        self._pulse.beat_every(order.beat_seconds)
        self._compute = threading.Thread(
            target=self._serve, args=(order,), name="compute", daemon=True
        )
        self._compute.start()

    def _request(self, frame: Frame) -> None:
        ask = wire.decode_ask(frame.body)
        route = self._table.named(ask.route)
        if route is None:
            # The daemon took the route from the same table: versions differ.
            error = RouteNotFound(f"The worker doesn't know the route {ask.route!r}.")
            end = wire.encode_end(wire.End(wire.NO_USAGE, error.code))
            self._connection.send(wire.encode(Kind.END, frame.id, end))
            return
        job = Job(id=frame.id, ask=ask, route=route, arrived=self._clock())
        self._jobs[job.id] = job
        if self._draining:
            self._outbox.fail(job, ShuttingDown("The worker is stopping.", retry_after=1))
            self._outbox.flush()
            return
        self._arrivals.put(job)

    def _ended(self, job: Job) -> None:
        self._jobs.pop(job.id, None)

    def _terminated(self, *_: Any) -> None:
        self._drain()

    def _drain(self) -> None:
        """Finish what is here and end with status 0."""
        if self._draining:
            return
        self._draining = True
        if self._ready:
            self._arrivals.put(None)
        else:
            self._end(0)

    def _end(self, status: int) -> None:
        self._status = status
        self._waker.send(b"\0")

    def _progress(self, progress: Progress) -> None:
        self._page.begin(_STAGES.get(progress.stage, Operation.LOAD))
        self._connection.send(wire.encode(Kind.PROGRESS, 0, msgspec.msgpack.encode(progress)))

    def _serve(self, order: LoadOrder) -> None:
        """The compute thread."""
        self._pulse.watch()
        # What is imported and loaded stays: to look for garbage in it takes a quarter of the time.
        gc.disable()
        readahead = Readahead(weight_files(Path(order.folder)))
        readahead.start()
        try:
            self._progress(Progress("import"))
            hide(order)
            from tursi.inference.loader import load

            outbox = Outbox(self._connection.send, self._ended)
            engine, loaded = load(order, outbox, self._page, self._progress, self._clock, readahead)
            gc.freeze()
            gc.enable()
            self._ready = True
            ready = msgspec.msgpack.encode(loaded)
            self._connection.send(wire.encode(Kind.READY, 0, ready))
            scheduler = Scheduler(
                arrivals=self._arrivals,
                engine=engine,
                outbox=outbox,
                page=self._page,
                deployment=order.deployment,
                clock=self._clock,
            )
            self._end(scheduler.run())
        except StickyError as error:
            lost = AcceleratorLost(
                f"The accelerator is lost to this process: {_sentence(error.__cause__ or error)}"
            )
            self._failed(lost.code, lost.message, traceback.format_exc())
            self._end(lost.exit_status)
        except LoadError as error:
            self._failed(error.code, error.message, traceback.format_exc())
            self._end(error.exit_status)
        except BaseException as error:  # noqa: BLE001 - the last words of the process, whatever it is
            traceback.print_exc()
            self._failed(LoadError.code, _sentence(error), traceback.format_exc())
            self._end(LoadError.exit_status)

    def _failed(self, code: str, message: str, trace: str) -> None:
        words = LastWords(code=code, message=message, traceback=trace[-16_384:])
        self._connection.send(wire.encode(Kind.FAILED, 0, msgspec.msgpack.encode(words)))


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]

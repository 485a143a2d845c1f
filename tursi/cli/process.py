"""The daemon's process, seen from the command line: found, started, ended, cleared away."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NoReturn

from tursi import instance, mark
from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.terminal import note
from tursi.errors import AlreadyRunning, TursiError
from tursi.instance import Instance
from tursi.lock import StateLock
from tursi.model import Folders, folders

TWISTD = Path(sys.executable).with_name("twistd")
START_SECONDS = 600.0
"""How long the daemon may take until it serves: an upgrade of a large database takes its time."""
STOP_SECONDS = 75.0
"""How long one may take to stop that hasn't said how long."""
GRACE_SECONDS = 5.0
"""It ends by itself when its time is over; only then it is killed."""
KILL_SECONDS = 10.0
ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05
_ALREADY_RUNNING = 75
_IGNORED = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Service(NamedTuple):
    """Where a daemon is, or would be."""

    places: Folders
    connection: Connection

    @property
    def lock(self) -> StateLock:
        """Who holds it, runs."""
        return StateLock(self.places.state)

    @property
    def said(self) -> Instance | None:
        """What the daemon that runs, or ran, says of itself."""
        return instance.read_status(self.places.status_file)

    def holder(self) -> int | None:
        """The pid of the daemon, ``None`` if there is none; ``Failure`` if that can't be told."""
        try:
            return self.lock.holder()
        except (TursiError, OSError) as error:
            raise Failure(
                f"It can't be told whether Tursi runs: {getattr(error, 'message', error)}"
            ) from None


def find(
    connection: Connection,
    *,
    state: Path | None = None,
    runtime: Path | None = None,
    cache: Path | None = None,
) -> Service:
    """The daemon that the command line means: by the folders named, or else by its socket."""
    places = folders(os.environ, os.getuid())
    if state is None and runtime is None:
        runtime = connection.socket.parent
    if state is None and runtime is not None:
        # A daemon that runs there says where the rest is.
        said = instance.read_status(places.moved(runtime=runtime).status_file)
        if said is not None:
            places = replace(places, state=Path(said.state), cache=Path(said.cache))
    places = places.moved(state=state, runtime=runtime, cache=cache)
    if connection.socket.parent != places.runtime:
        connection = Connection(places.socket)
    return Service(places, connection)


def launch(options: list[str]) -> None:
    """Run twistd; ``Failure`` in its own words if that can't be."""
    command = [str(TWISTD), "--umask=027", "--rundir=/", "tursi", *options]
    try:
        with _ignored():
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=START_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise Failure(
            f"The daemon has not started within {START_SECONDS:.0f} s; see its log.",
            Exit.TRY_LATER,
        ) from None
    except OSError as error:
        raise Failure(f"{TWISTD} can't be run: {error.strerror}.") from None
    # Another may have been quicker, which is as good.
    if done.returncode not in {0, _ALREADY_RUNNING}:
        own = [text for text in done.stderr.splitlines() if text.startswith("tursi: ")]
        rest = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        raise Failure(own[-1].removeprefix("tursi: ") if own else f"twistd failed: {rest[0]}")


@contextmanager
def _ignored() -> Iterator[None]:
    """Start a process that no signal kills before it knows what to do about it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until_it_serves(service: Service) -> int:
    """The pid of the daemon, once it answers; ``Failure`` if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            return int(
                service.connection.call("GET", "/status", seconds=ANSWER_SECONDS).body["pid"]
            )
        except Failure as error:
            if error.exit_code not in {Exit.NO_DAEMON, Exit.TRY_LATER}:
                raise
        if service.holder() is None:
            said = service.said
            where = said.log if said is not None and said.log else service.places.log
            raise Failure(f"The daemon has ended by itself; its log {where} says why.")
        time.sleep(POLL_SECONDS)
    raise Failure(
        f"The daemon doesn't serve after {START_SECONDS:.0f} s; it goes on starting.",
        Exit.TRY_LATER,
    )


def end(service: Service, pid: int) -> bool:
    """End the daemon; whether it did so by itself."""
    if not pid:
        raise Failure("Tursi runs, but its pid isn't known; try again in a moment.", Exit.TRY_LATER)
    said = service.said
    seconds = said.stop_seconds if said is not None and said.pid == pid else STOP_SECONDS
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # From here on the number can't come to mean another process unnoticed.
        if service.holder() != pid:
            return True
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if _ended(process, 1.0):
            return True
        note(f"Waiting for what is in flight (at most {seconds:.0f} s) ...")
        if _ended(process, seconds + GRACE_SECONDS):
            return True
        signal.pidfd_send_signal(process, signal.SIGKILL)
        if not _ended(process, KILL_SECONDS):
            raise Failure(f"Tursi (pid {pid}) can't be killed; the kernel holds it.")
    except ProcessLookupError:
        return True
    except PermissionError:
        _forbidden(pid)
    finally:
        os.close(process)
    return False


def _forbidden(pid: int) -> NoReturn:
    raise Failure(f"You may not stop Tursi (pid {pid}); do it as the user that it runs as.")


def _ended(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])


def clear_workers(state: Path) -> None:
    """See to it that none is left; they end by themselves when the daemon has ended."""
    ours = mark.of_state(state)
    deadline = time.monotonic() + KILL_SECONDS
    while (left := [*mark.bearers(ours)]) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for pid, _ in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def clean(service: Service) -> None:
    """Remove what a killed daemon has left, unless another runs by now."""
    if not service.places.state.is_dir():
        return
    lock = service.lock
    with suppress(AlreadyRunning, TursiError, OSError):
        lock.acquire()
        for path in (
            service.places.pid_file,
            service.places.status_file,
            service.places.socket,
        ):
            instance.remove(path)
        lock.release()

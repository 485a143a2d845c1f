"""The daemon as a service: starting, stopping, reloading, and telling whether it runs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from tursi import instance, mark
from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, local_time, note, table
from tursi.errors import AlreadyRunning, TursiError
from tursi.instance import Instance
from tursi.lock import StateLock
from tursi.model import Containment, Folders, folders

TWISTD = Path(sys.executable).with_name("twistd")
START_SECONDS = 600.0
"""How long the daemon may take until it serves: an upgrade of a large database takes its time."""
STOP_SECONDS = 75.0
"""How long one may take to stop that hasn't said how long."""
GRACE_SECONDS = 5.0
"""It ends by itself when its time is over; only then it is killed."""
KILL_SECONDS = 10.0
ANSWER_SECONDS = 5.0
RELOAD_SECONDS = 120.0
_POLL_SECONDS = 0.05
_LETTING_GO_SECONDS = 1.0
_ALREADY_RUNNING = 75
_IGNORED = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

# What /etc/init.d scripts answer to "status" (LSB).
RUNS, DEAD_WITH_PID_FILE, DEAD_WITH_LOCK, STOPPED, UNKNOWN = range(5)


def _options(*names: str) -> Callable[[Any], Any]:
    helps = {
        "config": "Configuration file.",
        "state": "Folder of the database and logs.",
        "runtime": "Folder of the control socket.",
        "cache": "Folder of downloaded models.",
    }

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = click.option(f"--{name}", type=click.Path(path_type=Path), help=helps[name])(
                command
            )
        return command

    return decorate


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


def _service(
    connection: Connection,
    *,
    state: Path | None = None,
    runtime: Path | None = None,
    cache: Path | None = None,
) -> Service:
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


# -- commands ---------------------------------------------------------------------


@click.command()
@_options("config", "state", "runtime", "cache")
@as_json
@click.pass_obj
def start(
    connection: Connection, /, *, json: bool, config: Path | None, **chosen: Path | None
) -> None:
    """Start the daemon in the background, and wait until it serves."""
    service = _service(connection, **chosen)
    _start(service, config, json=json)


@click.command()
@_options("state", "runtime")
@as_json
@click.pass_obj
def stop(connection: Connection, /, *, json: bool, **chosen: Path | None) -> None:
    """Stop the daemon; what is in flight is finished first."""
    _stop(_service(connection, **chosen), json=json)


@click.command()
@_options("config", "state", "runtime", "cache")
@as_json
@click.pass_obj
def restart(
    connection: Connection, /, *, json: bool, config: Path | None, **chosen: Path | None
) -> None:
    """Stop the daemon if it runs, and start it."""
    service = _service(connection, **chosen)
    said = service.said
    if service.holder() is not None and said is not None:
        if said.foreground:
            raise Failure(
                f"The daemon (pid {said.pid}) runs in the foreground, under a service manager or "
                "in a terminal; restart it there."
            )
        if config is None and said.configuration is not None:
            config = Path(said.configuration)
    _stop(service, json=False, quiet=json)
    _start(service, config, json=json)


@click.command()
@_options("state", "runtime")
@as_json
@click.pass_obj
def reload(connection: Connection, /, *, json: bool, **chosen: Path | None) -> None:
    """Have the daemon read its configuration again, and tell what has changed."""
    service = _service(connection, **chosen)
    found = service.connection.call("POST", "/reload", seconds=RELOAD_SECONDS).body
    if json:
        dump(found)
        return
    line(f"Changed: {', '.join(found['changed'])}." if found["changed"] else "Nothing has changed.")
    if found["rolled"]:
        line(f"New workers replace those of: {', '.join(found['rolled'])}.")


@click.command()
@_options("state", "runtime")
@as_json
@click.pass_context
def status(context: click.Context, /, *, json: bool, **chosen: Path | None) -> None:
    """Show how the daemon is; the exit status tells whether it runs."""
    service = _service(context.obj, **chosen)
    try:
        found = service.connection.call("GET", "/status", seconds=ANSWER_SECONDS).body
    except Failure as error:
        code, message = _silent(service, error)
        if json:
            dump({"running": code == RUNS, "message": message})
        else:
            note(f"tursi: {message}")
        context.exit(code)
    if json:
        dump(found)
        return
    if "containment" in found:
        found["containment"] = str(Containment(**found["containment"]))
    rows = [(key.replace("_", " "), each) for key, value in found.items() for each in _shown(value)]
    rows = [(key, local_time(value) if key == "started at" else value) for key, value in rows]
    table(("DAEMON", str(service.connection.socket)), rows)


def _silent(service: Service, error: Failure) -> tuple[int, str]:
    """What it means that the daemon doesn't say how it is."""
    if error.code == "starting_up":
        return RUNS, "Tursi is starting."
    deadline = time.monotonic() + _LETTING_GO_SECONDS
    try:
        # A process that has just been killed holds its lock until its last thread is gone.
        while (pid := service.holder()) is not None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    except Failure as unknown:
        return UNKNOWN, unknown.message
    if pid is not None:
        return UNKNOWN, f"Tursi runs (pid {pid or 'unknown'}) but doesn't answer: {error.message}"
    if service.places.pid_file.exists() and service.places.pid_file.read_bytes():
        return DEAD_WITH_PID_FILE, (
            f"Tursi ended without saying so; its PID file {service.places.pid_file} is still there."
        )
    if service.lock.last() is not None:
        return DEAD_WITH_LOCK, (
            f"Tursi ended without saying so; its lock in {service.places.state} is still there."
        )
    return STOPPED, f"Tursi isn't running. {error.message}"


# -- starting -----------------------------------------------------------------------


def _start(service: Service, configuration: Path | None, *, json: bool) -> None:
    running = service.holder()
    if running is None:
        usual = folders(os.environ, os.getuid())
        options = {
            name: getattr(service.places, name)
            for name in ("state", "runtime", "cache")
            if getattr(service.places, name) != getattr(usual, name)
        }
        if configuration is not None:
            options["config"] = configuration.absolute()
        _launch([f"--{name}={path}" for name, path in options.items()])
    pid = _wait_until_it_serves(service)
    said = service.said
    listeners = [*said.listeners] if said is not None else []
    if json:
        outcome = "started" if running is None else "already running"
        dump({"outcome": outcome, "pid": pid, "listeners": listeners})
    elif running is not None:
        line(f"Tursi is already running (pid {pid}).")
    else:
        line(f"Tursi runs (pid {pid}) and listens on {', '.join(listeners)}.")


def _launch(options: list[str]) -> None:
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


def _wait_until_it_serves(service: Service) -> int:
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
        time.sleep(_POLL_SECONDS)
    raise Failure(
        f"The daemon doesn't serve after {START_SECONDS:.0f} s; it goes on starting.",
        Exit.TRY_LATER,
    )


# -- stopping -----------------------------------------------------------------------


def _stop(service: Service, *, json: bool, quiet: bool = False) -> None:
    pid = service.holder()
    if pid is None:
        outcome, message = "not running", "Tursi isn't running."
    elif _end(service, pid):
        outcome, message = "stopped", f"Tursi (pid {pid}) has stopped."
    else:
        outcome = "killed"
        message = f"Tursi (pid {pid}) did not stop in time and was killed; nothing is lost."
    _clear_workers(service.places.state)
    _clean(service)
    if json:
        dump({"outcome": outcome, "pid": pid})
    elif not quiet:
        line(message)


def _end(service: Service, pid: int) -> bool:
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


def _clear_workers(state: Path) -> None:
    """See to it that none is left; they end by themselves when the daemon has ended."""
    ours = mark.of_state(state)
    deadline = time.monotonic() + KILL_SECONDS
    while (left := [*mark.bearers(ours)]) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for pid, _ in left:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _clean(service: Service) -> None:
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


def _shown(value: Any) -> list[str]:
    """A value of the status as lines."""
    if isinstance(value, list):
        return [text for each in value for text in _shown(each)]
    if isinstance(value, dict):
        if "endpoint" in value:
            return [f"{value['endpoint']} ({', '.join(value.get('roles', []))})"]
        return [", ".join(f"{key} {each}" for key, each in value.items())]
    return [str(value)]

"""The daemon as a service: starting, stopping, reloading, and telling whether it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tursi.cli.connection import Connection, Failure
from tursi.cli.options import as_json
from tursi.cli.process import (
    ANSWER_SECONDS,
    POLL_SECONDS,
    Service,
    clean,
    clear_workers,
    end,
    find,
    launch,
    wait_until_it_serves,
)
from tursi.cli.terminal import dump, line, local_time, note, table
from tursi.errors import ConfigurationError
from tursi.model import Containment, Folders, folders

RELOAD_SECONDS = 120.0
_LETTING_GO_SECONDS = 1.0

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
            command = click.option(
                f"--{name}", type=click.Path(path_type=Path, readable=False), help=helps[name]
            )(command)
        return command

    return decorate


# -- commands ---------------------------------------------------------------------


@click.command()
@_options("config", "state", "runtime", "cache")
@as_json
@click.pass_obj
def start(
    connection: Connection, /, *, json: bool, config: Path | None, **chosen: Path | None
) -> None:
    """Start the daemon in the background, and wait until it serves."""
    service = find(connection, **chosen)
    _start(service, config, json=json)


@click.command()
@_options("state", "runtime")
@as_json
@click.pass_obj
def stop(connection: Connection, /, *, json: bool, **chosen: Path | None) -> None:
    """Stop the daemon; what is in flight is finished first."""
    _stop(find(connection, **chosen), json=json)


@click.command()
@_options("config", "state", "runtime", "cache")
@as_json
@click.pass_obj
def restart(
    connection: Connection, /, *, json: bool, config: Path | None, **chosen: Path | None
) -> None:
    """Stop the daemon if it runs, and start it."""
    service = find(connection, **chosen)
    said = service.said
    if service.holder() is not None and said is not None:
        if said.foreground:
            raise Failure(
                f"The daemon (pid {said.pid}) runs in the foreground, under a service manager or "
                "in a terminal; restart it there."
            )
        if config is None and said.configuration is not None:
            config = Path(said.configuration)
        _check(config, service.places)
    _stop(service, json=False, quiet=json)
    _start(service, config, json=json)


@click.command()
@_options("state", "runtime")
@as_json
@click.pass_obj
def reload(connection: Connection, /, *, json: bool, **chosen: Path | None) -> None:
    """Have the daemon read its configuration again, and tell what has changed."""
    service = find(connection, **chosen)
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
    service = find(context.obj, **chosen)
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
        dump({"running": True, **found})
        return
    if "containment" in found:
        found["containment"] = str(Containment(**found["containment"]))
    rows = [(key.replace("_", " "), each) for key, value in found.items() for each in _shown(value)]
    rows = [(key, local_time(value) if key == "started at" else value) for key, value in rows]
    table(("DAEMON", service.connection.place), rows)


def _silent(service: Service, error: Failure) -> tuple[int, str]:
    """What it means that the daemon doesn't say how it is."""
    if error.code == "starting_up":
        return RUNS, "Tursi is starting."
    if service.connection.url:
        # Of another machine, its lock says nothing here.
        return UNKNOWN, error.message
    deadline = time.monotonic() + _LETTING_GO_SECONDS
    try:
        # A process that has just been killed holds its lock until its last thread is gone.
        while (pid := service.holder()) is not None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
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
    # What is started is on this machine, wherever a URL leads.
    service = service._replace(connection=Connection(service.connection.socket))
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
        launch([f"--{name}={path}" for name, path in options.items()])
    pid = wait_until_it_serves(service)
    said = service.said
    listeners = [*said.listeners] if said is not None else []
    if json:
        outcome = "started" if running is None else "already running"
        dump({"outcome": outcome, "pid": pid, "listeners": listeners})
    elif running is not None:
        line(f"Tursi is already running (pid {pid}).")
    else:
        line(f"Tursi runs (pid {pid}) and listens on {', '.join(listeners)}.")


def _check(configuration: Path | None, places: Folders) -> None:
    """Whoever can't be started again is not stopped."""
    # Late: other commands needn't wait for it.
    from tursi import config

    try:
        config.load(configuration, places.configuration)
    except ConfigurationError as error:
        raise Failure(f"{error.message} The daemon goes on as it was.") from None


# -- stopping -----------------------------------------------------------------------


def _stop(service: Service, *, json: bool, quiet: bool = False) -> None:
    pid = service.holder()
    if pid is None:
        outcome, message = "not running", "Tursi isn't running."
    elif end(service, pid):
        outcome, message = "stopped", f"Tursi (pid {pid}) has stopped."
    else:
        outcome = "killed"
        message = f"Tursi (pid {pid}) did not stop in time and was killed; nothing is lost."
    clear_workers(service.places.state)
    clean(service)
    if json:
        dump({"outcome": outcome, "pid": pid})
    elif not quiet:
        line(message)


def _shown(value: Any) -> list[str]:
    """A value of the status as lines."""
    if isinstance(value, list):
        return [text for each in value for text in _shown(each)]
    if isinstance(value, dict):
        if "endpoint" in value:
            return [f"{value['endpoint']} ({', '.join(value.get('roles', []))})"]
        return [", ".join(f"{key} {each}" for key, each in value.items())]
    return [str(value)]

"""Supervision compared: Tursi, supervisord and a plain restart loop, with the same worker.

Run: ``python benchmarks/supervision.py --peer-python PYTHON`` where PYTHON has the
packages of ``benchmarks/peers/requirements.txt``. All three run at the same time, with
idle workers. Their processors' time and memory at rest are taken first, then one
worker after the other is killed (``kill -9``) under each in turn. Last, each starts a
program that ends at once, as often as it can.

What a worker takes from its start until it is ready is measured by itself in between,
and taken off, and so is the delay that each supervisor had decided on.

The plain loop stands for ``Restart=always`` of systemd, which can't be run beside what
the machine itself runs: it waits for its children, and starts them again after a second.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from supervisors import (  # noqa: E402 - found by the line above
    WORKER,
    Death,
    Plain,
    Supervisor,
    Supervisord,
    peer,
    plain_command,
    supervisord_command,
    tursi,
)

from tursi import wire  # noqa: E402 - with the above
from tursi.model import LoadOrder  # noqa: E402 - the same

SCRIPTED = (sys.executable, "-I", "-u", str(HERE.parent / "tests" / "scripted_worker.py"))
ENDS_AT_ONCE = "/bin/true"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30.0, help="at rest")
    # The daemon pauses all starts when more than 20 workers die within a minute.
    parser.add_argument("--deaths", type=int, default=15, choices=range(1, 21), metavar="1-20")
    parser.add_argument("--rounds", type=int, default=3, help="of starting as often as possible")
    parser.add_argument("--quick", action="store_true", help="few workers, for a short time")
    options = parser.parse_args()
    # Absolute, but no link followed: it is the link that belongs to an environment.
    options.peer_python = str(Path(options.peer_python).absolute())
    if options.quick:
        options.workers, options.seconds, options.deaths, options.rounds = 10, 5.0, 3, 1
    with ExitStack() as opened:
        running: list[Supervisor] = [opened.enter_context(tursi(options.workers))]
        for make in (
            lambda folder: Supervisord(folder, options.workers, options.peer_python),
            lambda folder: Plain(folder, options.workers),
        ):
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="peer-")))
            running.append(opened.enter_context(peer(make(folder))))
        print(f"{options.workers} idle workers each, on {os.cpu_count()} cores")
        rest(running, options.seconds)
        print(f"\n{options.deaths} workers killed, one after the other: ms, median (range)")
        deaths(running, options.deaths)
    print(f"\n{ENDS_AT_ONCE} as often as possible, {options.rounds} rounds: median (range)")
    cycles(options.peer_python, options.rounds, 2.0 if options.quick else 4.0)


# -- at rest ----------------------------------------------------------------------------


def rest(running: Sequence[Supervisor], seconds: float) -> None:
    """Processor time (of a core) and memory of each while nothing happens.

    Helpers are Tursi's keepers, whose processor time counts as the daemon's. What
    the heartbeats take is in the time of a worker, which beats under all three.
    """
    time.sleep(seconds / 5)
    groups = [([one.process], one.helpers(), one.workers()) for one in running]
    before = [[processor(group) for group in groups_] for groups_ in groups]
    began = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    after = [[processor(group) for group in groups_] for groups_ in groups]
    row("", "CPU, %", "of a worker, %", "RSS, MB", "PSS, MB", "of a helper: RSS", "PSS")
    for one, earlier, later, (_, helpers, workers) in zip(
        running, before, after, groups, strict=True
    ):
        used = [100 * (b - a) / elapsed for a, b in zip(earlier, later, strict=True)]
        sizes = (*memory([one.process]), *memory(helpers))
        row(
            one.name,
            f"{used[0] + used[1]:.3f}",
            f"{used[2] / len(workers):.3f}",
            *(f"{size / 1e6:.1f}" for size in sizes),
        )


def processor(processes: Iterable[psutil.Process]) -> float:
    """Seconds that all their threads have been on a processor, to the nanosecond."""
    return sum(
        int(schedstat.read_text().split()[0]) / 1e9
        for process in processes
        for schedstat in Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    )


def memory(processes: Sequence[psutil.Process]) -> tuple[float, float]:
    """RSS and PSS of one of them, on average; what is shared counts in parts in the second."""
    infos = [process.memory_full_info() for process in processes]
    count = max(len(infos), 1)
    return sum(info.rss for info in infos) / count, sum(info.pss for info in infos) / count


# -- deaths ---------------------------------------------------------------------------------


def deaths(running: Sequence[Supervisor], count: int) -> None:
    """From a ``kill -9`` to what follows."""
    found: dict[str, list[Death]] = {one.name: [] for one in running}
    loads: dict[str, list[float]] = {"ours": [], "peers": []}
    for number in range(count):
        for one in running:
            found[one.name].append(one.kill(number))
        loads["ours"].append(load_alone())
        loads["peers"].append(load_of_peer())
    row("", "noticed", "client told", "ready again", "delay of it", "load of it", "overhead")
    for name, ends in found.items():
        load = statistics.median(loads["ours" if name == "tursi" else "peers"])
        told = [1e3 * death.told for death in ends if death.told is not None]
        row(
            name,
            spread([1e3 * death.noticed for death in ends]),
            spread(told) if told else "",
            spread([1e3 * death.ready for death in ends]),
            spread([1e3 * death.delay for death in ends]),
            f"{1e3 * load:.0f}",
            spread([1e3 * (death.ready - death.delay - load) for death in ends]),
        )
    for name in list(found)[1:]:
        noticed, back = (
            statistics.median(f(a) / f(b) for a, b in zip(found["tursi"], found[name], strict=True))
            for f in (attrgetter("noticed"), attrgetter("ready"))
        )
        print(f"tursi / {name}: noticed {noticed:.3g}, ready again {back:.3g}")


def load_alone() -> float:
    """Seconds from the start of a scripted worker until it is ready, without a supervisor."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        began = time.monotonic()
        worker = subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$@" 3<&{theirs.fileno()}', "sh", *SCRIPTED],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
        order = msgspec.msgpack.encode(LoadOrder(deployment="alone", folder="/nonexistent"))
        ours.sendall(wire.encode(wire.Kind.LOAD, 0, order))
        decoder = wire.Decoder()
        while not any(frame.kind == wire.Kind.READY for frame in decoder.feed(ours.recv(65536))):
            pass
        taken = time.monotonic() - began
        worker.kill()
        worker.wait()
    return taken


def load_of_peer() -> float:
    """The same of the peers' worker."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stamps,
    ):
        stamps.bind(f"{folder}/stamps")
        stamps.settimeout(60)
        began = time.monotonic()
        worker = subprocess.Popen([*WORKER, f"{folder}/stamps"], stderr=subprocess.DEVNULL)
        ready = float(stamps.recv(100).split()[1])
        worker.kill()
        worker.wait()
    return ready - began


# -- cycles -----------------------------------------------------------------------------------


class Cycles(NamedTuple):
    """How often a program was started and ended."""

    rate: float
    """Times a second."""
    cost: float
    """Milliseconds of the supervisor's own processor time for each."""


def cycles(peer_python: str, rounds: int, seconds: float) -> None:
    """One program that ends at once, one copy of it, restarted without a delay."""
    runs: dict[str, Callable[[Path], Cycles]] = {
        "tursi": lambda folder: run_cycles(
            [sys.executable, str(HERE / "spawning.py"), str(folder), ENDS_AT_ONCE],
            seconds,
            lambda: _text(folder / "restarts").count("\n"),
        ),
        "supervisord": lambda folder: run_cycles(
            supervisord_command(peer_python, folder, (ENDS_AT_ONCE,), 1, startsecs=0),
            seconds,
            lambda: _text(folder / "supervisord.log").count(" exited: "),
        ),
        "plain restart": lambda folder: run_cycles(
            plain_command(folder, (ENDS_AT_ONCE,), 1, 0.0),
            seconds,
            lambda: _text(folder / "restarts").count("\n"),
        ),
    }
    found: dict[str, list[Cycles]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            with tempfile.TemporaryDirectory(prefix="cycles-") as folder:
                found[name].append(run(Path(folder)))
    row("", "cycles/s", "its CPU ms each", "tursi / it")
    ours = found["tursi"]
    for name, theirs in found.items():
        ratios = [a.rate / b.rate for a, b in zip(ours, theirs, strict=True)]
        rates, costs = [one.rate for one in theirs], [one.cost for one in theirs]
        row(name, spread(rates), spread(costs), spread(ratios))


def run_cycles(command: list[str], seconds: float, count: Callable[[], int]) -> Cycles:
    """Run a supervisor for a while; ``count`` tells how many ends there were."""
    started = subprocess.Popen(command, start_new_session=True)
    process = psutil.Process(started.pid)
    try:
        deadline = time.monotonic() + 60
        while count() < 2:
            assert time.monotonic() < deadline, f"nothing ends: {command}"
            time.sleep(0.05)
        before, cpu, began = count(), processor([process]), time.monotonic()
        time.sleep(seconds)
        ends, used, elapsed = count() - before, processor([process]) - cpu, time.monotonic() - began
    finally:
        for child in process.children(recursive=True):
            child.kill()
        started.kill()
        started.wait(10)
    return Cycles(ends / elapsed, 1e3 * used / max(ends, 1))


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# -- printing -----------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest."""
    median, least, most = statistics.median(values), min(values), max(values)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


def row(name: str, *cells: str) -> None:
    print(f"{name:14}" + "".join(f"{cell:>19}" for cell in cells))


if __name__ == "__main__":
    main()

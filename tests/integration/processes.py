"""Looking at real processes: who carries a mark, who still lives, and waiting for it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 15.0
"""Seconds after which a test gives up waiting; what is promised in seconds is asserted apart."""

ESCAPEES = """
import os, sys, time
for _ in range({count}):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
for _ in range({count}):
    os.wait()
print("escaped", flush=True)
{then}
"""
"""A program whose grandchildren leave its session and lose their parents."""


def escapees(count: int, then: str = "time.sleep(300)") -> str:
    """That program, which goes on with ``then``."""
    return ESCAPEES.format(count=count, then=then)


def marked(mark: str) -> set[int]:
    """The living processes that have the variable ``mark`` (NAME=VALUE) in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # A dead process that nobody has collected has no environment.
            if mark.encode() in variables:
                found.add(int(entry.name))
    return found


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def zombies(parent: int) -> list[int]:
    """The dead children of ``parent`` that it hasn't collected."""
    children = [
        int(word)
        for task in Path(f"/proc/{parent}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]
    return [pid for pid in children if not alive(pid)]


def wait_until(condition: Callable[[], object], patience: float = PATIENCE) -> float:
    """Block until ``condition()``, at most ``patience`` seconds; how many it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < patience, "waited in vain"
        time.sleep(0.002)
    return time.monotonic() - start

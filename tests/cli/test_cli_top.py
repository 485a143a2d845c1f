from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from patience import until
from rich.cells import cell_len
from scripted_api import Api, refusal, scripted_api

from tursi.cli.activity import SORTS, frame, with_cpu
from tursi.cli.connection import Exit

GIB = 1024**3
TURSI = "from tursi.cli import main; main()"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
OPEN, CLOSE = b"\x1b[?1049h\x1b[?25l", b"\x1b[?25h\x1b[?1049l"


def row(name: str = "mini", **fields: Any) -> dict[str, Any]:
    return {
        "name": name, "phase": "ready", "ready": 1, "replicas": 2, "generation": 3,
        "progress": None, "reason": None, "queued": 4, "in_flight": 5,
        "requests_per_second": 12.34, "errors_per_second": 0.0, "tokens_per_second": 1234.0,
        "latency": {"count": 9, "p50": 0.0123, "p95": 0.25, "p99": 1.5, "mean": 0.1},
        "batch_size": 2.25, "rss": 300 * 1024**2, "gpu_memory": None, "cpu_seconds": 10.0,
        "generations": [],
        **fields,
    }  # fmt: skip


def activity(*rows: dict[str, Any], second: int = 5, pid: int = 7, **daemon: Any) -> dict[str, Any]:
    return {
        "at": f"2026-01-02T03:04:{second:02}.000Z",
        "seconds": 10.0,
        "daemon": {
            "version": "1.2", "pid": pid, "started_at": "2026-01-02T01:00:00.000Z",
            "cpu_seconds": 2.0, "rss": 70 * 1024**2, **daemon,
        },
        "rooms": [{"device": "host", "total": 8 * GIB, "free": 3 * GIB, "name": None}],
        "deployments": list(rows or [row()]),
    }  # fmt: skip


def drawn(shown: dict[str, Any], width: int, height: int | None = None, **more: Any) -> list[str]:
    lines = frame(with_cpu(shown, None), width, height, **more).plain.split("\n")
    assert height is None or len(lines) == height
    assert max(map(cell_len, lines)) <= width
    return lines


# -- the frame ------------------------------------------------------------------------


def test_everything_is_shown_where_there_is_room() -> None:
    now = activity(row(cpu_seconds=10.5), second=6, cpu_seconds=2.1)
    lines = frame(with_cpu(now, activity()), 160, None).plain.split("\n")
    assert lines[0].startswith("tursi 1.2   ")
    assert lines[0].endswith("up 2h 4m   cpu 10.0 %   memory 70 MiB")
    assert lines[1] == "12.3 req/s, 5 in flight   host 3.0 GiB of 8.0 GiB free"
    assert lines[3].split() == [
        "NAME", "PHASE", "READY", "GEN", "REQ/S", "ERR/S", "P50", "P95", "QUEUE", "BUSY", "TOK/S",
        "BATCH", "MEMORY", "CPU",
    ]  # fmt: skip
    assert lines[4].split() == [
        "mini", "ready", "1/2", "3", "12.3", "-", "12.3", "ms", "250", "ms", "4", "5", "1234",
        "2.2", "300", "MiB", "50", "%",
    ]  # fmt: skip


def test_columns_go_where_there_is_no_room_for_them() -> None:
    wide, narrow, least = (drawn(activity(), width)[3].split() for width in (160, 79, 34))
    assert len(wide) > len(narrow) > len(least)
    assert narrow == [
        "NAME", "PHASE", "READY", "REQ/S", "ERR/S", "P95", "QUEUE", "BUSY", "TOK/S", "MEMORY",
        "CPU",
    ]  # fmt: skip
    assert least == ["NAME", "PHASE", "REQ/S", "P95"]
    for width in (1, 5, 10, 20):
        drawn(activity(), width, 5)


def test_names_are_cut_and_made_harmless() -> None:
    lines = drawn(
        activity(row("a-very-long-name-of-a-deployment" * 2), row("\x1b[2Jx"), row("模型" * 20)), 80
    )
    assert lines[4].startswith("\\x1b[2Jx")
    assert "…" in lines[5]
    assert "…" in lines[6]


def test_what_has_no_line_is_counted() -> None:
    rows = [row(f"d{number:02}") for number in range(30)]
    lines = drawn(activity(*rows), 100, 12)
    assert lines[-1].startswith("q quit   sort by:  n name")
    assert lines[-2] == "... and 24 more"
    assert lines[-3].startswith("d05")
    assert len([line for line in drawn(activity(*rows), 100) if line.startswith("d")]) == 30
    assert "no deployments" in "".join(drawn({**activity(), "deployments": []}, 80, 10))
    for height in range(1, 8):
        drawn(activity(*rows), 80, height)


@pytest.mark.parametrize(
    ("sort", "first"), [("n", "a"), ("r", "b"), ("l", "c"), ("m", "d"), ("c", "e")]
)
def test_rows_are_sorted_by_what_one_wants(sort: str, first: str) -> None:
    rows = [
        row("b", requests_per_second=99.0),
        row("c", latency={"p50": 1.0, "p95": 9.0}),
        row("d", rss=GIB),
        row("e", cpu_seconds=99.0),
        row("a", latency=None),
    ]
    before = activity(*(row(each) for each in "abcde"))
    now = with_cpu(activity(*rows, second=6), before)
    assert frame(now, 120, None, sort=sort).plain.split("\n")[4].startswith(first)
    assert set("nrlmc") == set(SORTS)


def test_a_loading_one_says_how_far_it_is() -> None:
    loading = row(phase="loading", progress={"stage": "load", "done": 1.0, "total": 4.0})
    assert "load 25 %" in drawn(activity(loading), 160)[4]
    asking = row(phase="queued", progress={"stage": "resolve", "done": None, "total": None})
    assert "resolve" in drawn(activity(asking), 160)[4]


def test_generations_have_rows_while_there_are_several() -> None:
    latency = {"p50": 0.1, "p95": 0.3}
    generations = [
        {
            "generation": number, "ready": 1, "workers": 2, "in_flight": number,
            "requests_per_second": 2.0, "errors_per_second": 0.5, "latency": latency,
        }
        for number in (3, 4)
    ]  # fmt: skip
    lines = drawn(activity(row("b", generations=generations), row("a")), 160)
    assert [line.split()[0] for line in lines[4:]] == ["a", "b", "gen", "gen"]
    assert lines[7].split() == [
        "gen", "4", "1/2", "4", "2.0", "0.5", "100", "ms", "300", "ms", "-", "4",
        "-", "-", "-", "-",
    ]  # fmt: skip


def test_a_share_of_the_processor_needs_two_looks_at_the_same_processes() -> None:
    before, now = activity(), activity(row(cpu_seconds=3.0), row("new"), second=6, pid=8)
    found = with_cpu(now, before)
    assert found["daemon"]["cpu"] is None
    assert [each["cpu"] for each in found["deployments"]] == [None, None]
    assert with_cpu(now, now)["deployments"][0]["cpu"] is None


def test_without_a_terminal_there_is_one_look(api: Api) -> None:
    api.on("GET", "/activity", activity(), activity(row(cpu_seconds=10.5), second=6))
    result = api.tursi("top")
    assert "this is no terminal" in result.stderr
    assert result.stdout.splitlines()[4].split()[-2:] == ["50", "%"]
    assert "\x1b" not in result.stdout
    assert "sort by" not in result.stdout
    assert api.tursi("top", "--once").stderr == ""
    assert json.loads(api.tursi("top", "--json").stdout)["daemon"]["pid"] == 7


def test_without_a_daemon_it_says_so_at_once(tmp_path: Any) -> None:
    api = Api(tmp_path / "none.sock")
    assert api.tursi("top").exit_code == Exit.NO_DAEMON


# -- on a terminal ------------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        yield running


class Terminal:
    """A terminal of its own, with ``tursi top`` in it."""

    def __init__(self, api: Api, width: int, height: int) -> None:
        self.raw = b""
        self.pid, self.master = pty.fork()
        if not self.pid:
            os.environ["TERM"] = "xterm"
            os.environ.pop("COLUMNS", None)
            os.execv(
                sys.executable, [sys.executable, "-c", TURSI, "--socket", str(api.socket), "top"]
            )
        self.resize(width, height)
        self.status: int | None = None

    def resize(self, width: int, height: int) -> None:
        # The kernel tells the process of it.
        size = struct.pack("HHHH", height, width, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def _read(self) -> None:
        while select.select([self.master], [], [], 0.02)[0]:
            try:
                piece = os.read(self.master, 65536)
            except OSError:
                # Linux's way to say that the other end is closed.
                return
            if not piece:
                return
            self.raw += piece

    def frame(self) -> list[str]:
        """The last one that is complete."""
        self._read()
        found = self.raw.rpartition(b"\x1b[J")[0].rpartition(b"\x1b[H")[2]
        return ESCAPES.sub("", found.decode()).split("\r\n")

    def shows(self, text: str) -> None:
        until(lambda: any(text in line for line in self.frame()), f"{text!r} is shown", 30)

    def ended(self) -> bool:
        self._read()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def echoes(self) -> bool:
        """Whether it is as a shell wants it."""
        return bool(termios.tcgetattr(self.master)[3] & termios.ECHO)


@contextmanager
def terminal(api: Api, width: int = 100, height: int = 12) -> Iterator[Terminal]:
    one = Terminal(api, width, height)
    try:
        yield one
    finally:
        if not one.ended():
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.master)


@pytest.mark.parametrize(
    ("how", "status"),
    [("q", 0), ("\x03", 0), ("\x1c", 131), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_however_it_ends_it_leaves_the_terminal_clean(api: Api, how: Any, status: int) -> None:
    api.on("GET", "/activity", activity())
    with terminal(api) as one:
        one.shows("mini")
        assert not one.echoes()
        assert one.raw.count(OPEN) == 1
        one.press(how) if isinstance(how, str) else os.kill(one.pid, how)
        until(one.ended, "it has ended", 30)
        assert one.status == status
        assert one.raw.endswith(CLOSE)
        assert one.echoes()


def test_it_fits_the_terminal_whatever_becomes_of_that(api: Api) -> None:
    api.on("GET", "/activity", activity())
    with terminal(api) as one:
        one.shows("mini")
        assert len(one.frame()) == 12
        assert "GEN" in one.frame()[3]
        one.resize(60, 20)
        until(lambda: len(one.frame()) == 20, "it has grown", 30)
        assert "GEN" not in one.frame()[3]
        one.press("m")
        until(lambda: one.frame() and b"\x1b[1mm memory" in one.raw, "it sorts by memory", 30)


def test_a_terminal_that_does_not_say_how_large_it_is_gets_as_much_as_most_have(api: Api) -> None:
    api.on("GET", "/activity", activity())
    with terminal(api, 0, 0) as one:
        one.shows("mini")
        until(lambda: len(one.frame()) == 24, "it is drawn", 30)


def test_an_older_daemon_is_told_from_in_a_sentence(api: Api) -> None:
    older = row()
    del older["generations"]
    api.on("GET", "/activity", activity(), activity(older))
    with terminal(api) as one:
        until(one.ended, "it has ended", 30)
        assert one.status == Exit.FAILED
        said = one.raw.rpartition(CLOSE)[2].decode()
        assert said.startswith("tursi: The daemon's answer has no 'generations'")
        assert one.echoes()
    assert "another version" in api.tursi("top", "--once").stderr


def test_a_daemon_that_is_away_is_waited_for(api: Api) -> None:
    starting = refusal(503, "starting_up", "The daemon is starting.", retry_after=1)
    api.on("GET", "/activity", activity(), starting, activity(row("back")))
    with terminal(api) as one:
        one.shows("The daemon doesn't answer; trying again.")
        # What was there last stays.
        assert any("mini" in line for line in one.frame())
        one.shows("back")
        assert not any("doesn't answer" in line for line in one.frame())
        # One that no longer lets us in is another matter.
        api.on("GET", "/activity", refusal(403, "peer_refused", "You may not."))
        until(one.ended, "it has ended", 30)
        assert one.status == Exit.FAILED
        assert b"You may not." in one.raw.rpartition(CLOSE)[2]


def test_it_can_be_suspended(api: Api) -> None:
    api.on("GET", "/activity", activity())
    with terminal(api) as one:
        one.shows("mini")
        os.kill(one.pid, signal.SIGTSTP)
        until(lambda: os.waitpid(one.pid, os.WUNTRACED | os.WNOHANG)[0], "it has stopped", 30)
        one.frame()
        assert one.raw.endswith(CLOSE)
        assert one.echoes()
        os.kill(one.pid, signal.SIGCONT)
        until(lambda: one.frame() and one.raw.count(OPEN) == 2, "it is back", 30)
        one.shows("mini")

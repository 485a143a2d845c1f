"""What goes on, live."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import click

from tursi.cli.activity import SORTS, frame, with_cpu
from tursi.cli.connection import Connection, Exit, Failure
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, note

REFRESH_SECONDS = 1.0
ANSWER_SECONDS = 3.0
"""A daemon that takes longer doesn't answer."""
_AWAY = frozenset({int(Exit.NO_DAEMON), int(Exit.TRY_LATER)})
_WIDE = 200
"""Columns where there is no terminal."""


@click.command()
@click.option("--once", is_flag=True, help="Print one look and end.")
@as_json
@click.pass_obj
def top(connection: Connection, *, once: bool, json: bool) -> None:
    """Show live what the daemon and every deployment do; q quits."""
    first = connection.get("/activity")
    if json:
        dump(first)
        return
    if once or not _is_terminal():
        if not once:
            note("tursi top: this is no terminal, so here is one look.")
        time.sleep(REFRESH_SECONDS)
        _print(with_cpu(connection.get("/activity"), first))
        return
    with _ended_by_signals(), Screen() as screen:
        Top(lambda: connection.call("GET", "/activity", seconds=ANSWER_SECONDS).body, screen).run(
            first
        )


def _is_terminal() -> bool:
    """Whether there is one that can be drawn on."""
    is_dumb = os.environ.get("TERM", "dumb") in {"dumb", "unknown"}
    return sys.stdin.isatty() and sys.stdout.isatty() and not is_dumb


def _print(activity: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE)
    console.print(frame(activity, console.width, None), crop=False, soft_wrap=True)


class Top:
    """Asks again and again, and draws; ``ask`` gives the activity or raises ``Failure``."""

    def __init__(self, ask: Callable[[], dict[str, Any]], screen: Screen) -> None:
        self._ask = ask
        self._screen = screen
        self._sort = "n"
        self._trouble = ""

    def run(self, first: dict[str, Any]) -> None:
        """Go on until somebody quits."""
        last = first
        shown = with_cpu(first, None)
        due = time.monotonic() + REFRESH_SECONDS
        while True:
            self._draw(shown)
            key = self._screen.key(max(due - time.monotonic(), 0.0))
            if key == "q":
                return
            if key in SORTS:
                self._sort = key
            if time.monotonic() < due:
                continue
            try:
                now = self._ask()
            except Failure as error:
                if error.exit_code not in _AWAY:
                    raise
                self._trouble = f"The daemon doesn't answer; trying again. {error.message}"
            else:
                shown, last, self._trouble = with_cpu(now, last), now, ""
            due = time.monotonic() + REFRESH_SECONDS

    def _draw(self, shown: dict[str, Any]) -> None:
        self._screen.draw(
            lambda width, height: frame(
                shown, width, height, sort=self._sort, trouble=self._trouble
            )
        )


class Screen:
    """The whole terminal, and its keyboard, until the context ends."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stdout)
        self._input = sys.stdin.fileno()
        self._before: list[Any] = []
        self._woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        # A resize, or the return from Ctrl-Z, ends the wait for a key.
        earlier = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, earlier)
        for number, handler in (
            (signal.SIGWINCH, lambda *_: None),
            (signal.SIGTSTP, lambda *_: self._suspend()),
        ):
            self._stack.callback(signal.signal, number, signal.signal(number, handler))
        self._open()
        return self

    def __exit__(self, *raised: object) -> None:
        self._close()
        self._stack.close()
        os.close(self._woken)
        os.close(self._wake)

    def key(self, seconds: float) -> str:
        """The next key, or nothing after ``seconds`` or when there is something to draw."""
        ready, _, _ = select.select([self._input, self._woken], [], [], seconds)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._input not in ready:
            return ""
        data = os.read(self._input, 64)
        # The end of the input: nobody is there any more.
        return data[:1].decode("latin-1").lower() if data else "q"

    def draw(self, make: Callable[[int, int], Any]) -> None:
        """Show what ``make`` gives for this many columns and lines."""
        width, height = os.get_terminal_size(sys.stdout.fileno())
        # Some don't say how large they are.
        width, height = width or 80, height or 24
        with self._console.capture() as captured:
            # One column is left free: some terminals wrap when the last one is written to.
            self._console.print(make(width - 1, height), crop=False, soft_wrap=True, end="")
        lines = captured.get().split("\n")
        # Line by line over what was there, without clearing it all first, which flickers.
        text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J"
        sys.stdout.write(text)
        sys.stdout.flush()

    def _open(self) -> None:
        self._before = termios.tcgetattr(self._input)
        tty.setcbreak(self._input)
        # Another screen, without a cursor.
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        sys.stdout.flush()

    def _close(self) -> None:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)

    def _suspend(self) -> None:
        """Leave the terminal to the shell, as Ctrl-Z asks for."""
        self._close()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._open()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let what ends it by a signal clean up behind it too; Ctrl-C is a way to quit."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    earlier = [
        (each, signal.signal(each, end)) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    ]
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in earlier:
            signal.signal(number, handler)

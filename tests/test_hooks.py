"""Hooks: what is called, and that nothing ever waits for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from tursi.config import Hook, parse
from tursi.errors import ConfigurationError
from tursi.hooks import LOOK_SECONDS, QUEUE, Hooks, body
from tursi.model import Event


def event(kind: str = "worker.crashed", number: int = 1, message: str = "it ended") -> Event:
    return Event(number, 1_700_000_000.0, kind, "mini", message, "signal 11", "uuid")


class Program:
    """A program that ends when told to."""

    def __init__(self, name: str, arguments: tuple[str, ...]) -> None:
        self.name = name
        self.told = json.loads(arguments[4])
        self.command = arguments[5:]
        self.finished: Deferred[Any] = Deferred()
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1

    def end(self, status: int | None = 0, signal: int | None = None) -> None:
        self.finished.callback(SimpleNamespace(exit_status=status, signal=signal))


class Bench:
    def __init__(self, *settings: Hook) -> None:
        self.clock = Clock()
        self.programs: list[Program] = []
        self.health = "healthy"
        self.looks: list[Deferred[str]] = []
        self.tell: Callable[[Event], None] = lambda _: None
        self.hooks = Hooks(
            settings, spawn=self.spawn, look=self.look, reactor=self.clock, now=lambda: 7.0
        )
        self.hooks.start(self.watch)

    def spawn(self, name: str, arguments: tuple[str, ...]) -> Program:
        program = Program(name, arguments)
        self.programs.append(program)
        return program

    def look(self) -> Deferred[str]:
        return succeed(self.health)

    def watch(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell

    def happens(self, *events: Event) -> None:
        for each in events:
            self.tell(each)
        self.clock.advance(0)


ALERT = Hook(on=("worker.crashed", "health.*"), command=("/bin/alert", "--now"), seconds=5.0)


def test_what_is_chosen_is_told_as_json_and_nothing_else() -> None:
    bench = Bench(ALERT)
    bench.happens(event("worker.ready"))
    assert bench.programs == []
    bench.happens(event())
    [program] = bench.programs
    assert program.command == ("/bin/alert", "--now")
    assert program.told == {
        "event": "worker.crashed",
        "at": "2023-11-14T22:13:20.000+00:00",
        "deployment": "mini",
        "worker": "uuid",
        "message": "it ended",
        "cause": "signal 11",
    }
    assert len(body(event(message="x" * 100_000))) < 5000


def test_one_call_at_a_time_in_order() -> None:
    bench = Bench(ALERT)
    bench.happens(*(event(message=str(number)) for number in range(3)))
    assert len(bench.programs) == 1
    for program in bench.programs:
        program.end()
        bench.clock.advance(0)
    assert [program.told["message"] for program in bench.programs] == ["0", "1", "2"]


def test_a_hook_that_hangs_is_killed_and_the_next_call_waits_for_its_end() -> None:
    bench = Bench(ALERT)
    bench.happens(event(message="a"), event(message="b"))
    bench.clock.advance(5)
    [hanging] = bench.programs
    assert hanging.cancelled == 1
    bench.clock.advance(60)
    assert len(bench.programs) == 1
    hanging.end(None, 9)
    bench.clock.advance(0)
    assert len(bench.programs) == 2
    assert not [call for call in bench.clock.getDelayedCalls() if call.getTime() > 100]


def test_a_flood_drops_the_oldest_and_counts_them() -> None:
    bench = Bench(ALERT)
    bench.happens(event(message="running"))
    bench.happens(*(event(message=str(number)) for number in range(QUEUE + 50)))
    assert bench.hooks.dropped == 50
    bench.programs[0].end()
    bench.clock.advance(0)
    assert bench.programs[1].told["message"] == "50"


@pytest.mark.parametrize("end", [{"status": 3}, {"status": None, "signal": 11}, {}])
def test_a_call_that_fails_does_not_end_the_hook(end: dict[str, Any]) -> None:
    bench = Bench(ALERT)
    bench.happens(event(), event())
    if end:
        bench.programs[0].end(**end)
    else:
        bench.programs[0].finished.errback(Failure(OSError("no processes left")))
    bench.clock.advance(0)
    assert len(bench.programs) == 2


def test_hooks_do_not_hold_up_each_other() -> None:
    bench = Bench(ALERT, Hook(on=("*",), command=("/bin/log",)))
    bench.happens(event(message="a"))
    bench.programs[1].end()
    bench.happens(event(message="b"))
    assert [each.command[0] for each in bench.programs] == ["/bin/alert", "/bin/log", "/bin/log"]


def test_a_change_of_health_is_an_event() -> None:
    bench = Bench(ALERT)
    bench.clock.advance(LOOK_SECONDS)
    assert bench.programs == []
    bench.health = "degraded"
    bench.clock.advance(LOOK_SECONDS)
    bench.clock.advance(0)
    [program] = bench.programs
    assert program.told["event"] == "health.degraded"
    bench.clock.advance(LOOK_SECONDS)
    assert len(bench.programs) == 1


def test_stopping_ends_what_runs_and_waits_for_it() -> None:
    bench = Bench(ALERT)
    bench.happens(event(), event())
    stopped = bench.hooks.stop()
    assert not stopped.called
    assert bench.programs[0].cancelled == 1
    bench.programs[0].end(None, 9)
    assert stopped.called
    bench.happens(event())
    assert len(bench.programs) == 1
    assert not bench.clock.getDelayedCalls()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('on = ["x"]', "either a command or a url"),
        ('on = ["x"]\ncommand = ["/bin/true"]\nurl = "http://x"', "either a command or a url"),
        ('on = []\ncommand = ["/bin/true"]', "needs the events"),
        ('on = ["x"]\ncommand = ["true"]', "absolute path"),
        ('on = ["x"]\nurl = "file:///etc/passwd"', "http"),
        ('on = ["x"]\nurl = "http://x"\nseconds = 0', "seconds"),
    ],
)
def test_a_hook_that_can_not_be_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        parse(f"[[hooks]]\n{text}", "tursi.toml")

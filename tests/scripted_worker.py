"""A worker without a model that speaks the real wire protocol and behaves as it is told.

Run as ``python -I scripted_worker.py --option ...`` with its data socket on
descriptor 3. Whatever can be said on the command line can also be said in a JSON
file (``{"load_seconds": 2, "echo": true}``) that the LOAD frame names as the
model's folder, or that lies in that folder as ``scripted.json``; that counts more.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import hashlib
import heapq
import itertools
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tursi import heartbeat, wire
from tursi.errors import LoadError, by_code
from tursi.heartbeat import Operation
from tursi.model import Loaded, LoadOrder, Progress, Usage
from tursi.wire import Kind

DATA = 3
OBEYED = ("flood", "hang-gil", "hang-nogil", "exit-3", "exit-0", "garbage", "close", "fork")
"""What ``--obey`` does at SIGRTMIN, SIGRTMIN + 1 and so on."""
FLOOD = 16 * 2**20
"""Bytes, where nobody says how many."""
STEP = 0.2
"""Seconds between two PROGRESS frames."""


def parser() -> argparse.ArgumentParser:
    one = argparse.ArgumentParser()
    one.add_argument("--no-hello", action="store_true")
    one.add_argument("--protocol", type=int, default=wire.PROTOCOL_VERSION)
    one.add_argument("--hello-after", type=float, default=0.0, help="seconds until it says hello")
    one.add_argument("--load-seconds", type=float, default=0.0, help="with progress all the while")
    one.add_argument("--warm-seconds", type=float, default=0.0, help="of the first answer")
    one.add_argument("--stall", action="store_true", help="load for ever, without progress")
    one.add_argument("--fail", metavar="CODE:MESSAGE", help="say so instead of READY, and exit")
    one.add_argument("--at", type=int, default=0, help="when what follows happens: request, 0=load")
    one.add_argument("--hang", choices=("gil", "nogil", "spin", "stop"))
    one.add_argument("--mute", action="store_true", help="don't tell where the threads stand")
    one.add_argument("--exit", type=int)
    one.add_argument("--signal", type=int)
    one.add_argument("--die-on", metavar="TEXT", help="SIGSEGV at a request with that in its body")
    one.add_argument("--die-after", type=float, default=0.0, help="seconds until then")
    one.add_argument("--garbage", action="store_true")
    one.add_argument("--close", action="store_true", help="close the data socket and live on")
    one.add_argument("--fork", type=int, default=0, help="that many processes that escape")
    one.add_argument("--flood", type=int, default=0, help="bytes to write to stdout and stderr")
    one.add_argument("--leak", type=int, default=0, help="bytes to keep after every request")
    one.add_argument("--say", action="store_true", help="write the folder's file `say` to stderr")
    one.add_argument("--announce", type=int, default=0, help="a frame of that many bytes")
    one.add_argument("--obey", action="store_true", help="misbehave at real-time signals: OBEYED")
    one.add_argument("--ignore-term", action="store_true")
    one.add_argument("--echo", action="store_true", help="answer with the request's own body")
    one.add_argument("--attempt", action="store_true", help="do what a request's body says")
    one.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    one.add_argument("--stream", type=int, default=0, help="answer with that many events")
    one.add_argument("--stream-asked", type=int, default=0, help="so only who asks for a stream")
    one.add_argument("--interval", type=float, default=0.02, help="seconds between two of them")
    one.add_argument("--smoke", choices=("fail", "hang", "die"), help="at the daemon's request")
    one.add_argument("--status", type=int, default=200, help="of each answer")
    one.add_argument("--queue-seconds", type=float, default=0.0, help="that each says it waited")
    one.add_argument("--one-by-one", action="store_true", help="answer after --delay each")
    one.add_argument("--device", default="cpu", help="what it says it computes on")
    one.add_argument("--task", default="feature-extraction")
    return one


class ScriptedWorker:
    def __init__(self, options: argparse.Namespace, data: socket.socket) -> None:
        self.options = options
        self.data = data
        self.decoder = wire.Decoder()
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.order: LoadOrder | None = None
        self.requests = 0
        self.open: set[int] = set()
        self.kept: list[bytes] = []
        self.hung = False
        self.free_at = 0.0
        if options.mute:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        else:
            faulthandler.register(signal.SIGUSR2, all_threads=True, chain=False)
        self.page, self.shared = heartbeat.share()
        self.pulse = heartbeat.Pulse(self.page)
        self.pulse.start()

    # -- the loop

    def run(self) -> None:
        self.terminable()
        sys.stderr.write(f"scripted worker {os.getpid()} begins\n")
        time.sleep(self.options.hello_after)
        if not self.options.no_hello:
            hello = wire.Hello(self.options.protocol, os.getpid(), start_time())
            frame = wire.encode(Kind.HELLO, 0, msgspec.msgpack.encode(hello))
            socket.send_fds(self.data, [frame], [self.shared] if self.shared else [])
        while True:
            wait = max(self.timers[0][0] - time.monotonic(), 0) if self.timers else None
            if select.select([self.data], [], [], wait)[0]:
                received = self.data.recv(1 << 18)
                if not received:
                    os._exit(0)
                # All answers to what came in one read leave in one write.
                answers = [self.answer(frame) for frame in self.decoder.feed(received)]
                self.send(b"".join(answers))
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + seconds, next(self.serial), what))

    def send(self, data: bytes) -> None:
        if data:
            self.data.sendall(data)

    def terminable(self) -> None:
        ignored = self.options.ignore_term
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else lambda *_: os._exit(0))

    # -- frames

    def answer(self, frame: wire.Frame) -> bytes:
        match frame.kind:
            case Kind.LOAD:
                self.load(msgspec.msgpack.decode(frame.body, type=LoadOrder))
            case Kind.REQUEST:
                return self.request(frame.id, wire.decode_ask(frame.body))
            case Kind.CANCEL:
                self.open.discard(frame.id)
                if not self.open and not self.hung:
                    self.page.begin(Operation.IDLE)
            case Kind.PING:
                return wire.encode(Kind.PONG, frame.id)
            case Kind.SHUTDOWN:
                if not self.options.ignore_term:
                    os._exit(0)
            case _:
                raise wire.WireError(f"the daemon sent a frame of kind {frame.kind}")
        return b""

    def load(self, order: LoadOrder) -> None:
        self.order = order
        self.pulse.beat_every(order.beat_seconds)
        self.read_options(Path(order.folder))
        self.terminable()
        if self.options.obey:
            for number, what in enumerate(OBEYED):
                signal.signal(signal.SIGRTMIN + number, lambda *_, what=what: self.obey(what))
        if self.options.say:
            threading.Thread(target=say, args=(Path(order.folder),), daemon=True).start()
        for _ in range(self.options.fork):
            escape()
        if self.options.flood:
            threading.Thread(target=flood, args=(self.options.flood,), daemon=True).start()
        if not self.options.stall:
            self.step(time.monotonic())

    def read_options(self, folder: Path) -> None:
        path = folder if folder.is_file() else folder / "scripted.json"
        if path.is_file():
            options: dict[str, Any] = json.loads(path.read_bytes())
            unknown = options.keys() - vars(self.options).keys()
            if unknown:
                sys.exit(f"unknown options: {unknown}")
            vars(self.options).update(options)

    def step(self, began: float) -> None:
        done = time.monotonic() - began
        total = self.options.load_seconds
        if done < total:
            progress = Progress("load", done, total, "seconds")
            self.send(wire.encode(Kind.PROGRESS, 0, msgspec.msgpack.encode(progress)))
            self.later(min(STEP, total - done), lambda: self.step(began))
            return
        if self.options.fail:
            self.fail(*self.options.fail.split(":", 1))
        if self.options.at == 0:
            self.misbehave()
        if not self.hung:
            warm = msgspec.msgpack.encode(Progress("warm"))
            loaded = Loaded(
                task=(self.order and self.order.task) or self.options.task,
                device=self.options.device,
                dtype="float32",
                load_seconds=total,
                versions={"scripted": "1"},
            )
            ready = wire.encode(Kind.READY, 0, msgspec.msgpack.encode(loaded))
            self.send(wire.encode(Kind.PROGRESS, 0, warm))
            self.later(self.options.warm_seconds, lambda: self.send(ready))

    def fail(self, code: str, message: str) -> None:
        words = wire.LastWords(code, message, "Traceback: as scripted")
        self.send(wire.encode(Kind.FAILED, 0, msgspec.msgpack.encode(words)))
        error = by_code().get(code, LoadError)
        os._exit(getattr(error, "exit_status", LoadError.exit_status))

    def request(self, id_: int, ask: wire.Ask) -> bytes:
        if ask.request_id.startswith("smoke-"):
            return self.smoke(id_)
        self.requests += 1
        if self.options.leak:
            # After the answer: whoever takes too much may be killed at any moment.
            self.later(0, lambda: self.kept.append(os.urandom(self.options.leak)))
        if self.requests == self.options.at:
            self.misbehave()
        if self.options.die_on and self.options.die_on.encode() in ask.body:
            self.later(self.options.die_after, lambda: os.kill(os.getpid(), signal.SIGSEGV))
            return b""
        if self.hung:
            return b""
        events = self.events(ask)
        if events:
            self.open.add(id_)
            self.later(0, lambda: self.event(id_, 0, events))
            return head(id_, "text/event-stream")
        body = ask.body if self.options.echo else self.account(ask)
        if self.options.attempt:
            body = json.dumps([attempt(*each) for each in json.loads(ask.body)["attempt"]]).encode()
        wait, waited = self.options.delay, self.options.queue_seconds
        if self.options.one_by_one:
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + self.options.delay
            wait, waited = self.free_at - now, self.free_at - now - self.options.delay
        answer = head(id_, "application/json", self.options.status)
        answer += wire.encode(Kind.BODY, id_, body) + end(id_, 1, waited)
        if not wait:
            return answer
        self.open.add(id_)
        self.later(wait, lambda: self.finish(id_, answer))
        return b""

    def events(self, ask: wire.Ask) -> int:
        """How many the answer is to have; 0 if it is no stream."""
        asked = b'"stream":true' in ask.body.replace(b" ", b"")
        return self.options.stream or (self.options.stream_asked if asked else 0)

    def smoke(self, id_: int) -> bytes:
        """Answer the daemon's own first request, as told."""
        if self.options.smoke == "die":
            os._exit(1)
        if self.options.smoke == "hang":
            return b""
        status, body = 200, b"{}"
        if self.options.smoke == "fail":
            status, body = 500, b'{"error": "it makes no sense of anything"}'
        return (
            head(id_, "application/json", status) + wire.encode(Kind.BODY, id_, body) + end(id_, 1)
        )

    def account(self, ask: wire.Ask) -> bytes:
        return json.dumps(
            {"pid": os.getpid(), "route": ask.route, "request": self.requests, "id": ask.request_id}
        ).encode()

    def finish(self, id_: int, answer: bytes) -> None:
        if id_ in self.open:
            self.open.discard(id_)
            self.send(answer)

    def event(self, id_: int, number: int, events: int) -> None:
        # Where the thread that computes hangs, nothing more comes of what it was at.
        if id_ not in self.open or self.hung:
            return
        self.page.begin(Operation.DECODE)
        if number == events:
            self.page.begin(Operation.IDLE)
            self.finish(id_, end(id_, number))
            return
        piece = b"data: %d\n\n" % number
        self.send(wire.encode(Kind.TOKENS, 0, wire.encode_tokens([(id_, piece)])))
        self.later(self.options.interval, lambda: self.event(id_, number + 1, events))

    # -- misbehaviour

    def misbehave(self) -> None:
        options = self.options
        if options.exit is not None:
            os._exit(options.exit)
        if options.signal is not None:
            signal.signal(options.signal, signal.SIG_DFL) if options.signal != 9 else None
            os.kill(os.getpid(), options.signal)
        if options.garbage:
            self.send(b"HTTP/1.1 200 OK\r\n\r\n" * 4)
        if options.announce:
            self.send(options.announce.to_bytes(4, "big") + b"\0" * 9)
        if options.close:
            self.data.close()
            time.sleep(3600)
        if options.hang == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif options.hang == "gil":
            # PyDLL keeps the interpreter locked during the call.
            ctypes.PyDLL(None).sleep(3600)
        elif options.hang in {"nogil", "spin"}:
            # Only the compute thread hangs: PINGs are still answered.
            self.hung = True
            hang = hang_blocked if options.hang == "nogil" else hang_computing
            threading.Thread(target=self.compute, args=(hang,), daemon=True).start()

    def obey(self, what: str) -> None:
        what, _, how = what.partition("-")
        if what == "flood":
            threading.Thread(target=flood, args=(FLOOD,), daemon=True).start()
        elif what == "fork":
            escape()
        else:
            wish: dict[str, Any] = {"exit": int(how)} if what == "exit" else {what: how or True}
            vars(self.options).update(wish)
            self.misbehave()

    def compute(self, hang: Callable[[], None]) -> None:
        self.pulse.watch()
        self.page.begin(Operation.BATCH)
        hang()


def head(id_: int, content_type: str, status: int = 200) -> bytes:
    return wire.encode(Kind.HEAD, id_, wire.encode_head(wire.Head(status, content_type, {})))


def end(id_: int, tokens: int, waited: float = 0.0) -> bytes:
    usage = Usage(
        prompt_tokens=1, completion_tokens=tokens, batch_size=1, queue_seconds=max(waited, 0.0)
    )
    return wire.encode(Kind.END, id_, wire.encode_end(wire.End(usage, "")))


def start_time() -> int:
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])


def escape() -> None:
    """A grandchild in a session of its own that ignores SIGTERM."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.close(DATA)
            time.sleep(3600)
        os._exit(0)
    os.wait()


def attempt(what: str, where: str) -> str | int:
    """Do something forbidden; what came of it."""
    attempts: dict[str, Callable[[], object]] = {
        "read": lambda: Path(where).read_bytes(),
        "list": lambda: list(Path(where).iterdir()),
        "write": lambda: Path(where).write_bytes(b"x"),
        "connect": lambda: socket.socket(socket.AF_UNIX).connect(where),
        "tcp": lambda: socket.create_connection(("127.0.0.1", int(where))),
        "signal": lambda: os.kill(int(where), 0),
        "variable": lambda: os.environ[where],
        "run": lambda: run_program(where),
    }
    if what == "files":
        return open_files()
    try:
        answer = attempts[what]()
    except (OSError, KeyError) as error:
        return type(error).__name__
    return answer if isinstance(answer, str) else "done"


def run_program(path: str) -> str:
    """What an attacker's program in this very process finds out: it calls that ``found``."""
    found: str = runpy.run_path(path)["found"]
    return found


def open_files() -> int:
    """How many descriptors there may be."""
    opened = []
    try:
        while True:
            opened.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return max(opened) + 1
    finally:
        for each in opened:
            os.close(each)


def hang_blocked() -> None:
    time.sleep(3600)


def hang_computing() -> None:
    # It lets go of the interpreter.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def say(folder: Path) -> None:
    data = memoryview((folder / "say").read_bytes())
    while data:
        data = data[os.write(2, data) :]


def flood(count: int) -> None:
    lines = 100 * (b"x" * 99 + b"\n")
    for number in range(max(count // len(lines), 1)):
        os.write(1 + number % 2, lines)


if __name__ == "__main__":
    ScriptedWorker(parser().parse_args(), socket.socket(fileno=DATA)).run()

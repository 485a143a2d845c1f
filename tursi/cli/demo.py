"""What ``make run`` runs: a daemon of its own, a real model on it, and how to use it."""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tursi.cli.connection import SOCKET_PATH_LIMIT, Connection, Exit, Failure, path
from tursi.cli.progress import Verdict, display, look, wait
from tursi.cli.terminal import line, note, table, tolerate
from tursi.model import DEFAULT_PORT

TWISTD = Path(sys.executable).with_name("twistd")
NAME = "all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
QUESTION = "How do I get my money back?"
SENTENCES = (
    "Refunds are paid within ten days.",
    "You can return the product if you don't like it.",
    "Our office is closed on public holidays.",
    "The cat sleeps on the warm windowsill.",
)
ANSWER_SECONDS = 60.0
"""How long the daemon may take until it answers."""
READY_SECONDS = 600.0
STOP_SECONDS = 60.0
"""More than the daemon's own deadlines for draining and stopping together."""
_POLL_SECONDS = 0.1
_AGAIN_SECONDS = 1.0
_TRIED_PORTS = 20
_ALREADY_RUNNING = 75
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def model_folder(root: Path) -> Path:
    """The sentence-transformers folder somewhere below ``root``, its weights checked."""
    for found in sorted(root.rglob("modules.json")):
        weights = found.with_name("model.safetensors")
        if found.with_name("config.json").is_file() and weights.is_file():
            with weights.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            if digest != WEIGHTS_SHA256:
                raise Failure(
                    f"The weights {weights} aren't those of {NAME}; remove {root} and run "
                    "`make run` again."
                )
            return found.parent
    raise Failure(f"There is no model in {root}; remove the folder and run `make run` again.")


def free_port(first: int = DEFAULT_PORT) -> int:
    """The first TCP port from ``first`` on that nobody listens on."""
    for port in range(first, first + _TRIED_PORTS):
        with socket.socket() as probe:
            # As the daemon will: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen(1)
            except OSError:
                continue
            return port
    raise Failure(f"The ports {first} to {first + _TRIED_PORTS - 1} are all in use; free one.")


@contextmanager
def runtime_folder(state: Path) -> Iterator[Path]:
    """A folder for the control socket: in ``state``, or a temporary one where that is too long."""
    chosen = state / "run"
    if len(os.fsencode(chosen / "control.sock")) <= SOCKET_PATH_LIMIT:
        yield chosen
        return
    temporary = Path(tempfile.mkdtemp(prefix="tursi-", dir="/tmp"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Hold the demo's lock on ``state``, or say that another demo does."""
    with (state / "demo.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                f"A demo already runs on {state}; use that one, or stop it with Ctrl-C first."
            ) from None
        yield


class Daemon:
    """A child ``twistd -n tursi`` that doesn't outlive this process."""

    def __init__(self, state: Path, runtime: Path, port: int) -> None:
        self.log = state / "daemon.log"
        self.url = f"http://127.0.0.1:{port}"
        self.connection = Connection(runtime / "control.sock")
        configuration = state / "demo.toml"
        configuration.write_text(
            "[[http.listeners]]\n"
            f'endpoint = "tcp:{port}:interface=127.0.0.1:backlog=1024"\n'
            'roles = ["inference", "health", "metrics"]\n'
        )
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(TWISTD),
                    "-n",
                    "--pidfile=",
                    "tursi",
                    f"--config={configuration}",
                    f"--state={state}",
                    f"--runtime={runtime}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for this process, which then stops the daemon in order.
                process_group=0,
                preexec_fn=lambda: prctl(_DEATH_SIGNAL, signal.SIGTERM),  # noqa: PLW1509 - one thread here, and no more than a system call
            )

    def wait_until_it_answers(self) -> dict[str, Any]:
        """Its status; ``Failure`` with its own last line if it ends instead."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise self.ended()
            try:
                status: dict[str, Any] = self.connection.get("/status")
            except Failure as error:
                if error.exit_code not in {Exit.NO_DAEMON, Exit.TRY_LATER}:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                # Another daemon may answer there; it isn't ours to use.
                if status["pid"] == self.process.pid:
                    return status
                time.sleep(_POLL_SECONDS)
        raise Failure(f"The daemon doesn't answer within {ANSWER_SECONDS:.0f} s; see {self.log}.")

    def ended(self) -> Failure:
        """That it has ended by itself, in its own words where it had some."""
        lines = self.log.read_text(errors="replace").splitlines()
        own = [text.removeprefix("tursi: ") for text in lines if text.startswith("tursi: ")]
        if own:
            return Failure(own[-1])
        return Failure(f"The daemon ended with status {self.process.returncode}; see {self.log}.")

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after a while, or at a second Ctrl-C."""
        self.connection.close()
        if self.process.poll() is not None:
            return
        note("Stopping the daemon ...")
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()
            self.process.wait()
            note("It took too long and was killed; nothing is lost.")


def started(state: Path, runtime: Path) -> Daemon:
    """A daemon that answers.

    Only one demo runs at a time, so a daemon that still holds the state folder
    is that of a demo that was killed, and about to end.
    """
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        port = free_port()
        daemon = Daemon(state, runtime, port)
        try:
            note(f"Starting the daemon on port {port} (log: {daemon.log}) ...")
            daemon.wait_until_it_answers()
        except BaseException as error:
            daemon.stop()
            waiting = daemon.process.returncode == _ALREADY_RUNNING
            if not (isinstance(error, Failure) and waiting and time.monotonic() < deadline):
                raise
            note("An earlier daemon is still stopping ...")
            time.sleep(_AGAIN_SECONDS)
        else:
            return daemon


def deploy(connection: Connection, folder: Path) -> None:
    """Deploy the model and wait until it is ready."""
    body = {"name": NAME, "model": str(folder)}
    status = connection.call("POST", "/deployments", body=body).body["deployment"]
    if look(status).verdict is not Verdict.READY:
        status = wait(connection, status, seconds=READY_SECONDS, shown=display())
    line(f"{NAME} is ready ({status['task']}, {status['device']}, {status['dtype']}).")


def compare(connection: Connection) -> None:
    """Ask how similar the sentences are, and show it."""
    inputs = {"source_sentence": QUESTION, "sentences": SENTENCES}
    scores = connection.call("POST", path("models", NAME), body={"inputs": inputs}).body
    line("")
    line(f"How similar are these sentences to {QUESTION!r}?")
    line("")
    ranked = sorted(zip(scores, SENTENCES, strict=True), reverse=True)
    table(
        ("COSINE", "", "SENTENCE"),
        [(f"{score:.3f}", "#" * max(round(20 * score), 0), sentence) for score, sentence in ranked],
    )


def examples(url: str, socket_path: Path) -> str:
    """Commands and code to copy, for a daemon at ``url``."""
    command = shlex.join(
        [str(Path(sys.executable).with_name("tursi")), "--socket", str(socket_path)]
    )
    return f"""
Try it from another terminal:

  curl {url}/v1/embeddings -H 'Content-Type: application/json' \\
    -d '{{"model": "{NAME}", "input": "Hello, world"}}'

  curl {url}/models/{NAME} -H 'Content-Type: application/json' \\
    -d '{{"inputs": {{"source_sentence": "Hello", "sentences": ["Hi there", "Goodbye"]}}}}'

  {command} run {NAME} 'A cat sits' 'A feline rests' 'Stocks fell'
  {command} ps

In Python (pip install openai):

  from openai import OpenAI

  client = OpenAI(base_url="{url}/v1", api_key="unused")
  answer = client.embeddings.create(model="{NAME}", input=["Hello, world"])
  print(len(answer.data[0].embedding), "dimensions")

Ctrl-C stops the daemon; what is deployed comes back with the next `make run`."""


def serve(state: Path, model: Path) -> int:
    """Run the demo until it is interrupted; the exit status."""
    state = state.absolute()
    state.mkdir(mode=0o750, parents=True, exist_ok=True)
    folder = model_folder(model.absolute())
    with only_one(state), runtime_folder(state) as runtime:
        daemon = started(state, runtime)
        try:
            deploy(daemon.connection, folder)
            compare(daemon.connection)
            click.echo(examples(daemon.url, daemon.connection.socket))
            daemon.process.wait()
            raise daemon.ended()
        finally:
            daemon.stop()


def main(arguments: Sequence[str]) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tursi.cli.demo", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="folder of the daemon's state")
    parser.add_argument("--model", type=Path, required=True, help="folder with the model in it")
    options = parser.parse_args(arguments)
    tolerate()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return serve(options.state, options.model)
    except Failure as error:
        error.show()
        return int(error.exit_code)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

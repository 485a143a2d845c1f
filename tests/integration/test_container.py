"""The daemon as the first process of a container: of a PID namespace, where these are allowed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from daemon import Daemon
from patience import until

UNSHARE: tuple[str, ...] = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")
if os.getuid() != 0:
    UNSHARE = (*UNSHARE, "--user", "--map-root-user")


def allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=30, check=False).returncode
        == 0
    )


pytestmark = pytest.mark.skipif(not allowed(), reason="PID namespaces aren't allowed here")


class Contained(Daemon):
    """A daemon that is process 1 of its namespace."""

    def arguments(self, *twistd: str) -> list[str]:
        return [*UNSHARE, *super().arguments(*twistd)]

    @property
    def first(self) -> psutil.Process:
        """Process 1, as it is seen from outside."""
        assert self.process is not None
        (found,) = psutil.Process(self.process.pid).children()
        return found


@pytest.fixture
def contained() -> Iterator[Contained]:
    with tempfile.TemporaryDirectory(prefix="tursi-") as folder:
        one = Contained(Path(folder), scripted=True)
        one.start()
        try:
            yield one
        finally:
            if one.process is not None and one.process.poll() is None:
                one.first.kill()
                one.process.wait(30)
            one.close()


def within(contained: Contained, command: str) -> None:
    """Run a command in the namespace, as ``podman exec`` does."""
    enter = ("nsenter", "--target", str(contained.first.pid), "--pid", "--mount")
    subprocess.run([*enter, "sh", "-c", command], check=True, timeout=30)


def dead(contained: Contained) -> list[psutil.Process]:
    return [each for each in contained.first.children() if each.status() == psutil.STATUS_ZOMBIE]


def test_process_1_buries_the_dead_of_others_and_drains_at_sigterm(contained: Contained) -> None:
    status = Path(f"/proc/{contained.first.pid}/status").read_text()
    assert status.partition("NSpid:")[2].splitlines()[0].split()[-1] == "1"
    contained.deploy("echo", contained.script(echo=True, delay=1.0))
    contained.wait("echo")

    if os.getuid() == 0:
        # Left by somebody who has ended: it falls to process 1.
        within(contained, "(sleep 0.1 &) ; (setsid sleep 0.1 &) ; exit 0")
        until(lambda: dead(contained), "they have ended", 5)
        until(lambda: not dead(contained), "they are buried", 40)

    # A worker whose keeper is killed falls to it too, and goes.
    worker = contained.status("echo")["workers"][0]["pid"]
    keeper = next(
        each
        for each in contained.first.children()
        if worker in [int(line.split()[-1]) for line in nspids(each)]
    )
    keeper.kill()
    until(lambda: contained.status("echo")["workers"][0]["pid"] not in {worker, None}, "another")
    contained.wait("echo")

    answers: list[int] = []
    body = {"model": "echo", "input": "hello"}
    asking = threading.Thread(
        target=lambda: answers.append(
            contained.client.post("/v1/embeddings", json=body).status_code
        )
    )
    asking.start()
    until(lambda: contained.status("echo")["in_flight"] == 1, "the request is with the worker")
    first = contained.first
    first.send_signal(signal.SIGTERM)
    asking.join(60)
    assert answers == [200]
    assert contained.process is not None
    # The kernel lets no signal end process 1 by default: it must exit by itself.
    assert contained.process.wait(60) == 0
    assert not contained.tree()


def nspids(process: psutil.Process) -> list[str]:
    """Of a keeper's children: their pids in every namespace."""
    found = []
    for child in process.children():
        status = Path(f"/proc/{child.pid}/status").read_text()
        found.append(status.partition("NSpid:")[2].splitlines()[0])
    return found

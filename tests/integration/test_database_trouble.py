"""A real daemon whose database is full, locked, copied, damaged or put back."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from daemon import Daemon, daemon
from patience import until
from small_disk import SmallDisk, may_mount

TURSI = Path(sys.executable).with_name("tursi")
SECRET = "xyzzy-the-quick-secret"
SETTINGS = "[workers]\nbackoff_initial = 0.2\nmax_failures = 50\n"


@pytest.fixture
def running() -> Iterator[Daemon]:
    with daemon(scripted=True, settings=SETTINGS) as one:
        yield one


def tursi(running: Daemon, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TURSI, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=running.folder,
        env={
            **os.environ,
            "TURSI_STATE_DIR": str(running.state),
            "TURSI_RUNTIME_DIR": str(running.runtime),
        },
    )


def ask(running: Daemon, model: str, text: str = "hello") -> int:
    body = {"model": model, "input": text}
    return running.client.post("/v1/embeddings", json=body).status_code


def audited(running: Daemon, **query: object) -> list[dict[str, Any]]:
    answer = running.control.get("/audit", params={k: str(v) for k, v in query.items()})
    assert answer.status_code == 200, answer.text
    entries: list[dict[str, Any]] = answer.json()["entries"]
    return entries


# -- what is kept, and what never --------------------------------------------------


def test_nothing_of_what_models_are_asked_or_answer_is_kept(running: Daemon) -> None:
    folder = running.script(echo=True, die_on="die of this", delay=0.01)
    running.deploy("echo", folder)
    running.wait("echo")
    body = {"model": "echo", "input": f"{SECRET} in, and back out"}
    answer = running.client.post("/v1/embeddings", json=body)
    assert (answer.status_code, SECRET in answer.text) == (200, True)
    asked: tuple[tuple[str, dict[str, Any]], ...] = (
        ("/v1/embeddings", {"model": "echo", "input": f"{SECRET}: die of this"}),
        ("/v1/embeddings", {"model": "echo", "input": [[SECRET]], "nonsense": SECRET}),
        ("/v1/chat/completions", {"model": "echo", "messages": [SECRET]}),
        ("/v1/embeddings", {"model": "echo", "input": SECRET, "encoding_format": SECRET}),
    )
    for url, bad in asked:
        running.client.post(url, json=bad)
    running.client.post("/v1/embeddings", content=f'{{"model": "echo", {SECRET}')
    # Poison: two workers die of it.
    running.client.post("/v1/embeddings", json={"model": "echo", "input": f"{SECRET}: die of this"})
    running.control.put("/deployments/echo", content=f'{{"model": {SECRET}')
    running.wait("echo")
    until(lambda: running.control.get("/deployments/echo/crashes").json()["crashes"], "a crash")
    assert running.stop() == 0
    files = [each for each in running.folder.rglob("*") if each.is_file()]
    assert {"tursi.sqlite", "daemon.log"} <= {each.name for each in files}
    assert any(each.suffix == ".log" and each.parent.name == "echo" for each in files)
    assert [str(each) for each in files if SECRET.encode() in each.read_bytes()] == []


def test_the_audit_tells_who_did_what(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    running.control.delete("/deployments/none", headers={"x-request-id": "mine"})
    running.control.delete("/deployments/echo", headers={"Origin": "https://evil.example"})
    found = [(e["action"], e["target"], e["status"], e["code"]) for e in audited(running)]
    assert found == [
        ("deployments.put", "echo", 201, None),
        ("deployments.remove", "none", 404, "deployment_not_found"),
        ("deployments.remove", "echo", 403, "origin_refused"),
    ]
    assert {(e["by"], e["uid"]) for e in audited(running)} == {(f"uid {os.getuid()}", os.getuid())}
    [mine] = audited(running, target="none", since="2026-01-01T00:00:00Z")
    assert mine["request"] == "mine"
    shown = tursi(running, "audit", "--since", "1h", "--action", "deployments", "-n", 2)
    assert [line.split()[4:6] for line in shown.stdout.splitlines()[1:]] == [
        [str(os.getuid()), "deployments.remove"]
    ] * 2
    # A kill -9 takes nothing of it away.
    running.kill()
    running.start()
    assert len(audited(running)) == 3
    with closing(sqlite3.connect(running.state / "tursi.sqlite")) as file:
        for statement in (
            "UPDATE audit SET by = 'nobody'",
            "DELETE FROM audit WHERE id = 2",
            "DELETE FROM audit",
            "INSERT OR REPLACE INTO audit (id, at, by, action) VALUES (1, 1, 'nobody', 'x')",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                file.execute(statement)


# -- copies ------------------------------------------------------------------------


def test_backup_check_and_restore(running: Daemon) -> None:
    running.deploy("old", running.script(echo=True))
    copy = running.folder / "copy.sqlite"
    done = tursi(running, "db", "backup", copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is backed up in" in done.stdout
    assert copy.stat().st_mode & 0o777 == 0o600
    assert tursi(running, "db", "backup", copy).returncode == 2
    checked = tursi(running, "db", "check")
    assert checked.stdout.endswith("It is whole.\n")
    running.deploy("new", running.script(echo=True))
    refused = tursi(running, "db", "restore", copy)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "already running" in refused.stderr
    assert running.stop() == 0
    # The same without a daemon.
    again = tursi(running, "db", "backup", "--json", running.folder / "again.sqlite")
    assert json.loads(again.stdout)["size"] > 0
    assert tursi(running, "db", "check").stdout.endswith("It is whole.\n")
    restored = tursi(running, "db", "restore", copy)
    assert (restored.returncode, restored.stderr) == (0, "")
    running.start()
    names = [one["name"] for one in running.control.get("/deployments").json()["deployments"]]
    assert names == ["old"]
    assert audited(running)[-1]["action"] == "database.restore"


def test_a_damaged_database_stops_the_start_until_it_is_restored(running: Daemon) -> None:
    running.deploy("echo", running.script(echo=True))
    copy = running.folder / "tursi.sqlite.v1"
    assert tursi(running, "db", "backup", copy).returncode == 0
    running.kill()
    path = running.state / "tursi.sqlite"
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    # Not the first page: opening and reading a row would not notice.
    content[4096 * 3 : 4096 * 4] = b"\xa5" * 4096
    path.write_bytes(content)
    copy.rename(path.with_name(copy.name))
    before = {each: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
    for scripted in (False, True):
        running.scripted = scripted
        started = subprocess.run(
            running.arguments("-n", "--pidfile="),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=running.environment(),
        )
        assert started.returncode == 78
        [line] = started.stderr.splitlines()
        assert "is damaged" in line
        assert f"`tursi db restore {path}.v1`" in line
    assert {each: each.read_bytes() for each in before} == before
    assert tursi(running, "db", "check").returncode == 1
    assert tursi(running, "db", "restore", f"{path}.v1").returncode == 0
    running.start()
    assert running.status("echo")["name"] == "echo"


# -- no room ------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[SmallDisk]:
    if not may_mount():
        pytest.skip("a file system can't be mounted here")
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    running = SmallDisk(folder, scripted=True, settings=SETTINGS)
    try:
        running.start()
        yield running
    finally:
        running.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_full_disk_stops_changes_only_and_is_got_over_alone(small_disk: SmallDisk) -> None:
    running = small_disk
    folder = running.script(echo=True)
    chatty = running.script("chatty", echo=True, flood=20_000, at=2)
    running.deploy("echo", folder)
    running.deploy("chatty", chatty)
    running.wait("echo")
    running.wait("chatty")
    running.fill()

    def put(number: int) -> int:
        return running.control.put(
            f"/deployments/d{number}", json={"model": str(folder), "device": "cpu"}
        ).status_code

    # The log of the database has some room of its own at first.
    statuses = [put(number) for number in range(300)]
    assert 507 in statuses
    created = statuses.count(201)
    running.fill()
    assert put(1000) == 507
    answer = running.control.put("/deployments/x", json={"model": str(folder)})
    assert answer.json()["error"]["code"] == "database_full"
    # Reading and inference go on, also of workers whose log has no room.
    assert running.control.get("/deployments/echo").json()["ready"] == 1
    assert running.control.get("/events").status_code == 200
    assert audited(running) != []
    for name in ("echo", "chatty", "chatty", "chatty"):
        assert ask(running, name) == 200
    running.control.post("/deployments/echo/restart")
    metrics = running.client.get("/metrics").text
    assert "tursi_notes_waiting 0.0" not in metrics
    running.filler.unlink()
    until(lambda: put(1001) in {200, 201}, "the database takes changes again")
    until(
        lambda: "tursi_notes_waiting 0.0" in running.client.get("/metrics").text,
        "the notes that had to wait are written",
    )
    [refused] = audited(running, target="d1000")
    assert refused["status"] == 507
    deployments = running.control.get("/deployments").json()["deployments"]
    assert len(deployments) == created + 3
    assert "Traceback" not in running.log.read_text()


def test_a_start_on_a_full_disk_says_so() -> None:
    if not may_mount():
        pytest.skip("a file system can't be mounted here")
    folder = Path(tempfile.mkdtemp(prefix="tursi-"))
    running = SmallDisk(folder, scripted=True)
    try:
        command = running.arguments("-n", "--pidfile=")
        fill = 'dd if=/dev/zero of="$0/filler" bs=1k; exec "$@"'
        at = command.index(str(running.state)) + 1
        command[at:at] = ["sh", "-c", fill, str(running.state)]
        started = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=running.environment(),
        )
        assert started.returncode == 69
        assert f"tursi: The disk of {running.state} is full; free" in started.stderr
        assert "Traceback" not in started.stderr
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# -- no lock ------------------------------------------------------------------------


def test_a_lock_that_another_holds_delays_changes_only(running: Daemon) -> None:
    folder = running.script(echo=True)
    running.deploy("echo", folder)
    running.wait("echo")
    outcomes: list[tuple[int, str | None, float]] = []

    def put(number: int) -> None:
        begin = time.monotonic()
        answer = running.control.put(f"/deployments/d{number}", json={"model": str(folder)})
        outcomes.append(
            (answer.status_code, answer.headers.get("Retry-After"), time.monotonic() - begin)
        )

    with closing(sqlite3.connect(running.state / "tursi.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        changing = [threading.Thread(target=put, args=(number,)) for number in range(5)]
        for each in changing:
            each.start()
        slowest = 0.0
        while any(each.is_alive() for each in changing):
            begin = time.monotonic()
            assert running.client.get("/live").status_code == 200
            assert ask(running, "echo") == 200
            slowest = max(slowest, time.monotonic() - begin)
        assert running.control.get("/events").status_code == 200
        other.execute("ROLLBACK")
    assert [(status, after) for status, after, _ in outcomes] == [(503, "5")] * 5
    # Those in the queue don't each wait anew.
    assert max(seconds for _, _, seconds in outcomes) < 20
    assert slowest < 1.5
    put(9)
    assert outcomes[-1][0] == 201
    # What had to wait is there: the changes that were refused, and how often it was asked.
    until(lambda: len(audited(running)) == 7, "the entries of the audit that had to wait")
    until(
        lambda: running.control.get("/deployments/echo/statistics").json()["periods"],
        "statistics",
    )

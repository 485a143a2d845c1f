"""Copies of the database: made, looked through, and put back, whenever that is cut off."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import InlineConnectionPool, InlineReactor, result

from twisted.internet.defer import Deferred

from tursi import database, mounts
from tursi.errors import DatabaseBusy, DatabaseError
from tursi.lock import StateLock
from tursi.model import AuditQuery
from tursi.mounts import file_system
from tursi.store import Store, backup, file, inspect, prepare, report, restore, schema


def opened(path: Path) -> Store:
    prepare(path)
    running = Store(path, InlineReactor(), InlineConnectionPool)
    running.start()
    return running


def written(path: Path, message: str, count: int = 1) -> Path:
    """A database with an event of that message."""
    path.parent.mkdir(exist_ok=True)
    running = opened(path)
    for _ in range(count):
        result(running.record(1.0, "note", message))
    result(running.stop())
    return path


def message(path: Path) -> str:
    other = sqlite3.connect(path)
    ((text,),) = other.execute("SELECT DISTINCT message FROM events").fetchall()
    other.close()
    return str(text)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4096 * 4 : -4096 * 3] = b"\xa5" * 4096
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "tursi.sqlite"


def test_a_copy_is_made_while_others_write(path: Path) -> None:
    running = opened(written(path, "old"))
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE events SET message = 'new'")
    copy = result(running.backup())
    writer.execute("COMMIT")
    writer.close()
    assert message(copy) == "old"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert result(running.backup()) == copy
    assert message(copy) == "new"
    with pytest.raises(DatabaseError, match="exists already"):
        backup(path, copy, in_use=True)
    assert result(running.report()).problems == ()
    result(running.stop())
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, copy.name]


def test_the_file_is_read_through_by_one_at_a_time(path: Path) -> None:
    class Waiting(InlineConnectionPool):
        waiting: list[Deferred[Any]] = []  # noqa: RUF012 - for this test only

        def runWithConnection(self, func: Any, *args: Any, **kw: Any) -> Deferred[Any]:  # noqa: N802
            self.waiting.append(Deferred())
            return self.waiting[-1]

    prepare(written(path, "x"))
    running = Store(path, InlineReactor(), Waiting)
    running.start()
    first: Deferred[Any] = running.report()
    with pytest.raises(DatabaseBusy, match="read through"):
        result(running.backup())
    Waiting.waiting.pop().callback("report")
    assert result(first) == "report"
    second = running.report()
    stopped = running.stop()
    assert not stopped.called
    Waiting.waiting.pop().callback(None)
    result(second)
    result(stopped)


def test_a_report_lists_what_is_not_whole(path: Path) -> None:
    written(path, "x" * 200, 500)
    whole = report(path, in_use=False)
    assert (whole.problems, whole.schema) == ((), len(schema.UPGRADES))
    assert whole.size == path.stat().st_size
    other = sqlite3.connect(path)
    other.execute(
        "INSERT INTO resolutions (deployment, generation, model, at) VALUES ('no', 1, 1, 1)"
    )
    other.commit()
    other.close()
    assert "resolutions" in report(path, in_use=False).problems[0]
    damage(path)
    assert report(path, in_use=False).problems


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [("application_id=1", "another program"), ("user_version=99", "newer Tursi")],
)
def test_a_report_is_of_our_files_only(path: Path, statement: str, sentence: str) -> None:
    written(path, "x")
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA {statement}")
    other.close()
    with pytest.raises(DatabaseError, match=sentence):
        report(path, in_use=False)


def test_what_is_damaged_is_said(path: Path) -> None:
    written(path, "x" * 200, 500)
    other = sqlite3.connect(path)
    (page,) = other.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()
    other.close()
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match=r"damaged \([^*]+\)"):
        inspect(path)


def test_a_restored_file_stands_in_the_place_of_the_old_one(path: Path, tmp_path: Path) -> None:
    backup(written(path, "old"), tmp_path / "copy", in_use=False)
    before = (tmp_path / "copy").read_bytes()
    path.unlink()
    written(path, "new")
    path.with_name("tursi.sqlite-wal").write_bytes(b"of the old file")
    aside = restore(tmp_path / "copy", path, by="uid 7", uid=7, at=99.0)
    assert aside is not None
    assert aside.with_name(f"{aside.name}-wal").read_bytes() == b"of the old file"
    aside.with_name(f"{aside.name}-wal").unlink()
    assert (message(path), message(aside)) == ("old", "new")
    assert (tmp_path / "copy").read_bytes() == before
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name, aside.name]
    running = opened(path)
    [entry] = result(running.audit(AuditQuery()))
    assert (entry.by, entry.uid, entry.at, entry.action) == ("uid 7", 7, 99.0, "database.restore")
    assert entry.target == str(tmp_path / "copy")
    result(running.stop())


def test_a_file_that_is_missing_or_damaged_can_be_restored(path: Path, tmp_path: Path) -> None:
    backup(written(path, "old" * 100, 500), tmp_path / "copy", in_use=False)
    damage(path)
    with pytest.raises(DatabaseError, match="damaged"):
        prepare(path)
    assert restore(tmp_path / "copy", path, by="x", uid=0, at=1.0) is not None
    prepare(path)
    path.unlink()
    assert restore(tmp_path / "copy", path, by="x", uid=0, at=1.0) is None
    assert message(path) == "old" * 100


def _foreign(path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE x (y)")
    other.close()


def _newer(path: Path) -> None:
    written(path, "x")
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version=1000")
    other.close()


def _damaged(path: Path) -> None:
    damage(written(path, "x" * 200, 500))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_foreign, "another program"),
        (_newer, "newer Tursi"),
        (_damaged, "damaged"),
        (lambda path: path.write_bytes(b"no database at all, however you look at it" * 9), "isn't"),
        (Path.touch, "is empty"),
        (Path.mkdir, "no file"),
        (lambda path: None, "no file"),
    ],
)
def test_what_is_no_backup_is_not_restored(
    path: Path, tmp_path: Path, make: Callable[[Path], None], sentence: str
) -> None:
    before = written(path, "x").read_bytes()
    make(tmp_path / "copy")
    with pytest.raises(DatabaseError, match=f"{sentence}.*choose another backup"):
        restore(tmp_path / "copy", path, by="x", uid=0, at=1.0)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with pytest.raises(DatabaseError, match="the database itself"):
        restore(path, path, by="x", uid=0, at=1.0)


class Killed(BaseException):
    """Stands for the end of the process."""


def limited(patch: pytest.MonkeyPatch, steps: int) -> list[None]:
    """Let only so many calls change a folder or write through; the answer shrinks by each."""
    left: list[None] = [None] * steps

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            if not left:
                raise Killed
            left.pop()
            return call(*args, **keywords)

        return wrapped

    for name in ("rename", "replace", "unlink"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    for name in ("fsync", "open"):
        patch.setattr(os, name, counted(getattr(os, name)))
    return left


def test_a_restore_that_is_cut_off_is_done_or_not(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(written(path, "old"), tmp_path / "copy", in_use=False)
    path.unlink()
    outcomes = []
    for steps in range(100):
        for each in path.parent.iterdir():
            each.unlink()
        written(path, "new")
        path.with_name("tursi.sqlite-wal").write_bytes(b"")
        try:
            with monkeypatch.context() as patch:
                left = limited(patch, steps)
                restore(tmp_path / "copy", path, by="x", uid=0, at=1.0)
        except Killed:
            pass
        inspect(path)
        prepare(path)
        outcomes.append(message(path))
        asides = [each for each in path.parent.iterdir() if "replaced" in each.name]
        if outcomes[-1] == "old":
            assert any(message(each) == "new" for each in asides if each.suffix[-4:] != "-wal")
        else:
            assert asides == []
        if left:
            break
    # Never back again once it is done.
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {"new", "old"}
    assert len(outcomes) > 10


# -- where it lies ------------------------------------------------------------------

MOUNTS = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:20 / /home rw - nfs4 server:/home rw
24 23 0:21 / /home/me/my\040disk rw master:1 - btrfs /dev/sdb rw
25 22 0:22 / /mnt rw - ext4 /dev/sdc rw
26 22 0:23 / /mnt rw - fuse.sshfs me@there: rw
nonsense
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/var/lib/tursi", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/x", "nfs4"),
        ("/home/me/my disk/x", "btrfs"),
        ("/homes", "ext4"),
        ("/mnt/x", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_folder(folder: str, kind: str) -> None:
    assert file_system(MOUNTS, Path(folder)) == kind
    assert file_system("", Path(folder)) == ""


def test_a_network_file_system_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mounted = tmp_path / "mounts"
    mounted.write_text("22 1 8:1 / / rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(mounts, "MOUNTS", mounted)
    path.parent.mkdir()
    for look in (inspect, prepare):
        with pytest.raises(DatabaseError, match=r"network file system \(nfs4\)"):
            look(path)
    assert not path.exists()


def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    written(tmp_path / "there" / "real.sqlite", "x")
    path.parent.mkdir()
    path.symlink_to(tmp_path / "there" / "real.sqlite")
    for look in (inspect, prepare):
        with pytest.raises(DatabaseError, match="symbolic link"):
            look(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(path: Path) -> None:
    written(path, "x")
    os.chown(path, 12345, 12345)
    inspect(path)  # root may be about to become that user
    with pytest.raises(DatabaseError, match=r"belongs to user 12345.*chown"):
        prepare(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_file_that_may_not_be_read_is_refused() -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    path = written(folder / "tursi.sqlite", "x")
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setresuid(12345, 12345, 12345)
            inspect(path)
        except DatabaseError as error:
            status = 0 if "belongs to user 0" in error.message else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(folder)


# -- the tool ------------------------------------------------------------------------


def tool(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-I", "-m", "tursi.database", *map(str, arguments)],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


def test_the_tool(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    assert tool("check", path.parent)[1]["error"]["message"].startswith("There is no folder")
    path.parent.mkdir()
    assert tool("check", path.parent)[1]["error"]["message"].startswith("There is no database")
    written(path, "old")
    assert tool("backup", path.parent, copy) == (
        0,
        {"file": str(copy), "size": copy.stat().st_size},
    )
    assert tool("check", path.parent)[1]["problems"] == []
    status, answer = tool("restore", path.parent, copy)
    assert status == 0
    assert message(Path(answer["replaced"])) == "old"
    lock = StateLock(path.parent)
    lock.acquire()
    for action in (("check",), ("backup", copy), ("restore", copy)):
        status, answer = tool(action[0], path.parent, *action[1:])
        assert (status, answer["error"]["code"]) == (1, "already_running")
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_restores_is_the_folders_owners(path: Path, tmp_path: Path) -> None:
    backup(written(path, "old"), tmp_path / "copy", in_use=False)
    for each in (path.parent, path):
        os.chown(each, 12345, 12345)
    assert database.main(["restore", str(path.parent), str(tmp_path / "copy")]) == 0
    for name in ("tursi.sqlite", "tursi.lock"):
        assert path.with_name(name).stat().st_uid == 12345


def test_a_log_that_only_a_writer_can_read_stops_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seen once, after the kill of a writer: SQLite gives up after ten seconds.
    path = tmp_path / "tursi.sqlite"
    prepare(path)
    identify, refused = file.identify, 0

    def refuse(connection: sqlite3.Connection, path: Path, *, hint: str | None = None) -> int:
        nonlocal refused
        if not refused:
            refused += 1
            error = sqlite3.OperationalError("locking protocol")
            error.sqlite_errorcode = sqlite3.SQLITE_PROTOCOL
            raise error
        return identify(connection, path, hint=hint)

    monkeypatch.setattr(file, "identify", refuse)
    prepare(path)
    assert refused == 1

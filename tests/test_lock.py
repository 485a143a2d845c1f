from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from tursi.errors import AlreadyRunning, ConfigurationError
from tursi.lock import StateLock


def test_one_holds_it_and_the_others_are_told_who(tmp_path: Path) -> None:
    first, second = StateLock(tmp_path), StateLock(tmp_path)
    assert second.holder() is None
    first.acquire()
    with pytest.raises(AlreadyRunning, match=rf"already running \(pid {os.getpid()}\)"):
        second.acquire()
    with pytest.raises(AlreadyRunning):
        second.probe()
    assert second.holder() == os.getpid()
    first.release()
    assert second.holder() is None
    second.acquire()
    second.release()


def test_an_orderly_end_leaves_no_pid_and_another_one_does(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.acquire()
    assert lock.last() == os.getpid()
    lock.release()
    assert lock.last() is None
    (tmp_path / "tursi.lock").write_text("4711\n")
    assert (lock.last(), lock.holder()) == (4711, None)


@pytest.mark.parametrize("text", ["0", "-1", "", "many", "\x00", "\xff"])
def test_what_is_no_pid_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tursi.lock").write_text(text, "latin-1")
    lock = StateLock(tmp_path)
    assert lock.last() is None
    lock.acquire()
    assert lock.last() == os.getpid()
    lock.release()


def test_who_only_looks_keeps_nobody_from_starting(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    lock.acquire()
    lock.release()
    looking = os.open(tmp_path / "tursi.lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)

    def look_away() -> None:
        time.sleep(0.1)
        os.close(looking)

    thread = threading.Thread(target=look_away)
    thread.start()
    lock.acquire()
    thread.join()
    lock.release()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / "tursi.lock").symlink_to(other)
    with pytest.raises(ConfigurationError, match="can't be opened"):
        StateLock(tmp_path).acquire()
    assert other.read_text() == "precious"

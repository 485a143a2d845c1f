"""The daemon's own log."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from zope.interface import implementer

from twisted.logger import ILogObserver, LogEvent, Logger, LogLevel
from twisted.python.failure import Failure

from tursi.config import Log
from tursi.logging import DaemonLog

AT = 1_700_000_000.25
STAMP = "2023-11-14T22:13:20.250Z"


@implementer(ILogObserver)
class At:
    """Hands events on as if they were of a certain time."""

    def __init__(self, log: DaemonLog) -> None:
        self._log = log

    def __call__(self, event: LogEvent) -> None:
        self._log({**event, "log_time": AT})


class Book:
    """A log in a file, with a logger that writes to it alone."""

    def __init__(self, path: Path, settings: Log | None = None) -> None:
        self.path = path
        self.now = AT
        self.log = DaemonLog(lambda: self.now)
        self.log.configure(settings or Log())
        self.logger = Logger("tursi.test", observer=At(self.log))

    @property
    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()


@pytest.fixture
def book(tmp_path: Path) -> Book:
    one = Book(tmp_path / "tursi.log")
    one.log.to_file(one.path)
    return one


def test_a_line_has_time_level_and_logger(book: Book) -> None:
    book.logger.info("hello {name}", name="world")
    book.logger.debug("not of interest")
    assert book.lines == [f"{STAMP} info tursi.test: hello world"]


def test_what_comes_before_it_is_open_is_held(tmp_path: Path) -> None:
    book = Book(tmp_path / "tursi.log")
    book.logger.info("early")
    assert not book.path.exists()
    book.log.to_file(book.path)
    book.logger.info("late")
    assert [line.rsplit(" ", 1)[1] for line in book.lines] == ["early", "late"]


def test_no_line_is_forged_and_no_terminal_told_to_do_anything(book: Book) -> None:
    book.logger.info("{text}", text=f"one\n{STAMP} info root: forged\x1b[31m\u2028\r")
    first, second = book.lines
    assert first.endswith(": one")
    assert second == f"    {STAMP} info root: forged\\x1b[31m\\u2028\\x0d"


def test_a_failure_brings_its_traceback(book: Book) -> None:
    book.logger.failure("it failed", Failure(ValueError("broken")))
    assert book.lines[0] == f"{STAMP} critical tursi.test: it failed"
    assert any("ValueError: broken" in line for line in book.lines)


def test_json_is_one_object_a_line(tmp_path: Path) -> None:
    book = Book(tmp_path / "tursi.log", Log(format="json"))
    book.log.to_file(book.path)
    book.logger.warn("two\nlines")
    book.logger.failure("it failed", Failure(ValueError("broken")))
    first, second = map(json.loads, book.lines)
    assert first == {
        "time": STAMP, "level": "warn", "logger": "tursi.test", "message": "two\nlines"
    }  # fmt: skip
    assert "ValueError: broken" in second["traceback"]


@pytest.mark.parametrize("level", ["debug", "info", "warn", "error"])
def test_levels(tmp_path: Path, level: str) -> None:
    book = Book(tmp_path / "tursi.log", Log(level=level))  # type: ignore[arg-type] # one of them
    book.log.to_file(book.path)
    names = [each.name for each in LogLevel.iterconstants()]
    for each in LogLevel.iterconstants():
        book.logger.emit(each, "x")
    assert [line.split()[1] for line in book.lines] == names[names.index(level) :]


def test_debug_messages_are_switched_on_and_off(book: Book) -> None:
    assert book.log.toggle_debug()
    book.logger.debug("one")
    assert not book.log.toggle_debug()
    book.logger.debug("two")
    assert [line.split(": ")[1] for line in book.lines] == ["one"]


@pytest.mark.parametrize("old", [0, 1, 3])
def test_files_stay_within_their_bounds_and_so_does_their_number(tmp_path: Path, old: int) -> None:
    book = Book(tmp_path / "tursi.log", Log(max_bytes=1024, old_files=old))
    book.log.to_file(book.path)
    for number in range(200):
        book.logger.info("line {number:04}", number=number)
    files = sorted(tmp_path.iterdir())
    assert [each.name for each in files] == [
        "tursi.log", *(f"tursi.log.{number}" for number in range(1, old + 1))
    ]  # fmt: skip
    assert all(each.stat().st_size <= 1024 for each in files)
    assert all(each.stat().st_mode & 0o777 == 0o640 & ~0o022 for each in files)
    kept = [line for each in reversed(files) for line in each.read_text().splitlines()]
    assert [int(line[-4:]) for line in kept] == list(range(200 - len(kept), 200))


def test_a_file_that_was_moved_away_is_begun_anew(book: Book, tmp_path: Path) -> None:
    book.logger.info("before")
    book.path.rename(tmp_path / "tursi.log.old")
    book.logger.info("between")
    book.log.reopen()
    book.logger.info("after")
    assert len((tmp_path / "tursi.log.old").read_text().splitlines()) == 2
    assert len(book.lines) == 1


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    book = Book(Path("/dev/full"))
    book.log.to_file(book.path)
    book.logger.info("lost")
    book.logger.info("lost too")
    assert book.log.dropped == 2


def test_a_folder_that_vanishes_costs_lines_until_it_is_back(book: Book, tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    book.log.to_file(folder / "tursi.log")
    (folder / "tursi.log").unlink()
    folder.rmdir()
    book.log.reopen()
    book.logger.info("lost")
    folder.mkdir()
    book.now += 2
    book.logger.info("kept")
    assert book.log.dropped == 1
    assert len((folder / "tursi.log").read_text().splitlines()) == 1


def test_the_umask_may_take_from_the_mode(tmp_path: Path) -> None:
    book = Book(tmp_path / "tursi.log")
    before = os.umask(0o077)
    try:
        book.log.to_file(book.path)
    finally:
        os.umask(before)
    assert book.path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_followed_for_nobody_else(tmp_path: Path) -> None:
    book = Book(tmp_path / "tursi.log")
    other = tmp_path / "other"
    book.path.symlink_to(other)
    with pytest.raises(OSError, match="symbolic"):
        book.log.to_file(book.path, (os.getuid(), os.getgid()))
    assert not other.exists()
    book.log.to_file(book.path)
    assert other.exists()

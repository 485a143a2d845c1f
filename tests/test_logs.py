from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tursi.supervision import lines
from tursi.supervision.logs import LifeLog, tail

START = 1_700_000_000.25
STAMP = "2023-11-14T22:13:20.250Z"


class Book:
    """A log, the lines it has announced, and the time it sees."""

    def __init__(self, path: Path, size: int = 1024 * 1024, rate: int = 1024 * 1024) -> None:
        self.now = START
        self.lines: list[str] = []
        self.log = LifeLog(path, clock=lambda: self.now, size=size, rate=rate)
        self.log.subscribe(self.lines.append)

    @property
    def texts(self) -> list[str]:
        return [line.split(" ", 1)[1] for line in self.lines]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "life.log"


@pytest.fixture
def book(path: Path) -> Iterator[Book]:
    made = Book(path)
    yield made
    made.log.close()


def test_a_line_has_its_time_stream_and_text(book: Book, path: Path) -> None:
    book.log.feed("out", b"hel")
    book.log.feed("err", b"warning\n")
    book.log.feed("out", b"lo\n")
    book.log.line("the worker has been asked to stop")
    expected = [
        f"{STAMP} err warning",
        f"{STAMP} out hello",
        f"{STAMP} tursi the worker has been asked to stop",
    ]
    assert book.lines == expected
    assert path.read_text().splitlines() == expected
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_unfinished_line_is_written_at_the_end_and_no_blank_one_follows(book: Book) -> None:
    book.log.feed("out", b"whole\n")
    book.log.feed("err", b"Segmentation fa")
    book.log.close()
    book.log.close()
    book.log.feed("out", b"late\n")
    book.log.line("late")
    assert book.texts == ["out whole", "err Segmentation fa"]


def test_a_long_line_is_cut_and_what_follows_it_is_whole(book: Book) -> None:
    for _ in range(100):
        book.log.feed("out", b"x" * 8000)
    book.log.feed("out", b"\nnext\n")
    assert book.texts == ["out " + "x" * 8192 + " [cut]", "out next"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_progress_bar_is_folded_to_its_last_state(book: Book, size: int) -> None:
    bar = b"".join(b"\r%3d%%|###   |" % done for done in range(101)) + b"\nready\r\n"
    bar += b"10%\r20%\r\n\n"
    for start in range(0, len(bar), size):
        book.log.feed("err", bar[start : start + size])
    assert book.texts == ["err 100%|###   |", "err ready", "err 20%", "err "]


def test_what_could_deceive_a_reader_is_escaped(book: Book) -> None:
    book.log.feed("out", b"\x1b[31mred\x07\x00\tok \xff\xfe \xe2\x80\xae \xc2\x9b Z\xc3\xbcrich\n")
    assert book.texts == [r"out \x1b[31mred\x07\x00" + "\tok " + r"\xff\xfe \u202e \x9b Zürich"]


def test_a_flood_is_dropped_beyond_the_rate_and_counted(path: Path) -> None:
    book = Book(path, rate=10_000)
    for _ in range(1000):
        book.log.feed("out", b"0123456789" * 9 + b"\n")
    assert 50 < len(book.lines) < 120
    kept = len(book.lines)
    book.now += 1
    book.log.feed("out", b"calm again\n")
    dropped = 1000 - kept
    assert book.texts[kept].startswith(f"tursi dropped {dropped} lines (")
    assert book.texts[kept + 1 :] == ["out calm again"]
    book.log.close()


def test_after_a_flood_the_rest_of_a_lost_line_is_no_line(path: Path) -> None:
    book = Book(path, rate=1000)
    book.log.feed("out", b"x" * 1000 + b"\n")
    book.log.feed("out", b"lost beg")
    book.now += 1
    book.log.feed("out", b"inning\nwhole\n")
    assert [text for text in book.texts if "x" not in text] == [
        "tursi dropped 0 lines (8 bytes) that came faster than 1000 bytes a second",
        "out whole",
    ]
    book.log.close()


def test_a_clock_set_back_neither_blocks_nor_opens_the_log(path: Path) -> None:
    book = Book(path, rate=1000)
    book.log.feed("out", b"x" * 1000 + b"\n")
    book.now -= 3600
    book.log.feed("out", b"dropped\n")
    book.now += 2
    book.log.feed("out", b"heard\n")
    assert book.texts[-1] == "out heard"
    book.log.close()


def test_the_files_stay_within_the_size_and_say_what_is_missing(path: Path) -> None:
    book = Book(path, size=20_000)
    for number in range(2000):
        book.log.feed("out", b"line %d\n" % number)
    book.log.feed("out", b"\n" * 8000)
    book.log.feed("out", b"\x00" * 8000 + b"\n" + b"the end\n")
    book.log.close()
    older = path.with_name(path.name + ".1")
    assert path.stat().st_size <= 10_000
    assert older.stat().st_size <= 10_000
    assert "were dropped for the size" in path.read_text()
    assert tail(path, 1) == [f"{STAMP} out the end"]


def test_a_follower_that_fails_is_dropped_and_the_others_go_on(
    book: Book, logged_failures: Any
) -> None:
    def broken(line: str) -> None:
        raise ValueError(line)

    book.log.subscribe(broken)
    unsubscribe = book.log.subscribe(book.lines.append)
    book.log.line("one")
    unsubscribe()
    unsubscribe()
    book.log.line("two")
    assert book.texts == ["tursi one", "tursi one", "tursi two"]
    assert len(logged_failures.flush(ValueError)) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_lines(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    book = Book(tmp_path / "file" / "life.log")
    book.log.feed("out", b"one\ntwo\n")
    book.log.close()
    assert book.texts == ["out one", "out two"]


def test_a_full_disk_costs_only_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "life.log"
    book = Book(path)
    book.log.line("before")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, book.log._file or -1)
    before = LifeLog.unwritten
    book.log.line("lost")
    assert LifeLog.unwritten == before + 1
    os.close(full)
    book.log.close()
    assert book.texts == ["tursi before", "tursi lost"]


def test_tail_reads_both_files_from_their_end(path: Path) -> None:
    book = Book(path, size=200_000, rate=10_000_000)
    for number in range(4000):
        book.log.feed("out", b"line %d\n" % number)
    assert [line.split()[-1] for line in tail(path, 3)] == ["3997", "3998", "3999"]
    many = tail(path, 3500)
    assert [line.split()[-1] for line in many] == [str(number) for number in range(500, 4000)]
    assert tail(path, 0) == []
    assert len(tail(path, 10**6)) > 3500
    book.log.close()


def test_tail_of_nothing(tmp_path: Path) -> None:
    assert tail(tmp_path / "none.log", 10) == []


# -- as JSON ---------------------------------------------------------------------------------


def test_a_line_as_an_object(path: Path) -> None:
    form = lines.structured("echo", 3, 1, "abc")
    log = LifeLog(path, clock=lambda: START, size=100_000, rate=100_000, form=form)
    seen: list[str] = []
    log.subscribe(seen.append)
    log.feed("err", b'WARNING: a "quote", \x1b[31m and \xff\n')
    log.line("the worker has been asked to stop")
    log.close()
    whose = {"deployment": "echo", "generation": 3, "replica": 1, "worker": "abc"}
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    text = 'WARNING: a "quote", \\x1b[31m and \\xff'
    assert first == {"time": STAMP, "stream": "err", **whose, "message": text, "level": "warning"}
    assert second == {
        "time": STAMP, "stream": "tursi", **whose, "message": "the worker has been asked to stop",
    }  # fmt: skip
    assert seen == path.read_text().splitlines()
    assert seen[0].startswith('{"time":"')
    assert [lines.words(line) for line in seen] == [
        ("err", text), ("tursi", "the worker has been asked to stop"),
    ]  # fmt: skip
    assert lines.words(f"{STAMP} out some more words") == ("out", "some more words")


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("ERROR: it failed", "error"),
        ("[WARN] look", "warning"),
        ("INFO loading", "info"),
        ("FATAL", "critical"),
        ("(DEBUG) x", "debug"),
        ("ERRORS are many", None),
        ("an ERROR", None),
        ("error: lower case may be a word", None),
        ("", None),
    ],
)
def test_a_level_is_what_a_line_plainly_begins_with(text: str, level: str | None) -> None:
    assert lines.level_of(text) == level

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tursi import instance
from tursi.instance import Instance

ONE = Instance(
    pid=4711,
    started_at="2026-11-26T14:00:00+00:00",
    version="0.1.0",
    state="/var/lib/tursi",
    cache="/var/cache/tursi",
    configuration=None,
    log="/var/log/tursi/tursi.log",
    listeners=("tcp:8430",),
    foreground=False,
    stop_seconds=75.0,
)


def test_the_status_file_says_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "tursi.json"
    instance.write_status(file, ONE)
    assert instance.read_status(file) == ONE
    instance.write_status(file, replace(ONE, listeners=()))
    assert instance.read_status(file) == replace(ONE, listeners=())
    assert [each.name for each in tmp_path.iterdir()] == ["tursi.json"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"listeners": 3}', "\x00\xff"])
def test_what_is_no_status_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tursi.json"
    assert instance.read_status(file) is None
    file.write_text(text, "latin-1")
    assert instance.read_status(file) is None


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other, file = tmp_path / "other", tmp_path / "tursi.pid"
    other.write_text("precious")
    file.symlink_to(other)
    instance.write_pid(file)
    assert not file.is_symlink()
    assert file.read_text() == f"{os.getpid()}\n"
    assert other.read_text() == "precious"
    instance.remove(file)
    instance.remove(file)
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def test_what_cannot_be_written_leaves_nothing_half(tmp_path: Path) -> None:
    (tmp_path / "tursi.pid").mkdir()
    with pytest.raises(OSError, match="directory"):
        instance.write_pid(tmp_path / "tursi.pid")
    assert [each.name for each in tmp_path.iterdir()] == ["tursi.pid"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_are_right_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        instance.make_folder(tmp_path / "run")
        instance.write_pid(tmp_path / "run" / "tursi.pid")
    finally:
        os.umask(before)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "run" / "tursi.pid").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    instance.make_folder(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o711

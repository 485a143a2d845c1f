"""``tursi export`` and ``import``: what is said while many bytes go by."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tursi.cli.connection import Failure
from tursi.cli.progress import Lines, Transfer
from tursi.cli.target import new_file

MIB = 1 << 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_transfer_tells_its_speed_and_what_is_left() -> None:
    clock = Clock()
    transfer = Transfer("importing", clock)
    assert str(transfer.look(0, 100 * MIB)) == "importing: 0 B of 100 MiB (0 %)"
    for step in range(1, 41):
        clock.now = step / 4
        said = transfer.look(step * MIB, 100 * MIB)
    assert str(said) == "importing at 4 MiB/s, 15 s left: 40 MiB of 100 MiB (40 %)"
    # Of the last seconds only.
    for step in range(1, 81):
        clock.now = 10 + step / 4
        said = transfer.look((40 + step // 4) * MIB, None)
    assert str(said).startswith("importing at 1 MiB/s: 60 MiB")


def test_lines_are_few_whatever_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines, transfer = Lines(clock), Transfer("importing", clock)
    for step in range(200):
        clock.now = step / 10
        lines.show("big", transfer.look(step * step * 1000, 10**9))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert all(each.startswith("big: importing") for each in said)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"%d" % (1 // 0))
    assert [*tmp_path.iterdir()] == []
    with new_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    with pytest.raises(Failure, match="exists already"), new_file(path):
        pytest.fail("it was written over")
    other = tmp_path / "b.tar"
    with pytest.raises(Failure, match="can't be written"), new_file(other) as file:
        other.write_bytes(b"somebody else's")
    assert other.read_bytes() == b"somebody else's"
    (tmp_path / "d.tar").symlink_to("nowhere")
    with pytest.raises(Failure, match="exists already"), new_file(tmp_path / "d.tar"):
        pytest.fail("it was opened")
    assert not [each for each in tmp_path.iterdir() if each.suffix == ".part"]
    with pytest.raises(Failure, match="can't be written"), new_file(tmp_path / "none" / "c"):
        pytest.fail("it was opened")


def test_of_two_commands_that_write_the_same_file_one_does(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    first, second = new_file(path), new_file(path)
    first.__enter__().write(b"first")
    second.__enter__().write(b"second")
    with pytest.raises(Failure, match="Another command"):
        first.__exit__(None, None, None)
    assert not path.exists()
    second.__exit__(None, None, None)
    assert [each.name for each in tmp_path.iterdir()] == ["a.tar"]
    assert path.read_bytes() == b"second"


def test_a_file_system_without_links_takes_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    # As FAT does, which can't be mounted everywhere.
    monkeypatch.setattr("os.link", refuse)
    with new_file(tmp_path / "a.tar") as file:
        file.write(b"whole")
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
    with pytest.raises(Failure, match="not permitted"), new_file(tmp_path / "b.tar"):
        (tmp_path / "b.tar").write_bytes(b"somebody else's")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar", "b.tar"]

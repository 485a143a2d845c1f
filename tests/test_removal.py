from __future__ import annotations

import os
from pathlib import Path

import pytest

from tursi.removal import remove_tree


def test_files_folders_links_sockets_and_all(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    top = tmp_path / "top"
    for folder in ("", "a/b/c", "a/d", "e"):
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / "file").write_text("x")
        (top / folder / "link").symlink_to(outside)
        os.mkfifo(top / folder / "fifo")
    (top / "a/b").chmod(0)
    (top / "e").chmod(0o500)
    remove_tree(str(top))
    assert not top.exists()
    assert (outside / "kept").exists()


def test_deeper_than_a_path_can_be_and_a_stack(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    folder = os.open(top, os.O_RDONLY)
    name = "x" * 100
    for _ in range(3000):
        os.mkdir(name, dir_fd=folder)  # by descriptor: the path would be too long
        below = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    remove_tree(str(top))
    assert not top.exists()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match="link"):
        remove_tree(str(tmp_path / "link"))
    with pytest.raises(FileNotFoundError):
        remove_tree(str(tmp_path / "nothing"))
    assert (tmp_path / "kept").exists()

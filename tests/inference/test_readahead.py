from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tursi.inference.readahead import Readahead, weight_files

MIB = 1024 * 1024


def write_index(folder: Path, *names: object) -> None:
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def test_one_file_or_those_that_the_index_names(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    write_index(tmp_path, "b.safetensors", "a.safetensors", "a.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"weight_map": 1}', "[" * 100_000])
def test_an_index_that_is_none_is_left_to_the_load(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, "utf-8")
    assert weight_files(tmp_path) == []


def test_nothing_outside_of_the_folder_is_read(tmp_path: Path) -> None:
    write_index(tmp_path, "../a.safetensors", "/b.safetensors", 7)
    assert weight_files(tmp_path) == [tmp_path / "7"]


def test_all_of_each_file_is_read(tmp_path: Path) -> None:
    sizes = (5 * MIB + 1, 0, 3)
    paths = [tmp_path / str(number) for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_bytes(bytes(size))
    readahead = Readahead(paths, 20 * MIB)
    assert (readahead.progress().done, readahead.progress().part) == (0, 1)
    readahead.run()
    told = readahead.progress()
    assert (told.stage, told.done, told.total, told.unit) == (
        "read",
        sum(sizes),
        sum(sizes),
        "bytes",
    )
    assert (told.part, told.parts) == (3, 3)


def test_what_is_no_file_or_gone_is_passed_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").write_bytes(bytes(10))
    (tmp_path / "here").write_bytes(bytes(10))
    paths = [tmp_path / name for name in ("pipe", "absent", "gone", "here")]
    readahead = Readahead(paths, MIB)
    (tmp_path / "gone").unlink()
    readahead.run()
    assert (readahead.done, readahead.total, readahead.progress().parts) == (20, 20, 2)


def test_a_file_that_became_shorter_ends_it(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(bytes(10))
    readahead = Readahead([tmp_path / "cut"], MIB)
    (tmp_path / "cut").write_bytes(bytes(3))
    readahead.run()
    assert readahead.done == 10


def test_files_that_would_not_stay_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(MIB))
    readahead = Readahead([tmp_path / "large"], 2 * MIB - 2)
    readahead.run()
    assert (readahead.done, readahead.total) == (0, 0)
    assert Readahead([tmp_path / "large"]).total == MIB

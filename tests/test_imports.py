"""Files of archives on their way into the cache, and out of it, on a real disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from hashlib import sha1, sha256
from pathlib import Path
from typing import IO, Any

import pytest
from patience import until
from stand_in_hub import StandInHub

from tursi import archive
from tursi.archive import Complete, Content, Manifest, Parser
from tursi.errors import ArchiveRefused, DiskFull, FilesUnavailable, ModelInUse
from tursi.fetcher.snapshot import Shelf
from tursi.hub import disk, exports, imports
from tursi.hub.imports import Place, Staging
from tursi.model import Deployment, Desired, Generation, Request, Resolution, Trust

COMMIT = "a" * 40
NONE = Trust()
WEIGHTS = (2).to_bytes(8, "little") + b"{}" + bytes(3000)
PICKLE = b"\x80\x02]q\x00."
INDEX = b'{"weight_map": {"a": "model-1.safetensors"}}'


def model(folder: Path, **files: bytes) -> Path:
    """A folder with a small model; names have ``__`` for what no argument can have."""
    found = {"config_json": b"{}", "tokenizer_json": b"[]", "model_safetensors": WEIGHTS, **files}
    for name, data in found.items():
        path = folder / re.sub(r"_(?=[a-z]+$)", ".", name).replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if data:
            path.write_bytes(data)
    return folder


def snapshot(cache: Path, folder: Path, repository: str = "org/mini", commit: str = COMMIT) -> Path:
    """The same as huggingface_hub would have it."""
    home = cache / ("models--" + repository.replace("/", "--"))
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            name = path.relative_to(folder)
            key = sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            if name.suffix == ".safetensors":
                key = sha256(data).hexdigest()
            (home / "blobs").mkdir(parents=True, exist_ok=True)
            (home / "blobs" / key).write_bytes(data)
            link = home / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to("../" * (1 + len(name.parts)) + f"blobs/{key}")
    return home / "snapshots" / commit


def export(
    folder: Path, reference: str = "org/mini", trust: Trust = NONE, commit: str | None = COMMIT
) -> bytes:
    request = Request(
        reference, allow_pickle=trust.allow_pickle, trust_remote_code=trust.trust_remote_code
    )
    generation = Generation(1, request, 1.0, "me", Resolution(str(folder), commit=commit))
    of = Deployment("mini", Desired.RUNNING, 1, generation, 1.0, 1.0)
    found = exports.find(reference, folder, trust)
    pieces = exports.pieces(
        found, lambda files: archive.describe(of, files, version="1", at=1e9, by="me")
    )
    return b"".join(pieces)


def stage(data: bytes, root: Path) -> tuple[Staging, Manifest]:
    parser, staging, manifest = Parser(), None, None
    for event in parser.feed(data):
        if isinstance(event, Manifest):
            manifest = event
            place = Place(manifest, root / "hub", root / "models")
            place.room()
            staging = Staging(place)
        elif isinstance(event, Content):
            assert staging is not None
            staging.write(event.file, event.data)
        elif isinstance(event, Complete):
            assert staging is not None
            staging.complete(event.file)
    parser.close()
    assert staging is not None
    assert manifest is not None
    return staging, manifest


def bring(data: bytes, root: Path, trust: Trust = NONE) -> Resolution:
    staging, _ = stage(data, root)
    try:
        return staging.publish(trust)
    finally:
        staging.discard()


def contents(folder: Path | str) -> dict[str, bytes]:
    base = Path(folder)
    return {
        str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()
    }


def leftovers(root: Path) -> list[str]:
    return sorted(str(each.relative_to(root)) for each in root.rglob(".importing*"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "source", **{"1_Pooling__config_json": b'{"a": 1}'})


# -- as the hub's cache has it -------------------------------------------------------------


def test_a_snapshot_comes_as_the_hub_would_have_brought_it(tmp_path: Path, source: Path) -> None:
    before = snapshot(tmp_path / "there", source)
    found = bring(export(before), tmp_path)
    after = tmp_path / "hub/models--org--mini/snapshots" / COMMIT
    assert found.folder == str(after)
    assert contents(after) == contents(source)
    for name in contents(after):
        assert (after / name).readlink() == (before / name).readlink()
    assert leftovers(tmp_path) == []
    # The fetcher takes it for complete, and where the hub can be asked, asks.
    shelf = Shelf(tmp_path / "hub", "org/mini")
    assert shelf.cached(None) == shelf.cached(COMMIT) == found
    assert not shelf.is_verified(COMMIT)
    [entry] = disk.catalogue(tmp_path / "hub")
    assert (entry.name, entry.commit) == ("org/mini", COMMIT)
    disk.remove(tmp_path / "hub", "org/mini", [COMMIT])
    assert not (tmp_path / "hub/models--org--mini").exists()


def test_what_the_hub_has_said_of_a_branch_stays(tmp_path: Path, source: Path) -> None:
    refs = tmp_path / "hub/models--org--mini/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("b" * 40)
    bring(export(snapshot(tmp_path / "there", source)), tmp_path)
    assert (refs / "main").read_text() == "b" * 40
    bring(export(snapshot(tmp_path / "there", source), "org/mini@refs/pr/1"), tmp_path)
    assert (refs / "refs/pr/1").read_text() == COMMIT
    bring(export(snapshot(tmp_path / "there", source), f"org/mini@{COMMIT}"), tmp_path)
    # That would mean that the hub has listed its files.
    assert not (refs / COMMIT).exists()


def test_content_that_is_there_is_shared(tmp_path: Path, source: Path) -> None:
    other = model(tmp_path / "other", config_json=b'{"other": 1}')
    snapshot(tmp_path / "hub", other, commit="b" * 40)
    blob = next((tmp_path / "hub/models--org--mini/blobs").glob("?" * 64))
    before = blob.stat()
    data = export(snapshot(tmp_path / "there", source))
    staging, manifest = stage(data, tmp_path)
    room = Place(manifest, tmp_path / "hub", tmp_path / "models").room()
    assert room.present == len(WEIGHTS) + 2
    staging.publish(Trust())
    staging.discard()
    assert (blob.stat().st_ino, blob.stat().st_mtime) == (before.st_ino, before.st_mtime)
    bring(data, tmp_path)
    assert len(disk.catalogue(tmp_path / "hub")) == 2


def test_what_is_lacking_of_a_snapshot_comes(tmp_path: Path, source: Path) -> None:
    here = snapshot(tmp_path / "hub", source)
    (here / "model.safetensors").resolve().unlink()
    (here / "tokenizer.json").unlink()
    bring(export(snapshot(tmp_path / "there", source)), tmp_path)
    assert contents(here) == contents(source)


def test_another_content_of_the_same_commit_is_refused(tmp_path: Path, source: Path) -> None:
    here = snapshot(tmp_path / "hub", source)
    before = contents(here)
    wrong = model(tmp_path / "wrong", config_json=b'{"bad": 1}')
    with pytest.raises(ArchiveRefused, match=r"another config\.json of the same commit"):
        bring(export(snapshot(tmp_path / "there", wrong)), tmp_path)
    assert contents(here) == before
    assert leftovers(tmp_path) == []


def test_a_repository_that_is_being_downloaded_waits(tmp_path: Path, source: Path) -> None:
    data = export(snapshot(tmp_path / "there", source))
    with Shelf(tmp_path / "hub", "org/mini").in_use(lambda _: None), pytest.raises(ModelInUse):
        bring(data, tmp_path)
    assert bring(data, tmp_path).commit == COMMIT


def test_a_pull_shares_what_was_imported(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    with StandInHub() as hub:
        hub.add("org/mini", source)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        program = (
            "import sys, json; from pathlib import Path;"
            "from tursi.fetcher.download import Download;"
            "print(Download('org/mini', None, Path(sys.argv[1]), lambda _: None).run().folder)"
        )

        def pull(cache: Path) -> Path:
            done = subprocess.run(
                [sys.executable, "-c", program, str(cache)],
                env=environment, capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
            return Path(done.stdout.strip())

        first = pull(tmp_path / "there")
        bring(export(first, commit=first.name), tmp_path)
        hub.seen.clear()
        assert pull(tmp_path / "hub") == tmp_path / "hub" / first.relative_to(tmp_path / "there")
        assert hub.downloads() == []
        assert Shelf(tmp_path / "hub", "org/mini").is_verified(first.name)


# -- a folder of the user's ------------------------------------------------------------------


def test_a_folder_gets_a_place_of_its_own(tmp_path: Path, source: Path) -> None:
    data = export(source, "/home/me/mini", commit=None)
    found = bring(data, tmp_path)
    assert Path(found.folder).parent == tmp_path / "models"
    assert re.fullmatch(r"mini-[0-9a-f]{12}", Path(found.folder).name)
    assert contents(found.folder) == contents(source)
    assert found == disk.look(Path(found.folder))
    assert leftovers(tmp_path) == []
    inode = Path(found.folder, "model.safetensors").stat().st_ino
    assert bring(data, tmp_path) == found
    assert Path(found.folder, "model.safetensors").stat().st_ino == inode
    Path(found.folder, "model.safetensors").unlink()
    Path(found.folder, "tokenizer.json").write_bytes(b"[1, 2, 3]")
    assert bring(data, tmp_path) == found
    assert contents(found.folder) == contents(source)
    [entry] = disk.imported(tmp_path / "models")
    assert (entry.name, entry.commit) == (Path(found.folder).name, None)
    assert entry.size == sum(map(len, contents(source).values()))
    disk.discard(tmp_path / "models", entry.name)
    assert disk.imported(tmp_path / "models") == []


def test_shards_and_their_index_come_along(tmp_path: Path) -> None:
    folder = model(tmp_path / "sharded", model_safetensors=b"")
    (folder / "model.safetensors.index.json").write_bytes(INDEX)
    (folder / "model-1.safetensors").write_bytes(WEIGHTS)
    data = export(folder, "/home/me/mini", commit=None)
    assert set(contents(bring(data, tmp_path).folder)) == set(contents(folder))


# -- what isn't taken ------------------------------------------------------------------------


def test_only_what_the_model_needs_leaves(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", training__args_bin=PICKLE, secret_txt=b"x", code_py=b"x")
    assert set(contents(bring(export(folder, "/m", commit=None), tmp_path).folder)) == {
        "config.json", "tokenizer.json", "model.safetensors",
    }  # fmt: skip


def test_a_pickle_comes_only_where_it_is_allowed(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", model_safetensors=b"", pytorch__model_bin=b"")
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    with pytest.raises(FilesUnavailable, match="only as pickle"):
        export(folder, "/m", commit=None)
    data = export(folder, "/m", Trust(allow_pickle=True), commit=None)
    with pytest.raises(ArchiveRefused, match="--allow-pickle"):
        bring(data, tmp_path)
    assert not list((tmp_path / "models").glob("*"))
    assert "pytorch_model.bin" in contents(bring(data, tmp_path, Trust(allow_pickle=True)).folder)


def test_code_comes_only_where_it_is_trusted(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", modeling_py=b"print()")
    data = export(folder, "/m", Trust(trust_remote_code=True), commit=None)
    with pytest.raises(ArchiveRefused, match="--trust-remote-code"):
        bring(data, tmp_path)
    trusted = bring(data, tmp_path, Trust(trust_remote_code=True))
    assert "modeling.py" in contents(trusted.folder)


def test_a_link_out_of_the_folder_does_not_leave(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "vocab.txt").symlink_to("/etc/passwd")
    with pytest.raises(FilesUnavailable, match="leads out"):
        export(folder, "/m", commit=None)


def test_a_file_that_changes_on_the_way_breaks_the_export(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    found = exports.find("/m", folder, Trust())
    generation = Generation(1, Request("/m"), 1.0, "me", Resolution(str(folder)))
    of = Deployment("m", Desired.RUNNING, 1, generation, 1.0, 1.0)
    pieces = exports.pieces(
        found, lambda files: archive.describe(of, files, version="1", at=1e9, by="me")
    )
    while not next(pieces).startswith(b"tursi.json"):
        pass
    (folder / "config.json").write_bytes(b"[]")
    with pytest.raises(FilesUnavailable, match="damaged on the disk, or was changed"):
        list(pieces)
    (folder / "config.json").write_bytes(b"longer than before")
    with pytest.raises(FilesUnavailable, match="changed while"):
        list(exports.pieces(found, lambda files: pytest.fail("it was described")))
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(FilesUnavailable, match="changed while"):
        list(exports.pieces(found, lambda files: pytest.fail("it was described")))


# -- full disks and kills ----------------------------------------------------------------------


def test_there_is_room_or_nothing_is_begun(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 3000})())
    with pytest.raises(DiskFull, match="more on the disk of"):
        stage(export(source, "/m", commit=None), tmp_path)
    assert leftovers(tmp_path) == []


class Full:
    """A file on a disk that becomes full."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path, source: Path) -> None:
    data = export(source, "/m", commit=None)
    [manifest, *_] = Parser().feed(data)
    assert isinstance(manifest, Manifest)
    staging = Staging(Place(manifest, tmp_path / "hub", tmp_path / "models"))
    staging.write(manifest.files[0], memoryview(b""))
    staging._file = Full(staging._file)  # type: ignore[assignment, arg-type] # as far as it is used
    with pytest.raises(DiskFull, match="became full"):
        staging.write(manifest.files[0], memoryview(b"x"))
    staging.discard()
    assert not list((tmp_path / "models").iterdir())


STEPS = ("rename", "symlink_to", "mkdir", "write_text")


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, data: bytes, root: Path) -> bool:
    """Import in a process that is killed at its ``step``-th change; whether it came that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(usual: Any) -> Any:
            def do(*arguments: Any, **keywords: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return usual(*arguments, **keywords)

            return do

        for name in STEPS:
            setattr(Path, name, dying(getattr(Path, name)))
        try:
            bring(data, root)
        finally:
            os._exit(0 if count < step else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in {0, 9}
    return os.waitstatus_to_exitcode(status) == 9


@pytest.mark.parametrize("of_the_hub", [True, False])
def test_a_kill_at_any_step_leaves_all_or_nothing(
    of_the_hub: bool, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of_the_hub:
        data = export(snapshot(tmp_path / "there", source))
    else:
        data = export(source, "/home/me/mini", commit=None)
    step, came = 1, True
    while came:
        root = tmp_path / f"root{step}"
        came = killed_at(step, monkeypatch, data, root)
        for folder in (root / "hub", root / "models"):
            imports.sweep(folder)
        entries = [*disk.catalogue(root / "hub"), *disk.imported(root / "models")]
        if entries:
            assert contents(entries[0].folder) == contents(source)
        else:
            assert came
            assert not [path for path in root.rglob("*") if path.is_file() and path.stat().st_size]
        assert leftovers(root) == []
        assert contents(bring(data, root).folder) == contents(source)
        step += 1
    assert step > 8


def test_what_goes_on_is_not_swept(tmp_path: Path, source: Path) -> None:
    staging, _ = stage(export(source, "/m", commit=None), tmp_path)
    child = os.fork()
    if child == 0:
        imports.sweep(tmp_path / "models")
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(staging.publish(Trust()).folder).is_dir()
    staging.discard()
    until(lambda: leftovers(tmp_path) == [], "nothing is left")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """No descriptor stays open."""
    before = len([*Path("/proc/self/fd").iterdir()])
    yield
    assert len([*Path("/proc/self/fd").iterdir()]) <= before + 2

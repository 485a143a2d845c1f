"""Archives, read as they arrive: what is whole, and everything that isn't."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from hashlib import sha1, sha256
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tursi import archive
from tursi.archive import Complete, Content, Event, File, Manifest, Parser
from tursi.errors import ArchiveInvalid, ArchiveNewer, TursiError
from tursi.model import (
    Deployment,
    Desired,
    Generation,
    Limits,
    Load,
    Request,
    Resolution,
    Schedule,
    Trust,
)

CONTENTS = {
    "config.json": b"{}",
    "vocab.txt": b"",
    "1_Pooling/config.json": b"x" * 512,
    "model.safetensors": b"\0\1" * 3000,
}
COMMIT = "a" * 40


def git(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def files(contents: dict[str, bytes] | None = None) -> list[File]:
    return [
        File(name, len(data), sha256(data).hexdigest(), git(data) if len(data) < 9 else None)
        for name, data in (contents or CONTENTS).items()
    ]


def deployment(request: Request | None = None, **fields: Any) -> Deployment:
    resolution = Resolution("/models/x", task="fill-mask", commit=COMMIT)
    chosen = request or Request("org/mini@v1", dtype="float16", limits=Limits(memory=5))
    generation = Generation(3, chosen, 1.0, "uid 0", resolution)
    return Deployment("mini", Desired.RUNNING, 2, generation, 1.0, 2.0, **fields)


def manifest(of: Deployment | None = None, contents: dict[str, bytes] | None = None) -> Manifest:
    return archive.describe(
        of or deployment(), files(contents), version="1.2", at=1_700_000_000.7, by="uid 0"
    )


def write(found: Manifest, contents: dict[str, bytes] | None = None) -> bytes:
    known = contents or CONTENTS
    parts = [archive.opening(found)]
    for file in found.files:
        data = known[file.name]
        parts += [archive.file_header(found, file), data, archive.padding(len(data))]
    return b"".join([*parts, archive.closing()])


def read(data: bytes, sizes: Iterator[int] | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """All that is in ``data``, fed in pieces; it must end there."""
    parser, events, at = Parser(), list[Event](), 0
    while at < len(data):
        step = next(sizes, len(data)) if sizes else len(data)
        for event in parser.feed(data[at : at + step]):
            # What a view shows is gone with the piece.
            events.append(
                Content(event.file, memoryview(bytes(event.data)))
                if isinstance(event, Content)
                else event
            )
        at += step
    parser.close()
    found: dict[str, bytes] = {}
    whole = []
    for event in events:
        if isinstance(event, Content):
            assert event.file.name not in whole
            found[event.file.name] = found.get(event.file.name, b"") + event.data
        elif isinstance(event, Complete):
            whole.append(event.file.name)
    assert whole == [*found]
    assert isinstance(events[0], Manifest)
    return events[0], found


def changed(**fields: Any) -> bytes:
    """An archive whose manifest has other fields than it should."""
    written = json.loads(manifest().encoded())
    written.update(fields)
    return headed(json.dumps(written).encode())


def headed(data: bytes) -> bytes:
    return (
        archive.header("tursi.json", len(data), 1_700_000_000) + data + archive.padding(len(data))
    )


def refusal(data: bytes) -> TursiError:
    """Why ``data`` can't be the beginning of an archive."""
    with pytest.raises(TursiError) as raised:
        list(Parser().feed(data))
    return raised.value


# -- what is whole ----------------------------------------------------------------------


def test_what_is_written_is_read() -> None:
    found = manifest()
    data = write(found)
    assert len(data) == archive.length(found)
    assert read(data) == (found, CONTENTS)


@given(st.lists(st.integers(1, 700), min_size=1))
@example([1])
def test_the_pieces_it_comes_in_make_no_difference(sizes: list[int]) -> None:
    data = write(manifest())
    assert read(data, iter(sizes * (len(data) // sum(sizes) + 1)))[1] == CONTENTS


def test_any_tar_reads_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(write(manifest()))) as tar:
        names = tar.getnames()
        assert names == ["tursi.json", *(f"files/{name}" for name in CONTENTS)]
        member = tar.extractfile("files/model.safetensors")
        assert member is not None
        assert member.read() == CONTENTS["model.safetensors"]
        assert {each.mode for each in tar.getmembers()} == {0o644}


def test_the_length_of_a_manifest_does_not_depend_on_the_hashes() -> None:
    unknown = [File(each.name, each.size, "0" * 64, each.blob) for each in files()]
    before = archive.describe(deployment(), unknown, version="1.2", at=1e9, by="uid 0")
    assert archive.length(before) == archive.length(manifest())


def test_a_file_may_be_larger_than_tar_once_knew() -> None:
    file = File("model.safetensors", 2**40, "0" * 64)
    header = archive.file_header(manifest(), file)
    assert len(header) == 512
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 2**40


def test_a_deployment_comes_back_as_it_was() -> None:
    request = Request(
        "org/mini@v1", "fill-mask", "cpu", "float16", Limits(memory=5, threads=2), allow_pickle=True
    )
    schedule = Schedule(Load.ON_DEMAND, 60.0)
    found = manifest(deployment(request, schedule=schedule, max_replicas=4))
    assert read(write(found))[0].wanted("org/mini@v1") == (request, schedule)
    assert (found.repository, found.revision, found.commit) == ("org/mini", "v1", COMMIT)
    assert (found.replicas, found.max_replicas, found.trust) == (2, 4, Trust(allow_pickle=True))
    # What is as usual isn't written: a Tursi that doesn't know of it can read the rest.
    usual = json.loads(manifest(deployment(Request("org/mini"))).encoded())
    assert usual["request"] == usual["schedule"] == {}
    assert "max_replicas" not in usual


def test_a_folder_of_the_users_leaves_its_path_behind() -> None:
    found = manifest(deployment(Request("/home/me/my models/mini v2")))
    assert (found.folder, found.repository, found.commit) == ("mini-v2", None, None)
    assert b"/home/me" not in found.encoded()
    assert read(write(found))[0] == found


def test_only_a_changed_manifest_is_a_changed_one() -> None:
    assert [*Parser().feed(changed())] == [manifest()]


# -- what isn't ---------------------------------------------------------------------------


@given(st.data())
def test_no_byte_can_be_changed(data: st.DataObject) -> None:
    whole = bytearray(write(manifest()))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        found, contents = read(bytes(whole))
    except TursiError:
        return
    # Only words of the manifest that nothing can be compared with.
    assert contents == CONTENTS
    assert found.files == manifest().files
    assert found != manifest() or whole[at : at + 1] in b" \n"


@given(st.integers(0, len(write(manifest())) - 1))
@example(0)
def test_it_ends_where_it_should(length: int) -> None:
    with pytest.raises(ArchiveInvalid):
        read(write(manifest())[:length])


@given(st.binary(min_size=1, max_size=600))
def test_nothing_may_follow(more: bytes) -> None:
    assert "after its end" in refusal(write(manifest()) + more).message


@given(st.binary(max_size=3000))
def test_what_is_no_archive_is_refused(data: bytes) -> None:
    with pytest.raises(ArchiveInvalid):
        read(data)


def _member(name: str, kind: bytes, size: int = 0, **more: str) -> Callable[[], bytes]:
    def make() -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.mode, info.mtime = kind, size, 0o644, 1_700_000_000
        for key, value in more.items():
            setattr(info, key, value)
        return info.tobuf(tarfile.GNU_FORMAT)

    return make


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (_member("files/config.json", tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
        (_member("files/config.json", tarfile.LNKTYPE, linkname="../x"), "a link"),
        (_member("files/config.json", tarfile.CHRTYPE), "a device"),
        (_member("files/config.json", tarfile.BLKTYPE), "a device"),
        (_member("files/config.json", tarfile.FIFOTYPE), "a pipe"),
        (_member("files/config.json", tarfile.DIRTYPE), "a folder"),
        (_member("files/config.json", tarfile.GNUTYPE_SPARSE, 2), "a sparse file"),
        (_member("files/config.json", tarfile.XHDTYPE, 2), "something else"),
        (_member("files/config.json", tarfile.REGTYPE, 3), "of 3 bytes"),
        (_member("files/config.json", tarfile.REGTYPE, 2**60), "a file"),
        (_member("../config.json", tarfile.REGTYPE, 2), "a file '../config.json'"),
        (_member("/config.json", tarfile.REGTYPE, 2), "a file"),
        (_member("files/vocab.txt", tarfile.REGTYPE), "a file 'files/vocab.txt'"),
        (_member("files/config.json", tarfile.REGTYPE, 2, uname="root"), "a file"),
        (lambda: bytes(512), "its end"),
        (lambda: b"\xff" * 512, "something else"),
    ],
)
def test_a_member_is_the_one_of_the_manifest_or_none(make: Callable[[], bytes], what: str) -> None:
    found = refusal(archive.opening(manifest()) + make() + bytes(5000))
    assert isinstance(found, ArchiveInvalid)
    assert found.message.startswith("Where config.json should be, the archive has ")
    assert what in found.message


@pytest.mark.parametrize(
    "name",
    [
        "../x", "/x", "a/../b", "./x", "a//b", "a/", "", ".hidden", "a/.git/x", "a\\b", "a\nb",
        "a\0b", "con:x", "a b", "\u202ex", "x" * 95, "a/b/c/d/e",
    ],
)  # fmt: skip
def test_a_name_is_of_plain_segments(name: str) -> None:
    file = {"name": name, "size": 0, "sha256": "0" * 64}
    assert refusal(changed(files=[file])).code == "archive_invalid"


@pytest.mark.parametrize("names", [["a", "a"], ["a/b", "a"], ["a", "b", "a/b/c"]], ids="+".join)
def test_a_name_is_there_once(names: list[str]) -> None:
    found = [{"name": name, "size": 0, "sha256": "0" * 64} for name in names]
    assert refusal(changed(files=found)).code == "archive_invalid"


@pytest.mark.parametrize(
    "fields",
    [
        {"files": []},
        {"files": [{"name": "a", "size": -1, "sha256": "0" * 64}]},
        {"files": [{"name": "a", "size": 2**60, "sha256": "0" * 64}]},
        {"files": [{"name": "a", "size": 1, "sha256": "0" * 63}]},
        {"files": [{"name": "a", "size": 1, "sha256": "0" * 64 + "\n"}]},
        {"files": [{"name": "a", "size": 1, "sha256": "0" * 64, "blob": "../x"}]},
        {"files": [{"name": "a", "size": 1, "sha256": "0" * 64, "mode": 7}]},
        {"name": "../x"},
        {"name": ""},
        {"commit": "main"},
        {"commit": None},
        {"repository": None},
        {"repository": "../x"},
        {"repository": "a/b@c"},
        {"repository": "/etc"},
        {"revision": "../../x"},
        {"folder": "x"},
        {"repository": None, "revision": None, "commit": None, "folder": "../x"},
        {"repository": None, "revision": None, "commit": None, "folder": "a/b"},
        {"created_at": 5.0},
        {"created_at": -1},
        {"request": {"dtype": 7}},
        {"request": {"limits": 7}},
        {"request": {"limits": {"memory": "much"}}},
        {"request": []},
        {"schedule": {"load": "sometimes"}},
        {"replicas": "two"},
        {"surprise": 1},
        {"format": "1"},
        {"format": None},
        {"format": 0},
    ],
    ids=repr,
)
def test_a_manifest_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    assert refusal(changed(**fields)).code == "archive_invalid"


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"format": 2, "surprise": {"of": "a new kind"}},
        {"request": {"speed": "much"}},
        {"request": {"limits": {"gpus": 1}}},
        {"schedule": {"at": "night"}},
    ],
    ids=repr,
)
def test_what_a_newer_tursi_has_made_is_told_apart(fields: dict[str, Any]) -> None:
    found = refusal(changed(**fields))
    assert isinstance(found, ArchiveNewer)
    assert "newer" in found.message


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff\xfe", b"null", b'{"format":1}'])
def test_a_manifest_is_an_object(data: bytes) -> None:
    assert refusal(headed(data)).code == "archive_invalid"


def test_a_manifest_is_not_held_beyond_its_bound() -> None:
    parser = Parser()
    header = archive.header("tursi.json", archive.MAX_MANIFEST + 1, 0)
    with pytest.raises(ArchiveInvalid, match="over"):
        list(parser.feed(header))


def test_something_between_files_is_refused() -> None:
    whole = write(manifest())
    at = whole.index(b"{}" + bytes(510)) + 100
    assert "between" in refusal(whole[:at] + b"x" + whole[at + 1 :]).message


def test_another_content_of_the_same_hash_by_git_is_none() -> None:
    wrong = [File(each.name, each.size, each.sha256, "0" * 40) for each in files()]
    found = archive.describe(deployment(), wrong, version="1", at=1.0, by="x")
    assert "altered or damaged" in refusal(write(found)).message


@pytest.mark.parametrize(
    ("request_", "trust"),
    [
        ({}, Trust()),
        ({"allow_pickle": True}, Trust(allow_pickle=True)),
        ({"trust_remote_code": True}, Trust(trust_remote_code=True)),
    ],
)
def test_what_it_wants_to_be_trusted_with(request_: dict[str, Any], trust: Trust) -> None:
    parser = Parser()
    [found] = parser.feed(changed(request=request_))
    assert isinstance(found, Manifest)
    assert found.trust == trust

"""A deployment with its files as one tar archive: what it says, how it is written and read.

The manifest comes first and dictates every byte of the rest but the contents, whose
hashes it has. So an archive is read by comparing it with the only one that its
manifest can have: whatever else a tar file may have in it (links, devices, sparse
files, names that lead elsewhere, the same name twice) is refused without being
understood.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from tursi.errors import ArchiveInvalid, ArchiveNewer, InvalidRequest
from tursi.model import Deployment, Limits, Reference, Request, Schedule, Trust, deployment_name
from tursi.selection import SAFE_NAME

FORMAT = 1
MANIFEST = "tursi.json"
MAX_MANIFEST = 4 * 1024 * 1024
_FOLDER = "files/"
MAX_NAME = 100 - len(_FOLDER)
"""What a tar header has room for."""
_BLOCK = 512
_END = bytes(2 * _BLOCK)
_MAX_FILES = 10_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORBIDDEN = {
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

T = TypeVar("T")
Short = Annotated[str, msgspec.Meta(max_length=500)]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A file of the model."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
    size: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    blob: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")] | None = None
    """Git's hash, where that is what names the content in the hub's cache."""

    @property
    def key(self) -> str:
        """What names its content in the hub's cache."""
        return self.blob or self.sha256


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an archive has in it, and the deployment that it was."""

    format: int
    version: Short
    """Of the Tursi that made it."""
    created_at: Annotated[float, msgspec.Meta(ge=0, le=2**33)]
    created_by: Short
    name: Short
    """Of the deployment."""
    request: dict[str, Any]
    """What was asked for besides the model, where that isn't the default."""
    schedule: dict[str, Any]
    replicas: int
    files: Annotated[list[File], msgspec.Meta(min_length=1, max_length=_MAX_FILES)]
    repository: Short | None = None
    """Of the hub, without a revision."""
    revision: Short | None = None
    commit: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")] | None = None
    folder: Short | None = None
    """What a folder of the user's was called, where it wasn't a model of the hub."""
    max_replicas: int | None = None
    loaded: dict[str, Short | None] = {}
    """Task, device and dtype as they turned out to be."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def model(self) -> str:
        """The model as a user would write it."""
        if self.repository is None:
            return str(self.folder)
        return str(Reference(self.repository, self.revision))

    @property
    def trust(self) -> Trust:
        """What the deployment wants its model to be allowed."""
        given = self.request
        return Trust(
            given.get("allow_pickle") is not None and given["allow_pickle"] is not False,
            given.get("trust_remote_code") is not None and given["trust_remote_code"] is not False,
        )

    def wanted(self, model: str) -> tuple[Request, Schedule]:
        """What to ask for, of the files that are at ``model`` now."""
        limits = self.request.get("limits", {})
        if isinstance(limits, dict):
            _known(limits, Limits)
        return _read({**self.request, "model": model}, Request), _read(self.schedule, Schedule)

    def encoded(self) -> bytes:
        """As it stands in the archive; its length doesn't depend on the hashes."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def describe(
    deployment: Deployment,
    files: Iterable[File],
    *,
    version: str,
    at: float,
    by: str,
) -> Manifest:
    """The manifest for a deployment whose generation is resolved."""
    generation, resolution = deployment.generation, deployment.generation.resolution
    reference = Reference.parse(generation.request.model)
    from_hub = reference.repository is not None and resolution is not None
    return Manifest(
        format=FORMAT,
        version=version,
        # In whole seconds, as tar has it.
        created_at=float(int(at)),
        created_by=by,
        name=deployment.name,
        request=_differing(generation.request, Request(generation.request.model)),
        schedule=_differing(deployment.schedule, Schedule()),
        replicas=deployment.replicas,
        max_replicas=deployment.max_replicas,
        files=list(files),
        repository=reference.repository,
        revision=reference.revision,
        commit=resolution.commit if resolution and from_hub else None,
        folder=None if from_hub else reference.short_name,
        loaded={name: getattr(resolution, name, None) for name in ("task", "device", "dtype")},
    )


def decode(data: bytes) -> Manifest:
    """The manifest that ``data`` is; ``ArchiveInvalid``, ``ArchiveNewer``."""
    try:
        number = msgspec.json.decode(data, type=_Format).format
        if number > FORMAT:
            raise ArchiveNewer(
                f"The archive has format {number}, and this Tursi reads {FORMAT}; "
                "import it with a newer one."
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        deployment_name(manifest.name)
        reference = Reference.parse(manifest.model if manifest.repository else "/folder")
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ArchiveInvalid(f"The archive's manifest can't be read: {error}.") from None
    except InvalidRequest as error:
        raise ArchiveInvalid(f"The archive's manifest isn't valid: {error.message}") from None
    _check_source(manifest, reference)
    _check_names([file.name for file in manifest.files])
    manifest.wanted("/folder")
    return manifest


def header(name: str, size: int, at: float) -> bytes:
    """The only header that a member may have."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(at), 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def padding(size: int) -> bytes:
    """What follows a content of that size."""
    return bytes(-size % _BLOCK)


def opening(manifest: Manifest) -> bytes:
    """The archive up to the first file."""
    data = manifest.encoded()
    return header(MANIFEST, len(data), manifest.created_at) + data + padding(len(data))


def file_header(manifest: Manifest, file: File) -> bytes:
    """What stands before a file's content."""
    return header(_FOLDER + file.name, file.size, manifest.created_at)


def closing() -> bytes:
    """What stands after the last file."""
    return _END


def length(manifest: Manifest) -> int:
    """Bytes of the whole archive."""
    contents = sum(_BLOCK + file.size + len(padding(file.size)) for file in manifest.files)
    return len(opening(manifest)) + contents + len(_END)


class Content(NamedTuple):
    """Some bytes of a file."""

    file: File
    data: memoryview


class Complete(NamedTuple):
    """A file is whole, and what the manifest says it is."""

    file: File


class Digest:
    """The hashes of a file's content as it goes by."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        # What git hashes begins with the length.
        self._blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)

    def update(self, data: memoryview | bytes) -> None:
        """So much of it."""
        self._sha256.update(data)
        if self._file.blob is not None:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        """Of what has gone by."""
        return self._sha256.hexdigest()

    def matches(self) -> bool:
        """Whether it was what the manifest says."""
        return self.sha256 == self._file.sha256 and self._file.blob in {
            None,
            self._blob.hexdigest(),
        }


Event = Manifest | Content | Complete


class Parser:
    """Reads an archive as it arrives; ``ArchiveInvalid`` as soon as it can't be one.

    It holds no more than the manifest.
    """

    def __init__(self) -> None:
        self._block = bytearray()
        self._want = _BLOCK
        self._then: Callable[[bytes], Iterator[Event]] = self._first
        self._waiting: list[File] = []
        self._left = 0
        """Bytes of the present file that are still to come."""
        self._digest: Digest | None = None
        self._at = 0.0
        self.whole = False
        """Whether all of it has been read."""
        self.manifest: Manifest | None = None

    def feed(self, data: bytes) -> Iterator[Event]:
        """What is in ``data``, which follows what was fed before."""
        view, at = memoryview(data), 0
        while at < len(view):
            if self.whole:
                raise ArchiveInvalid("The archive goes on after its end.")
            if self._left:
                piece = view[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                yield from self._content(piece)
            else:
                piece = view[at : at + self._want - len(self._block)]
                at += len(piece)
                self._block += piece
                if len(self._block) == self._want:
                    block, self._block = bytes(self._block), bytearray()
                    yield from self._then(block)

    def close(self) -> None:
        """There is no more of it."""
        if not self.whole:
            raise ArchiveInvalid("The archive ends too early; copy or export it again.")

    def _first(self, block: bytes) -> Iterator[Event]:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            self._size, self._at = info.size, float(info.mtime)
            sound = block == header(MANIFEST, info.size, info.mtime)
        except (tarfile.TarError, ValueError, UnicodeError, OverflowError):
            sound = False
        if not sound:
            raise ArchiveInvalid("This is no archive that `tursi export` has made.")
        if not 0 < self._size <= MAX_MANIFEST:
            raise ArchiveInvalid(f"The archive's manifest has over {MAX_MANIFEST} bytes, or none.")
        self._want = self._size + len(padding(self._size))
        self._then = self._manifest
        return iter(())

    def _manifest(self, block: bytes) -> Iterator[Event]:
        data, rest = block[: self._size], block[self._size :]
        manifest = self.manifest = decode(data)
        if any(rest) or manifest.created_at != self._at:
            raise ArchiveInvalid("The archive's manifest isn't as `tursi export` writes it.")
        self._waiting = list(reversed(manifest.files))
        yield manifest
        self._next()

    def _next(self) -> None:
        if self._waiting:
            self._want, self._then = _BLOCK, self._header
        else:
            self._want, self._then = len(_END), self._end

    def _header(self, block: bytes) -> Iterator[Event]:
        file = self._waiting[-1]
        if self.manifest is None or block != file_header(self.manifest, file):
            raise ArchiveInvalid(f"Where {file.name} should be, the archive has {_what(block)}.")
        self._left, self._digest = file.size, Digest(file)
        if not file.size:
            yield from self._content(memoryview(b""))

    def _content(self, piece: memoryview) -> Iterator[Event]:
        file, digest = self._waiting[-1], self._digest
        if digest is None:
            raise AssertionError("no file is being read")
        digest.update(piece)
        yield Content(file, piece)
        if self._left:
            return
        if not digest.matches():
            raise ArchiveInvalid(
                f"{file.name} isn't what the archive's manifest says: it was altered or damaged; "
                "copy or export it again."
            )
        self._waiting.pop()
        yield Complete(file)
        rest = len(padding(file.size))
        if rest:
            self._want, self._then = rest, self._padding
        else:
            self._next()

    def _padding(self, block: bytes) -> Iterator[Event]:
        if any(block):
            raise ArchiveInvalid("The archive has something between its files.")
        self._next()
        return iter(())

    def _end(self, block: bytes) -> Iterator[Event]:
        if any(block):
            raise ArchiveInvalid("The archive has more files than its manifest names.")
        self.whole = True
        return iter(())


class _Format(msgspec.Struct):
    """What every format has."""

    format: Annotated[int, msgspec.Meta(ge=1)]


def _check_source(manifest: Manifest, reference: Reference) -> None:
    if manifest.repository is not None:
        sound = manifest.commit is not None and manifest.folder is None
        sound = sound and reference.repository == manifest.repository
    else:
        sound = manifest.folder is not None and manifest.commit is manifest.revision is None
        sound = sound and Reference(folder=manifest.folder).short_name == manifest.folder
    if not sound:
        raise ArchiveInvalid("The archive's manifest doesn't say where the model comes from.")


def _check_names(names: Sequence[str]) -> None:
    known = frozenset(names)
    if len(known) < len(names):
        raise ArchiveInvalid("The archive's manifest names a file twice.")
    for name in names:
        if not SAFE_NAME.fullmatch(name):
            raise ArchiveInvalid(f"The archive has a file with the name {name[:100]!r}.")
        while name := name.rpartition("/")[0]:
            if name in known:
                raise ArchiveInvalid(f"{name!r} is a file and a folder in the archive.")


def _what(block: bytes) -> str:
    """What a header that isn't the right one stands for."""
    if not any(block):
        return "its end"
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError, UnicodeError):
        return "something else"
    found = _FORBIDDEN.get(info.type, "something else")
    if info.type == tarfile.REGTYPE:
        found = "a file"
    return f"{found} {info.name[:100]!r} of {info.size} bytes"


def _differing(value: Any, default: Any) -> dict[str, Any]:
    """The fields of a value that aren't as in ``default``, those of values in it too."""
    found = {}
    for field in fields(value):
        mine, usual = getattr(value, field.name), getattr(default, field.name)
        if mine != usual:
            nested = hasattr(mine, "__dataclass_fields__") and type(mine) is type(usual)
            found[field.name] = _differing(mine, usual) if nested else msgspec.to_builtins(mine)
    return found


def _read(given: dict[str, Any], kind: type[T]) -> T:
    _known(given, kind)
    try:
        return msgspec.convert(given, kind)
    except msgspec.MsgspecError as error:
        raise ArchiveInvalid(f"The archive's manifest isn't valid: {error}.") from None


def _known(given: dict[str, Any], kind: Any) -> None:
    unknown = sorted(given.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise ArchiveNewer(
            f"The archive's deployment has {unknown[0][:50]!r}, which this Tursi doesn't know; "
            "import it with a newer one."
        )

"""The files of an archive brought into the cache; everything here belongs into a thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tursi.archive import File, Manifest
from tursi.errors import (
    ArchiveInvalid,
    ArchiveRefused,
    DiskFull,
    FetchError,
    FetchInterrupted,
    ModelInUse,
    TursiError,
)
from tursi.folder import PICKLES
from tursi.hub import disk
from tursi.model import Resolution, Trust, mebibytes
from tursi.selection import select

_STAGES = ".importing"
_LOCK = "lock"
_MOVED = "moved"
"""Lists what a publication is about to put into the cache, in case it is killed."""
_SYNC = 64 * 1024 * 1024
"""Bytes that may wait for the disk, so that no step has much to wait for."""
_MAX_INDEX = 64 * 1024 * 1024
_CHUNK = 1 << 20
_HASH = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Room:
    """What an import takes of the disk, in bytes."""

    folder: str
    """Where the model will be."""
    present: int
    """What is there already, and is shared."""
    free: int


class Place:
    """Where the files of one manifest belong: into the hub's cache, or a folder of their own."""

    def __init__(self, manifest: Manifest, cache: Path, folders: Path) -> None:
        self.manifest = manifest
        if manifest.repository is None:
            self.root = folders
            self.folder = folders / f"{manifest.folder}-{_digest(manifest.files)[:12]}"
            self.blobs = None
            self._doubtful = False
        else:
            self.root = cache
            self.home = cache / ("models--" + manifest.repository.replace("/", "--"))
            self.folder = self.home / "snapshots" / str(manifest.commit)
            self.blobs = self.home / "blobs"
            # A fetcher was killed before it had seen that they are what they are called.
            self._doubtful = bool(disk.unfinished(cache, manifest.repository))

    def path(self, file: File) -> Path:
        """Where the content of a file is, or will be."""
        return self.folder / file.name if self.blobs is None else self.blobs / file.key

    def has(self, file: File) -> bool:
        """Whether it is there already."""
        if self._doubtful:
            return False
        try:
            return self.path(file).stat().st_size == file.size and self.path(file).is_file()
        except OSError:
            return False

    def room(self) -> Room:
        """What there is, and the room for the rest; ``DiskFull``."""
        with _explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        present = sum(file.size for file in self.manifest.files if self.has(file))
        room = Room(str(self.folder), present, free)
        needed = self.manifest.size - room.present
        if needed > free:
            raise DiskFull(
                f"The archive needs {mebibytes(needed)} more on the disk of {self.root}, where "
                f"{mebibytes(free)} are free."
            )
        return room


class Staging:
    """The files of an archive, out of sight until all of them are there."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._present = {file.name for file in place.manifest.files if place.has(file)}
        self._numbers = {file.name: number for number, file in enumerate(place.manifest.files)}
        self._file: IO[bytes] | None = None
        self._unsynced = 0
        with _explained(place.root):
            self._folder = place.root / _STAGES / secrets.token_hex(8)
            self._folder.mkdir(parents=True, mode=0o700)
            self._lock = (self._folder / _LOCK).open("ab")
            # Whoever sweeps leaves it alone for as long as somebody holds that.
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def write(self, file: File, data: memoryview) -> None:
        """More of the content of ``file``, unless that is there already; ``DiskFull``."""
        if file.name in self._present:
            return
        with _explained(self._place.root):
            if self._file is None:
                self._file = self._staged(file).open("xb", buffering=0)
            while data:
                written = self._file.write(data) or 0
                data = data[written:]
                self._unsynced += written
            if self._unsynced >= _SYNC:
                os.fdatasync(self._file.fileno())
                self._unsynced = 0

    def complete(self, file: File) -> None:
        """All of ``file`` has been written."""
        if file.name in self._present:
            return
        with _explained(self._place.root):
            self.write(file, memoryview(b""))
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._file.close()
            self._file, self._unsynced = None, 0

    def publish(self, trust: Trust) -> Resolution:
        """Put all files where they belong, at once; what model that is.

        Raises ``ArchiveRefused`` where it has a file that ``trust`` doesn't allow, or
        the disk has another content of the same commit, and ``ModelInUse`` while
        its repository is being downloaded.
        """
        manifest = self._place.manifest
        for file in manifest.files:
            if not self._staged(file).exists() and not self._place.has(file):
                raise FetchInterrupted(f"{file.name} has vanished from the disk; import it again.")
        names = self._selected(trust)
        with _explained(self._place.root):
            if self._place.blobs is None:
                self._publish_folder()
                return disk.look(self._place.folder, trust)
            with disk.alone(self._place.root, self._place.home.name) as alone:
                if not alone:
                    raise ModelInUse(
                        f"{manifest.repository} is being downloaded; import it when that has ended."
                    )
                self._publish_snapshot(self._place.blobs, names)
                disk.finish(self._place.root, str(manifest.repository), str(manifest.commit))
        return Resolution(
            folder=str(self._place.folder),
            commit=manifest.commit,
            files=tuple(sorted(names)),
            size=manifest.size,
        )

    def discard(self) -> None:
        """Remove what has not been published."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()

    # -- inside --------------------------------------------------------------------

    def _staged(self, file: File) -> Path:
        # No name of the archive's: they are used only where they are wanted.
        return self._folder / str(self._numbers[file.name])

    def _content(self, file: File) -> Path:
        staged = self._staged(file)
        return staged if staged.exists() else self._place.path(file)

    def _selected(self, trust: Trust) -> tuple[str, ...]:
        """The names of the files, those first that others need to make sense."""
        known = {file.name: file for file in self._place.manifest.files}

        def read(name: str) -> bytes:
            if known[name].size > _MAX_INDEX:
                raise ArchiveInvalid(f"{name} in the archive is larger than any index.")
            return self._content(known[name]).read_bytes()

        try:
            chosen = select(self._place.manifest.model, known, read, trust)
        except (FetchError, OSError) as error:
            raise ArchiveRefused(f"The archive has no model that can be loaded: {error}") from None
        superfluous = sorted(known.keys() - {*chosen.names})
        if superfluous:
            raise ArchiveRefused(_unwanted(superfluous[0], trust))
        return (*chosen.first, *chosen.weights)

    def _publish_folder(self) -> None:
        place = self._place
        if all(place.has(file) for file in place.manifest.files):
            return
        tree = self._folder / "tree"
        for file in place.manifest.files:
            path = tree / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            # What is there already isn't written again.
            staged = self._staged(file)
            staged.rename(path) if staged.exists() else shutil.copyfile(place.path(file), path)
        for parent in {tree, *(path for path in tree.rglob("*") if path.is_dir())}:
            _sync(parent)
        with contextlib.suppress(FileNotFoundError):
            # Not whole, or this would have been for nothing.
            place.folder.rename(self._folder / "before")
        tree.rename(place.folder)
        _sync(place.root)

    def _publish_snapshot(self, blobs: Path, names: Collection[str]) -> None:
        place = self._place
        known = {file.name: file for file in place.manifest.files}
        for file in known.values():
            _check_same(place, file)
        blobs.mkdir(parents=True, exist_ok=True)
        staged = [file for file in known.values() if self._staged(file).exists()]
        moved = [str(place.path(file).relative_to(place.root)) for file in staged]
        (self._folder / _MOVED).write_text("\n".join(moved), encoding="ascii")
        for file in staged:
            if not place.has(file):
                self._staged(file).rename(place.path(file))
        _sync(blobs)
        folder = place.folder
        if not folder.exists():
            folder = place.folder.with_name(f".{place.folder.name}.import")
            shutil.rmtree(folder, ignore_errors=True)
        # In this order: where the main weights are, all the rest is.
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.unlink(missing_ok=True)
                path.symlink_to("../" * (2 + name.count("/")) + f"blobs/{known[name].key}")
        for parent in {folder, *(path for path in folder.rglob("*") if path.is_dir())}:
            _sync(parent)
        if folder != place.folder:
            folder.rename(place.folder)
        _sync(place.folder.parent)
        self._refer()

    def _refer(self) -> None:
        """Note what the revision means, unless the hub has said so already.

        Never that the commit is verified: of that an archive's word isn't enough.
        """
        manifest, refs = self._place.manifest, self._place.home / "refs"
        name = manifest.revision or "main"
        if _HASH.fullmatch(name):
            return
        with contextlib.suppress(OSError):
            (refs / name).parent.mkdir(parents=True, exist_ok=True)
            new = self._folder / "reference"
            new.write_text(str(manifest.commit), encoding="ascii")
            os.link(new, refs / name)


def sweep(root: Path) -> None:
    """Remove what imports have left that were killed."""
    for folder in (root / _STAGES).glob("*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("ab") as lock:
            # That of one that goes on is held.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                for name in (folder / _MOVED).read_text("ascii").splitlines():
                    _drop(root, name)
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        (root / _STAGES).rmdir()


def _drop(root: Path, name: str) -> None:
    """Remove a content that no snapshot has come to need."""
    blob = root / name
    snapshots = blob.parent.parent / "snapshots"
    for path in snapshots.rglob("*"):
        hidden = path.relative_to(snapshots).parts[0].startswith(".")
        if not hidden and path.is_symlink() and os.path.basename(os.readlink(path)) == blob.name:  # noqa: PTH115, PTH119 - names, not paths
            return
    blob.unlink(missing_ok=True)
    for half in snapshots.glob(".*.import"):
        shutil.rmtree(half, ignore_errors=True)


def _check_same(place: Place, file: File) -> None:
    """See that the snapshot, where it is there, doesn't have another content by this name."""
    path = place.folder / file.name
    if not path.exists():
        return
    if Path(os.path.realpath(path)).name == file.key:
        return
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        raise ArchiveRefused(
            f"The disk has another {file.name} of the same commit of {place.manifest.repository}: "
            f"one of them is wrong. `tursi rm {place.manifest.repository}@{place.manifest.commit}` "
            "removes the disk's."
        )


def _unwanted(name: str, trust: Trust) -> str:
    if name.endswith(PICKLES) and not trust.allow_pickle:
        return (
            f"The archive has {name}, a pickle file, which can run code when it is loaded; if you "
            "trust who made it, import it with --allow-pickle."
        )
    if name.endswith(".py") and not trust.trust_remote_code:
        return (
            f"The archive has {name}, Python code; if you trust who made it, import it with "
            "--trust-remote-code."
        )
    return f"The archive has {name}, which no model needs; it wasn't made by `tursi export`."


def _digest(files: Collection[File]) -> str:
    """Names a folder by all that is in it."""
    digest = hashlib.sha256()
    for line in sorted(f"{file.name}\0{file.sha256}\n" for file in files):
        digest.update(line.encode())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what is wrong where the disk refuses."""
    try:
        yield
    except TursiError:
        raise
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(
                f"The disk of {folder} became full while the archive was imported; nothing is "
                "kept of it. Free some space."
            ) from None
        raise FetchError(f"The archive can't be written to {folder}: {error}.") from None

"""A model's place in the huggingface cache: ``models--org--name/snapshots/COMMIT``."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from tursi.errors import FetchError, SafetensorsMissing
from tursi.fetcher.partial import SUFFIX, largest
from tursi.model import Resolution, Trust
from tursi.selection import select

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_NAMES = 10_000
_CHUNK = 1 << 20
_LOOK_SECONDS = 0.5
"""Between two looks whether somebody else's download is over."""
_KEEP_SECONDS = 7 * 86400
"""So long the part of a file that has arrived waits for the rest."""


def is_commit(revision: str | None) -> bool:
    """Whether ``revision`` is a whole commit hash, which never changes its meaning."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


class Listed(NamedTuple):
    """A file as the hub lists it; the hashes are hexadecimal, where it gives them."""

    name: str
    size: int
    sha256: str | None
    """Of the content, for large files."""
    blob: str | None
    """Git's hash of the others."""

    def differs(self, path: Path, read: Callable[[int], None]) -> str | None:
        """In what the file at ``path`` isn't this one; ``read`` hears how much has been read."""
        found = path.stat().st_size
        if found != self.size:
            return f"{found} bytes where the hub lists {self.size}"
        # What git hashes begins with the length.
        digest, wanted = (
            (hashlib.sha256(), self.sha256)
            if self.sha256
            else (hashlib.sha1(b"blob %d\0" % found, usedforsecurity=False), self.blob)
        )
        if wanted is None:
            return None
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                read(len(chunk))
        return None if digest.hexdigest() == wanted else "other content than the hub lists"


class Shelf:
    """Where the cache keeps all revisions of one repository."""

    def __init__(
        self,
        cache: Path,
        repository: str,
        trust: Trust = Trust(),  # noqa: B008 - a frozen value
    ) -> None:
        name = "models--" + repository.replace("/", "--")
        self._repository = repository
        self._trust = trust
        self._cache = cache
        self._folder = cache / name
        self._lock = cache / ".locks" / name / "fetcher.lock"
        # Not beside the references: some other program might take them for one.
        self._reference = self._lock.with_name("reference")

    def snapshot(self, commit: str) -> Path:
        """The folder of one commit, whether it exists or not."""
        return self._folder / "snapshots" / commit

    def has_blob(self, name: str) -> bool:
        """Whether this content is here already, for any revision."""
        return (self._folder / "blobs" / name).exists()

    def kept(self, name: str) -> int:
        """How many bytes of this content an earlier download has left."""
        part = largest(self._folder / "blobs", name)
        return part.stat().st_size if part is not None else 0

    def is_verified(self, commit: str) -> bool:
        """Whether its files were once seen to be what the hub lists."""
        return (self._folder / "refs" / commit).exists()

    def begin(self, commit: str) -> None:
        """Note that ``commit`` is no model until ``remember``; the daemon goes by that, too."""
        if not self.is_verified(commit) or self.cached(commit) is None:
            self._unfinished(commit).touch()
            # It may have been one once, and files of it have gone.
            (self._folder / "refs" / commit).unlink(missing_ok=True)

    def remember(self, revision: str | None, commit: str) -> None:
        """Note that ``commit`` is verified, and what ``revision`` means for a time without a hub.

        huggingface_hub makes nothing of a reference that has a commit's name.
        """
        self._refer(commit, commit)
        self._unfinished(commit).unlink(missing_ok=True)
        self._refer(revision or "main", commit)

    def _begun(self, commit: str) -> bool:
        return self._unfinished(commit).exists() and not self.is_verified(commit)

    def _unfinished(self, commit: str) -> Path:
        return self._lock.with_name(f"{commit}.unfinished")

    def _refer(self, name: str, commit: str) -> None:
        path = self._folder / "refs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self._reference.with_name(f"{self._reference.name}.{os.getpid()}")
        new.write_text(commit, encoding="ascii")
        new.replace(path)

    def cached(self, revision: str | None) -> Resolution | None:
        """The snapshot of ``revision`` as far as the cache knows, if it is complete."""
        commit = revision
        if not is_commit(revision):
            try:
                commit = (self._folder / "refs" / (revision or "main")).read_text("ascii").strip()
            except (OSError, UnicodeDecodeError):
                return None
        if commit is None or not is_commit(commit) or self._begun(commit):
            return None
        folder = self.snapshot(commit)
        try:
            present = dict(_files(folder))
            chosen = select(
                self._repository, present, lambda name: (folder / name).read_bytes(), self._trust
            )
        except (FetchError, OSError):
            return None
        size = sum(present[name] for name in chosen.names)
        return Resolution(folder=str(folder), commit=commit, files=chosen.names, size=size)

    def damaged(
        self, commit: str, files: Iterable[Listed], read: Callable[[int], None]
    ) -> dict[str, str]:
        """Which of ``files`` did not arrive as the hub lists them, and what is wrong.

        They are removed, so that the next attempt downloads them again. ``read`` hears
        how many more bytes have been looked at. Raises ``FetchError`` where a file leads
        out of the cache.
        """
        folder = self.snapshot(commit)
        inside = self._cache.resolve()
        wrong: dict[str, str] = {}
        for file in files:
            path = folder / file.name
            target = path.resolve()
            if not target.is_relative_to(inside):
                raise FetchError(f"{file.name} of {self._repository} leads out of the cache.")
            if not target.is_file():
                raise SafetensorsMissing(f"{file.name} of {self._repository} was not downloaded.")
            found = file.differs(target, read)
            if found is not None:
                wrong[file.name] = found
                path.unlink()
                target.unlink(missing_ok=True)
        return wrong

    def resolution(self, commit: str, sizes: dict[str, int]) -> Resolution:
        """The snapshot of ``commit`` with these files."""
        folder, files = str(self.snapshot(commit)), tuple(sorted(sizes))
        return Resolution(folder=folder, commit=commit, files=files, size=sum(sizes.values()))

    @contextlib.contextmanager
    def in_use(self, waits: Callable[[int], None]) -> Iterator[None]:
        """Hold the repository, alone, while downloading into it.

        Somebody else may have it: another daemon with the same cache. ``waits`` is
        told again and again how many bytes have arrived there. Who has it first
        removes what killed downloads have left long ago.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as lock:
            while not _locked(lock):
                waits(self._arrived())
                time.sleep(_LOOK_SECONDS)
            oldest = time.time() - _KEEP_SECONDS
            for leftover in (self._folder / "blobs").glob(f"*{SUFFIX}"):
                if leftover.stat().st_mtime < oldest:
                    leftover.unlink(missing_ok=True)
            for reference in self._lock.parent.glob(f"{self._reference.name}.*"):
                reference.unlink(missing_ok=True)
            yield

    def _arrived(self) -> int:
        found = 0
        for path in (self._folder / "blobs").glob("*"):
            # It may have got its name only now.
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size
        return found


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            # A link whose content is gone isn't a file.
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.stat().st_size
            count += 1
            if count > _MAX_NAMES:
                return

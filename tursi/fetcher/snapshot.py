"""A model's place in the huggingface cache: ``models--org--name/snapshots/COMMIT``."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

from tursi.errors import FetchError, SafetensorsMissing
from tursi.fetcher.selection import select
from tursi.model import Resolution

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_NAMES = 10_000


def is_commit(revision: str | None) -> bool:
    """Whether ``revision`` is a whole commit hash, which never changes its meaning."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


class Shelf:
    """Where the cache keeps all revisions of one repository."""

    def __init__(self, cache: Path, repository: str) -> None:
        name = "models--" + repository.replace("/", "--")
        self._repository = repository
        self._cache = cache
        self._folder = cache / name
        self._lock = cache / ".locks" / name / "fetcher.lock"

    def snapshot(self, commit: str) -> Path:
        """The folder of one commit, whether it exists or not."""
        return self._folder / "snapshots" / commit

    def has_blob(self, name: str) -> bool:
        """Whether this content is here already, for any revision."""
        return (self._folder / "blobs" / name).exists()

    def remember(self, revision: str | None, commit: str) -> None:
        """Note what ``revision`` means, for a time without a hub."""
        if is_commit(revision):
            return
        path = self._folder / "refs" / (revision or "main")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
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
        if commit is None or not is_commit(commit):
            return None
        folder = self.snapshot(commit)
        try:
            present = dict(_files(folder))
            chosen = select(self._repository, present, lambda name: (folder / name).read_bytes())
        except (FetchError, OSError):
            return None
        size = sum(present[name] for name in chosen.names)
        return Resolution(folder=str(folder), commit=commit, files=chosen.names, size=size)

    def verify(self, commit: str, sizes: dict[str, int]) -> Resolution:
        """The snapshot of ``commit``, having seen that each file is there and whole.

        A file of another size than the hub's listing says is removed, so that
        the next attempt downloads it again.
        """
        folder = self.snapshot(commit)
        inside = self._cache.resolve()
        for name, size in sizes.items():
            path = folder / name
            target = path.resolve()
            if not target.is_relative_to(inside):
                raise FetchError(f"{name} of {self._repository} leads out of the cache.")
            if not target.is_file():
                raise SafetensorsMissing(f"{name} of {self._repository} was not downloaded.")
            if (found := target.stat().st_size) != size:
                path.unlink()
                target.unlink(missing_ok=True)
                raise FetchError(
                    f"{name} of {self._repository} arrived with {found} bytes where the hub "
                    f"lists {size}; it was removed, try again."
                )
        return Resolution(
            folder=str(folder), commit=commit, files=tuple(sorted(sizes)), size=sum(sizes.values())
        )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the repository while downloading into it.

        Who is alone there first removes what killed downloads have left:
        huggingface_hub gives each attempt a file of its own and never comes
        back to it.
        """
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                for leftover in (self._folder / "blobs").glob("*.incomplete"):
                    leftover.unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield


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

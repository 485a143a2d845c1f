"""Files of weights on their way into the page cache, while libraries are still imported.

A load maps its files and so reads them page by page, in whatever order the model
asks for them. Read once from start to end before that, they come as fast as
the disk can, and it can be said how far that is. What is in the page cache already is
not read again, and nothing is copied.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG

from tursi.model import Progress

_PIECE = 4 * 1024 * 1024
_MOST = 0.5
"""Share of the memory that is free: files that are larger wouldn't stay until they are needed."""
_INDEX_LIMIT = 32 * 1024 * 1024


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a load of ``folder`` will need, as far as that is plain to see."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        if index.stat().st_size > _INDEX_LIMIT:
            return []
        names = {*json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    # Whether they are what they should be is looked into later.
    return [folder / name for name in sorted(map(str, names)) if Path(name).name == name]


class Readahead(threading.Thread):
    """Reads ``paths`` from start to end; one that can't be read is left for the load to judge."""

    def __init__(self, paths: Sequence[Path], memory: int | None = None) -> None:
        """``memory`` is how many bytes are free; by default the machine is asked."""
        super().__init__(name="readahead", daemon=True)
        self._files = [(path, size) for path in paths if (size := _size(path)) is not None]
        self.total = sum(size for _, size in self._files)
        """Bytes."""
        self.done = 0
        self.part = 0
        free = _free() if memory is None else memory
        if self.total > _MOST * free:
            self._files, self.total = [], 0

    def progress(self) -> Progress:
        """How far it has come."""
        return Progress(
            "read",
            float(self.done),
            float(self.total),
            "bytes",
            part=max(self.part, 1),
            parts=len(self._files),
        )

    def run(self) -> None:
        """Read."""
        # Pages that are sent to nowhere are only looked up, not copied.
        with suppress(OSError), Path(os.devnull).open("wb", buffering=0) as nowhere:
            for number, (path, size) in enumerate(self._files, 1):
                self.part = number
                before = self.done
                with suppress(OSError), path.open("rb", buffering=0) as file:
                    while self.done < before + size:
                        sent = os.sendfile(
                            nowhere.fileno(), file.fileno(), self.done - before, _PIECE
                        )
                        if sent == 0:
                            break
                        self.done += sent
                self.done = before + size


def _size(path: Path) -> int | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if S_ISREG(found.st_mode) else None


def _free() -> int:
    """Bytes that can be had without pushing out what others use; 0 where that isn't known."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0

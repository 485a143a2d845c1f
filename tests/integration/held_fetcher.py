"""The real fetcher, which stops at a point of its work until it is let go or killed.

``hold`` says at which, for one download of one repository.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tursi.fetcher.__main__ import main as fetch
from tursi.fetcher.download import Download
from tursi.fetcher.snapshot import Shelf

POINTS = ("begun", "listed", "between", "verify", "referred", "published", "said")
"""
begun      before the hub is asked
listed     when it has answered
between    when the first shard is there, and before the second is asked for
verify     before hashes are compared
referred   when the commit is noted as verified, and not yet what the branch means
published  when both are
said       when the daemon has been told, and before the process ends
"""
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def note(cache: Path, repository: str) -> Path:
    """The file that says where the fetcher of ``repository`` is to stop; gone when it does."""
    return cache / ".hold" / repository.replace("/", "--")


def hold(cache: Path, repository: str, point: str) -> Path:
    """Have the next fetcher of it stop at that; the file of the answer is there when it does.

    Until it is removed.
    """
    assert point in POINTS
    path = note(cache, repository)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(point)
    return path.with_suffix(".reached")


class Hold:
    """Stops this process at one point."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.point = path.read_text() if path.exists() else ""

    def stop(self, point: str) -> None:
        """Wait here, if this is the point."""
        if point == self.point and self._path.exists():
            reached = self._path.with_suffix(".reached")
            # On a full disk its page would be just what somebody else needs.
            os.truncate(self._path, 0)
            self._path.rename(reached)
            while reached.exists():
                time.sleep(0.02)

    def around(self, owner: type, name: str, before: str = "", after: str = "") -> None:
        """Stop before or after that method of ``owner``."""
        real: Callable[..., Any] = getattr(owner, name)

        def held(*arguments: Any) -> Any:
            self.stop(before)
            answer = real(*arguments)
            self.stop(after)
            return answer

        setattr(owner, name, held)


def main() -> int:
    hold = Hold(note(Path(sys.argv[3]), sys.argv[1]))
    hold.around(Download, "_ask", before="begun", after="listed")
    hold.around(Shelf, "damaged", before="verify")
    hold.around(Shelf, "_refer", after="referred")
    hold.around(Shelf, "remember", after="published")
    get = Download._get

    def get_held(
        self: Download, commit: str, name: str, tqdm_class: type[Any] | None = None
    ) -> str:
        if name == SHARDS[1] and hold.point == "between":
            while not (self._shelf.snapshot(commit) / SHARDS[0]).exists():
                time.sleep(0.02)
            hold.stop("between")
        return get(self, commit, name, tqdm_class)

    Download._get = get_held  # type: ignore[method-assign] # to be held is the point
    status = fetch(sys.argv[1:])
    hold.stop("said")
    return status


if __name__ == "__main__":
    ended = main()
    sys.stderr.flush()
    os._exit(ended)

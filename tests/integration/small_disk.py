"""A daemon on a disk that can be filled."""

from __future__ import annotations

import subprocess
from pathlib import Path

from daemon import Daemon


class SmallDisk(Daemon):
    """A daemon whose state folder is a file system of its own, seen by itself only."""

    def arguments(self, *twistd: str) -> list[str]:
        self.state.mkdir(exist_ok=True)
        mount = 'mount -t tmpfs -o size=16m none "$0" && exec "$@"'
        return ["unshare", "-m", "sh", "-c", mount, str(self.state), *super().arguments(*twistd)]

    @property
    def disk(self) -> Path:
        """The state folder as it sees it."""
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/root{self.state}")

    @property
    def filler(self) -> Path:
        """A file on it."""
        return self.disk / "filler"

    def fill(self) -> None:
        """Leave no room."""
        with self.filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue


def may_mount() -> bool:
    """Whether a file system can be mounted here."""
    try:
        return not subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"],
            capture_output=True,
            timeout=30,
            check=False,
        ).returncode
    except OSError:
        return False

"""Where the file lies, and whose it is: what has to be refused before SQLite opens it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from tursi.errors import DatabaseError

_NETWORK = frozenset(
    {
        "afs", "beegfs", "ceph", "cifs", "davfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
        "nfs4", "smb3", "smbfs", "sshfs", "s3fs",
    }
)  # fmt: skip
_OCTAL = re.compile(r"\\([0-7]{3})")
_MOUNTS = Path("/proc/self/mountinfo")


def check(path: Path, *, owner: int | None) -> None:
    """Raise ``DatabaseError`` if the file at ``path`` mustn't be used from there.

    A missing file is fine if its folder is. ``owner`` is the user that the file
    must belong to, ``None`` where that isn't known yet. ``OSError`` says that it
    can't be looked at.
    """
    if path.is_symlink():
        # SQLite would follow it, to where another daemon's lock doesn't reach.
        raise DatabaseError(
            f"The database {path} is a symbolic link; put the file itself there, or make the whole "
            "state folder a link."
        )
    kind = file_system(_MOUNTS.read_text(errors="replace"), path.parent.resolve())
    if kind.removeprefix("fuse.") in _NETWORK:
        raise DatabaseError(
            f"The database {path} is on a network file system ({kind}), where SQLite can't keep it "
            "safe; put the state folder on a local disk with --state."
        )
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise DatabaseError(f"The database {path} can't be used: it is no plain file.")
    if owner is not None and found.st_uid != owner:
        raise DatabaseError(
            f"The database {path} belongs to user {found.st_uid}, but the daemon runs as user "
            f"{owner}; run it as that user, or give it the whole state folder with chown."
        )
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        raise DatabaseError(
            f"The database {path} may not be read and written by user {os.geteuid()}; give it the "
            "state folder with chown, or choose another with --state."
        )


def beside(path: Path, suffix: str) -> Path:
    """The name of a file that belongs to the one at ``path``."""
    return path.with_name(f"{path.name}.{suffix}")


def copies(path: Path) -> list[Path]:
    """The copies from before upgrades of the file at ``path``, oldest first."""
    name = re.compile(re.escape(path.name) + r"\.v(\d+)")
    found = [
        (int(match[1]), other)
        for other in path.parent.iterdir()
        if (match := name.fullmatch(other.name))
    ]
    return [other for _, other in sorted(found)]


def file_system(mounts: str, folder: Path) -> str:
    """The type of the file system that holds ``folder``, by the text of a ``mountinfo``."""
    found, depth = "", -1
    for line in mounts.splitlines():
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if not separator or len(fields) < 5:
            continue
        point = Path(_OCTAL.sub(lambda code: chr(int(code[1], 8)), fields[4]))
        # The last one mounted on a place hides the others.
        if folder.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = after.split(" ")[0], len(point.parts)
    return found

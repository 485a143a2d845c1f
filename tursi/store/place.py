"""Where the file lies, and whose it is: what has to be refused before SQLite opens it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from tursi import mounts
from tursi.errors import DatabaseError

_NETWORK = frozenset(
    {
        "afs", "beegfs", "ceph", "cifs", "davfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs",
        "nfs4", "smb3", "smbfs", "sshfs", "s3fs",
    }
)  # fmt: skip


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
    kind = mounts.file_system(mounts.MOUNTS.read_text(errors="replace"), path.parent.resolve())
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

"""Who is at the other end of a Unix socket, as the kernel says."""

from __future__ import annotations

import os
import socket
import struct
from array import array
from dataclasses import dataclass
from typing import Any

_CREDENTIALS = struct.Struct("iII")
"""``struct ucred``: pid, uid, gid."""
_GROUPS = 59
"""``SO_PEERGROUPS``, which the module ``socket`` doesn't know."""
_MAX_GROUPS = 65536
"""As many as Linux gives a process."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that connected, as it was when it did."""

    uid: int
    groups: frozenset[int] = frozenset()

    def is_trusted(self, group: int | None) -> bool:
        """Whether it is root's, this daemon's own user's, or of a member of ``group``."""
        return self.uid in {0, os.geteuid()} or (group is not None and group in self.groups)


def peer_of(transport: Any) -> Peer:
    """The other end of ``transport``, which is a connection on a Unix socket."""
    handle = transport.getHandle()
    packed = handle.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, gid = _CREDENTIALS.unpack(packed)
    return Peer(uid, frozenset({gid, *_groups(handle)}))


def _groups(handle: Any) -> array[int]:
    # No look at the user database, which may be far away and slow.
    found = array("I")
    for size in (256, 4 * _MAX_GROUPS):
        try:
            found.frombytes(handle.getsockopt(socket.SOL_SOCKET, _GROUPS, size))
        except OSError:
            # ERANGE: more of them; ENOPROTOOPT: a kernel before 4.13.
            continue
        break
    return found

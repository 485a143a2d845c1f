"""What keeps the daemon from starting, found before it is one, and the exit status of that."""

from __future__ import annotations

from collections.abc import Mapping

from tursi import store
from tursi.certificates import certificates
from tursi.config import Configuration
from tursi.errors import AlreadyRunning, ConfigurationError, DatabaseError, TursiError
from tursi.listen import check, check_nobody_serves, control, group_id, is_handed_over
from tursi.lock import StateLock
from tursi.model import Folders

_EXIT_STATUS: Mapping[type[TursiError], int] = {
    AlreadyRunning: 75,
    ConfigurationError: 78,
    DatabaseError: 78,
}
_UNAVAILABLE = 69


def exit_status(error: TursiError) -> int:
    """The process's exit status when ``error`` keeps it from starting (sysexits.h)."""
    for kind, status in _EXIT_STATUS.items():
        if isinstance(error, kind):
            return status
    return _UNAVAILABLE


def preflight(configuration: Configuration, folders: Folders) -> None:
    """Raise what would keep the daemon from starting; change nothing.

    The same is looked at again, authoritatively, in ``startService``: between
    the two, the world may change.
    """
    group_id(configuration.http.control_group)
    StateLock(folders.state).probe()
    try:
        store.inspect(folders.database)
    except DatabaseError:
        # Or a daemon has begun to write it in the meantime.
        StateLock(folders.state).probe()
        raise
    for listener in configuration.http.listeners:
        check(listener)
        certificates(listener)
    if not is_handed_over(control(folders.socket, configuration.http.listeners)):
        check_nobody_serves(folders.socket)

"""Where the daemon keeps what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

_FHS_STATE = Path("/var/lib/tursi")
_FHS_LOGS = Path("/var/log/tursi")


@dataclass(frozen=True, slots=True)
class Folders:
    """Where the daemon keeps what; the CLI needs the same answers."""

    state: Path
    runtime: Path
    cache: Path
    configuration: Path
    log_folder: Path | None = None
    """Of the daemon's own log, where somebody has named one."""

    @property
    def socket(self) -> Path:
        """The Unix socket with all roles."""
        return self.runtime / "control.sock"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state / "tursi.sqlite"

    @property
    def logs(self) -> Path:
        """The folder with a log file per worker life."""
        return self.state / "workers"

    @property
    def log(self) -> Path:
        """The daemon's own log, where it is a file."""
        usual = _FHS_LOGS if self.state == _FHS_STATE else self.state
        return (self.log_folder or usual) / "tursi.log"

    @property
    def pid_file(self) -> Path:
        """Names the daemon's process."""
        return self.runtime / "tursi.pid"

    @property
    def status_file(self) -> Path:
        """Tells what a running daemon is."""
        return self.runtime / "tursi.json"

    def moved(
        self, *, state: Path | None = None, runtime: Path | None = None, cache: Path | None = None
    ) -> Folders:
        """With the folders that the command line names, absolute; the others follow ``state``."""
        found = self
        if state is not None:
            state = state.absolute()
            found = replace(self, state=state, runtime=state / "run", cache=state / "cache")
        if runtime is not None:
            found = replace(found, runtime=runtime.absolute())
        return found if cache is None else replace(found, cache=cache.absolute())


def folders(environ: Mapping[str, str], uid: int) -> Folders:
    """Folders by FHS for root and by XDG for everyone else.

    ``TURSI_STATE_DIR``, ``TURSI_RUNTIME_DIR``, ``TURSI_CACHE_DIR``, ``TURSI_LOG_DIR``
    and ``TURSI_CONFIG`` name them one by one and win.
    """
    home = Path(environ.get("HOME") or "/")
    if uid == 0:
        state, runtime = _FHS_STATE, Path("/run/tursi")
        cache, configuration = Path("/var/cache/tursi"), Path("/etc/tursi/tursi.toml")
    else:
        state = _xdg(environ, "XDG_STATE_HOME", home / ".local/state") / "tursi"
        cache = _xdg(environ, "XDG_CACHE_HOME", home / ".cache") / "tursi"
        configuration = _xdg(environ, "XDG_CONFIG_HOME", home / ".config") / "tursi/tursi.toml"
        runtime = _xdg(environ, "XDG_RUNTIME_DIR", state.parent) / "tursi"
        if "XDG_RUNTIME_DIR" not in environ:
            runtime = state / "run"
    return Folders(
        state=Path(environ.get("TURSI_STATE_DIR") or state),
        runtime=Path(environ.get("TURSI_RUNTIME_DIR") or runtime),
        cache=Path(environ.get("TURSI_CACHE_DIR") or cache),
        configuration=Path(environ.get("TURSI_CONFIG") or configuration),
        log_folder=Path(logs) if (logs := environ.get("TURSI_LOG_DIR")) else None,
    )


def _xdg(environ: Mapping[str, str], variable: str, default: Path) -> Path:
    # The XDG specification says to ignore relative values.
    value = environ.get(variable, "")
    return Path(value) if Path(value).is_absolute() else default

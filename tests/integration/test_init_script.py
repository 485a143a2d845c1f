"""etc/init.d/tursi, run as init runs it, in a prefix of its own."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from daemon import free_port
from patience import until

SCRIPT = Path(__file__).parents[2] / "etc/init.d/tursi"
TURSI = Path(sys.executable).with_name("tursi")
ME = pwd.getpwuid(os.getuid()).pw_name


class Init:
    """The script with /etc/default/tursi that leads into ``folder``."""

    def __init__(self, folder: Path, **variables: object) -> None:
        self.folder = folder
        self.port = free_port()
        self.configuration = folder / "tursi.toml"
        self.configuration.write_text(
            "[[http.listeners]]\n"
            f'endpoint = "tcp:{self.port}:interface=127.0.0.1"\n'
            'roles = ["inference", "health"]\n'
        )
        self.settings: Mapping[str, object] = {
            "TURSI": TURSI,
            "TURSI_USER": ME,
            "TURSI_STATE_DIR": folder / "state",
            "TURSI_CACHE_DIR": folder / "cache",
            "TURSI_RUNTIME_DIR": folder / "run",
            "TURSI_LOG_DIR": folder / "log",
            "TURSI_CONFIG": self.configuration,
            **variables,
        }
        self.defaults = folder / "default"
        self.defaults.write_text("".join(f"{name}={it}\n" for name, it in self.settings.items()))

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status and output."""
        with (self.folder / "output").open("w+") as output:
            # A file, not a pipe: the daemon must not hold it open.
            done = subprocess.run(
                [str(SCRIPT), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ["PATH"], "TURSI_DEFAULTS": str(self.defaults)},
                timeout=100,
                check=False,
            )
            output.seek(0)
            return done.returncode, output.read()

    def pid(self) -> int:
        return int((self.folder / "run/tursi.pid").read_text())

    def serves(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not pytest's tmp_path: a Unix socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="tursi-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


# Some fifteen commands, each of them an interpreter or two.
@pytest.mark.timeout(300)
def test_every_action_and_its_exit_status(folder: Path) -> None:
    init = Init(folder)
    try:
        assert init("status")[0] == 3
        assert init("stop")[0] == 0
        assert init("reload")[0] == 7

        assert init("start")[0] == 0
        assert init.serves()
        first = init.pid()
        assert init("status")[0] == 0
        assert init("start")[0] == 0
        assert init.pid() == first
        assert init("force-reload")[0] == 0
        assert init.pid() == first
        # What init left open isn't the daemon's.
        held = {str(each.readlink()) for each in Path(f"/proc/{first}/fd").iterdir()}
        assert str(folder / "output") not in held

        assert init("restart")[0] == 0
        second = init.pid()
        assert second != first
        assert init.serves()

        # A kill leaves the PID file, and keeps nobody from starting.
        os.kill(second, 9)
        until(lambda: not Path(f"/proc/{second}").exists(), "it is gone")
        assert init("status")[0] == 1
        assert init("force-reload")[0] == 0
        assert init.serves()

        init.configuration.write_text("[nothing]\n")
        status, said = init("reload")
        assert status != 0
        assert "nothing" in said
        # What couldn't be started again isn't stopped.
        status, said = init("restart")
        assert status not in {0, 3, 5, 6, 7}
        assert "nothing" in said
        assert init.serves()
    finally:
        stopped = init("stop")
    assert stopped[0] == 0
    assert init("status")[0] == 3
    assert not init.serves()

    status, said = init("start")
    assert status not in {0, 3, 5, 6, 7}
    assert "nothing" in said


def test_what_it_refuses(folder: Path) -> None:
    assert Init(folder)()[0] == 2
    assert Init(folder)("frobnicate")[0] == 3
    missing = Init(folder, TURSI=folder / "nowhere")
    assert (missing("start")[0], missing("status")[0]) == (5, 4)
    nobody = Init(folder, TURSI_USER="nobody-of-this-name")
    assert [nobody(each)[0] for each in ("start", "stop", "status")] == [6, 0, 3]
    assert "install-service --sysv" in nobody("start")[1]


def test_the_folders_that_nobody_has_named_reach_the_daemon(folder: Path) -> None:
    stand_in = folder / "tursi"
    names = ("STATE_DIR", "CACHE_DIR", "RUNTIME_DIR", "LOG_DIR", "CONFIG")
    stand_in.write_text("#!/bin/sh\n" + "".join(f'echo "$TURSI_{name}"\n' for name in names))
    stand_in.chmod(0o755)
    script = folder / "script"
    text = SCRIPT.read_text()
    script.write_text(re.sub(r"(?m)^(TURSI_(?:\w+_DIR|CONFIG))=", rf"\1={folder}", text))
    script.chmod(0o755)
    defaults = folder / "default"
    defaults.write_text(f"TURSI={stand_in}\nTURSI_USER={ME}\n")
    done = subprocess.run(
        [script, "start"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "TURSI_DEFAULTS": str(defaults)},
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    places = (
        "var/lib/tursi",
        "var/cache/tursi",
        "run/tursi",
        "var/log/tursi",
        "etc/tursi/tursi.toml",
    )
    assert done.stdout.split() == [f"{folder}/{place}" for place in places]


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("runuser") is None,
    reason="only root becomes another user, by runuser",
)
def test_root_runs_it_as_the_user_of_the_service(folder: Path) -> None:
    stand_in = folder / "tursi"
    stand_in.write_text(
        '#!/bin/sh\necho "$1 as $(id -un) in $(pwd) home $HOME state $TURSI_STATE_DIR"\n'
    )
    stand_in.chmod(0o755)
    init = Init(folder, TURSI=stand_in, TURSI_USER="nobody")
    state = folder / "state"
    said = f"start as nobody in / home {state} state {state}\n"
    assert init("start") == (0, said)
    for name in ("state", "cache", "run", "log"):
        made = (folder / name).stat()
        assert (made.st_uid, made.st_mode & 0o777) == (pwd.getpwnam("nobody").pw_uid, 0o750)

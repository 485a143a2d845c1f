"""Units and scripts, judged by the tools of those who run them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tursi.cli import main

ROOT = Path(__file__).parents[1]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
MAX_EXPOSURE = 25
"""Tenths: systemd-analyze's 2.5."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze isn't on this machine, and no Python package brings it",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root folder below which everything was written."""
    root = tmp_path_factory.mktemp("root")
    for options in ([], ["--sysv"]):
        done = CliRunner().invoke(main, ["install-service", *options], env={"DESTDIR": str(root)})
        assert done.exit_code == 0, done.output
    environment = {"DESTDIR": str(root), "HOME": "/home/ada", "XDG_CONFIG_HOME": None}
    done = CliRunner().invoke(main, ["install-service", "--user"], env=environment)
    assert done.exit_code == 0, done.output
    return root


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )


UNITS = {
    "service": "etc/systemd/system/tursi.service",
    "socket": "etc/systemd/system/tursi.socket",
    "user": "home/ada/.config/systemd/user/tursi.service",
}


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_has_nothing_to_say_against_a_unit(installed: Path, name: str) -> None:
    scope = ["--user"] if name == "user" else []
    done = run("systemd-analyze", "verify", *scope, installed / UNITS[name])
    # It also reads the other units of the machine, whose faults aren't ours.
    assert not [line for line in done.stdout.splitlines() if "tursi" in line]


@needs_systemd
def test_the_system_service_is_shut_in(installed: Path) -> None:
    unit = installed / UNITS["service"]
    done = run("systemd-analyze", "security", "--offline=true", f"--threshold={MAX_EXPOSURE}", unit)
    assert done.returncode == 0, done.stdout[-500:]
    assert "Overall exposure level" in done.stdout


def test_a_script_for_init_is_clean(installed: Path) -> None:
    # Comes with the extra "test", so that it is the same one everywhere.
    done = run(SHELLCHECK, "--shell=sh", "--severity=style", installed / "etc/init.d/tursi")
    assert (done.returncode, done.stdout) == (0, "")


def test_its_header_is_that_of_the_linux_standard_base() -> None:
    text = (ROOT / "etc/init.d/tursi").read_text()
    header = text.partition("### BEGIN INIT INFO\n")[2].partition("### END INIT INFO\n")[0]
    said = dict(
        line.removeprefix("# ").split(":", 1)
        for line in header.splitlines()
        if not line.startswith("#  ")
    )
    assert said["Provides"].split() == ["tursi"]
    assert set(said["Required-Start"].split()) == {"$remote_fs", "$syslog", "$network"}
    assert said["Default-Start"].split() == ["2", "3", "4", "5"]
    assert said["Default-Stop"].split() == ["0", "1", "6"]
    assert said["Short-Description"].strip()


def test_units_and_script_agree_on_folders() -> None:
    unit = (ROOT / "etc/systemd/tursi.service").read_text()
    script = (ROOT / "etc/init.d/tursi").read_text()
    defaults = (ROOT / "etc/default/tursi").read_text()
    for name in ("CONFIG", "STATE_DIR", "RUNTIME_DIR", "CACHE_DIR"):
        (line,) = (each for each in script.splitlines() if each.startswith(f"TURSI_{name}="))
        assert f"\nEnvironment={line}\n" in unit
        assert f"\n#{line}\n" in defaults
    socket = (ROOT / "etc/systemd/tursi.socket").read_text()
    assert "\nListenStream=/run/tursi/control.sock\n" in socket

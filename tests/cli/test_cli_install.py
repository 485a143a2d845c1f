"""``tursi install-service``: what is written where, again, and over other people's files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tursi import config
from tursi.cli import install, main

BIN = Path(sys.executable).parent
SYSTEM = {
    "etc/systemd/system/tursi.service": 0o644,
    "etc/systemd/system/tursi.socket": 0o644,
    "etc/sysusers.d/tursi.conf": 0o644,
    "etc/tmpfiles.d/tursi.conf": 0o644,
    "etc/default/tursi": 0o644,
    "etc/tursi/tursi.toml": 0o640,
    "etc/logrotate.d/tursi": 0o644,
}
UNIT = "etc/systemd/system/tursi.service"


def run(root: Path | None, *options: str, home: Path | None = None) -> Result:
    environment = {
        "DESTDIR": None if root is None else str(root),
        "HOME": str(home or "/nonexistent"),
        "XDG_CONFIG_HOME": None,
    }
    return CliRunner().invoke(main, ["install-service", *options], env=environment)


def outcomes(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return {each["path"][1:]: each["outcome"] for each in json.loads(result.stdout)["files"]}


def modes(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_mode & 0o7777
        for path in root.rglob("*")
        if path.is_file()
    }


def test_a_system_service(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        found = outcomes(run(tmp_path, "--json"))
    finally:
        os.umask(before)
    assert found == dict.fromkeys(SYSTEM, "written")
    assert modes(tmp_path) == SYSTEM
    assert all(
        each.stat().st_mode & 0o055 == 0o055 for each in tmp_path.rglob("*") if each.is_dir()
    )
    unit = (tmp_path / UNIT).read_text()
    assert f"\nExecStart={BIN}/twistd -n --pidfile= tursi\n" in unit
    assert f"\nExecReload={BIN}/tursi reload\n" in unit
    assert "/usr/bin/" not in unit
    (page,) = (line for line in unit.splitlines() if line.startswith("Documentation=file://"))
    assert Path(page.partition("file://")[2]).is_file()
    assert f"{BIN}/tursi reload" in (tmp_path / "etc/logrotate.d/tursi").read_text()


def test_the_settings_are_all_there_and_none_is_set(tmp_path: Path) -> None:
    run(tmp_path)
    text = (tmp_path / "etc/tursi/tursi.toml").read_text()
    assert config.parse(text, "tursi.toml") == config.Configuration()
    assert not [line for line in text.splitlines() if line and not line.startswith("#")]
    assert "#max_queued = 512" in text


def test_an_init_script(tmp_path: Path) -> None:
    (tmp_path / "etc/sysconfig").mkdir(parents=True)
    found = outcomes(run(tmp_path, "--sysv", "--json"))
    assert set(found) == {
        "etc/init.d/tursi", "etc/sysconfig/tursi", "etc/tursi/tursi.toml", "etc/logrotate.d/tursi",
    }  # fmt: skip
    script = tmp_path / "etc/init.d/tursi"
    assert script.stat().st_mode & 0o777 == 0o755
    assert f"\nTURSI={BIN}/tursi\n" in script.read_text()


def test_a_service_of_ones_own(tmp_path: Path) -> None:
    result = run(None, "--user", "--json", home=tmp_path)
    unit = tmp_path / ".config/systemd/user/tursi.service"
    assert outcomes(result) == {str(unit)[1:]: "written"}
    assert f"\nExecStart={BIN}/twistd" in unit.read_text()
    assert "systemctl --user enable --now tursi" in json.loads(result.stdout)["next"]


def test_the_same_again_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    assert set(outcomes(run(tmp_path, "--json")).values()) == {"unchanged"}
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_what_somebody_has_changed_is_kept_and_said(tmp_path: Path) -> None:
    run(tmp_path)
    unit = tmp_path / UNIT
    ours = unit.read_text()
    theirs = ours.replace("WatchdogSec=30", "WatchdogSec=300")
    unit.write_text(theirs)
    (tmp_path / "etc/default/tursi").write_text("CUDA_VISIBLE_DEVICES=1\n")
    result = run(tmp_path)
    assert unit.read_text() == theirs
    assert unit.with_name("tursi.service.new").read_text() == ours
    assert f"/{UNIT} was changed by somebody and is kept" in result.stderr
    assert f"kept      /{UNIT}" in result.stdout
    assert "present   /etc/default/tursi" in result.stdout
    assert not (tmp_path / "etc/default/tursi.new").exists()


def test_what_an_earlier_version_has_written_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        context.setattr(install, "BIN", Path("/opt/old/bin"))
        run(tmp_path)
    assert "/opt/old/bin/twistd" in (tmp_path / UNIT).read_text()
    found = outcomes(run(tmp_path, "--json"))
    assert found[UNIT] == "updated"
    assert found["etc/sysusers.d/tursi.conf"] == "unchanged"
    assert "/opt/old" not in (tmp_path / UNIT).read_text()


def test_a_masked_unit_stays_masked(tmp_path: Path) -> None:
    unit = tmp_path / UNIT
    unit.parent.mkdir(parents=True)
    unit.symlink_to("/dev/null")
    assert outcomes(run(tmp_path, "--json"))[UNIT] == "kept"
    assert unit.is_symlink()
    assert not unit.with_name("tursi.service.new").exists()


@pytest.mark.parametrize(
    ("options", "folder", "said"),
    [
        (("--user", "--sysv"), "/opt/tursi/bin", "choose --user or --sysv"),
        ((), "/opt/my tursi/bin", "install Tursi in a folder with a plain name"),
        ((), "/opt/100%/bin", "install Tursi in a folder with a plain name"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str], folder: str, said: str
) -> None:
    monkeypatch.setattr(install, "BIN", Path(folder))
    result = run(tmp_path, *options)
    assert result.exit_code != 0
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_only_root_writes_a_system_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    result = run(None)
    assert result.exit_code == 2
    assert "Only root can write a system service" in result.stderr


def test_an_installation_that_the_service_could_not_see_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "BIN", Path("/root/venv/bin"))
    result = run(tmp_path)
    assert result.exit_code == 0
    assert "/root/venv/bin is hidden from system services" in result.stderr

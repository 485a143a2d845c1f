"""What a user gets who installs the wheel, rather than the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", "--wheel-dir", folder, ROOT, folder=folder)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and a Twisted of its own.

    Everything else that it needs it sees in the environment of the tests, at
    the end of its path: what is installed there in editable form stays unseen.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    ours = Path(
        run(
            python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", folder=folder
        ).strip()
    )
    theirs = Path(sysconfig.get_path("purelib"))
    (ours / "rest.pth").write_text(f"{theirs}\n")
    for file in metadata.distribution("twisted").files or ():
        source, target = Path(str(file.locate())), ours / file
        if theirs in source.parents and source.suffix != ".pyc":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, folder=folder)
    return python


def test_the_wheel_holds_the_package_and_the_plugin_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    plugin = "twisted/plugins/tursi_plugin.py"
    assert plugin in names
    assert "tursi/py.typed" in names
    others = {name for name in names if not name.startswith("tursi/") and name != plugin}
    assert {name.partition("/")[0].partition("-")[0] for name in others} == {"tursi"}
    assert all(".dist-info/" in name for name in others)
    assert not any(name.endswith((".pyc", ".cache", ".sqlite")) for name in names)


def test_the_wheel_is_what_runs(python: Path) -> None:
    found = run(
        python,
        "-I",
        "-c",
        "import tursi, twisted; print(tursi.__file__, twisted.__file__)",
        folder=python.parent,
    ).split()
    assert all(Path(each).is_relative_to(python.parents[1]) for each in found)


def test_twistd_lists_tursi(python: Path) -> None:
    twistd = "from twisted.scripts.twistd import run; run()"
    listed = run(python, "-I", "-c", twistd, "--help", folder=python.parent)
    (line,) = (line for line in listed.splitlines() if line.split()[:1] == ["tursi"])
    assert "Serve AI models on your own machines." in line
    options = run(python, "-I", "-c", twistd, "tursi", "--help", folder=python.parent)
    assert "--config" in options


def test_get_plugins_finds_it_without_importing_tursi(python: Path) -> None:
    program = (
        "import sys\n"
        "from twisted.application.service import IServiceMaker\n"
        "from twisted.plugin import getPlugins\n"
        "print([each.tapname for each in getPlugins(IServiceMaker)].count('tursi'))\n"
        "print([name for name in ('tursi', 'klein', 'torch') if name in sys.modules])\n"
        "print('twisted.internet.reactor' in sys.modules)\n"
    )
    found = run(python, "-I", "-c", program, folder=python.parent).splitlines()
    assert found == ["1", "[]", "False"]


def test_the_command_is_installed(python: Path) -> None:
    assert "up" in run(python.with_name("tursi"), "--help", folder=python.parent)


def test_it_brings_the_files_of_every_service_manager(wheel: Path, python: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tursi/etc/")}
    folders = ("default", "init.d", "logrotate.d", "systemd", "sysusers.d", "tmpfiles.d")
    ours = {file for each in folders for file in (ROOT / "etc" / each).rglob("*") if file.is_file()}
    expected = {f"tursi/{file.relative_to(ROOT)}" for file in ours}
    assert inside == expected | {"tursi/etc/tursi.toml", "tursi/etc/operations.rst"}
    program = (
        "import os, sys; os.environ['DESTDIR'] = sys.argv.pop(1); import tursi.cli as c; c.main()"
    )
    root = python.parent / "root"
    run(python, "-I", "-c", program, root, "install-service", folder=python.parent)
    unit = (root / "etc/systemd/system/tursi.service").read_text()
    assert f"ExecStart={python.parent}/twistd " in unit
    page = Path(unit.partition("Documentation=file://")[2].partition("\n")[0])
    assert page.read_text() == (ROOT / "docs/operations.rst").read_text()


def test_each_dependency_has_its_pin() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    names = {name.lower().replace("_", "-") for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = {
        requirement.partition(">=")[0].partition("[")[0]
        for requirement in (*project["dependencies"], *(each for extra in extras for each in extra))
    }
    assert needed <= names
    assert pins["torch"] == "2.13.0"
    assert all("+" not in version for version in pins.values())

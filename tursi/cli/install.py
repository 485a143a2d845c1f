"""What a service manager needs of this installation, written where it looks for it."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import click

from tursi import textfile
from tursi.cli.connection import Exit, Failure
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, note

USER = "tursi"
BIN = Path(sys.executable).parent
_PLAIN = re.compile(r"[A-Za-z0-9._+/@-]+")
"""A path that means the same to systemd, to logrotate and to every shell."""
_MARK = "# Written by tursi install-service, sha256 "
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - not written to
"""What the unit hides from the daemon."""
_SECONDS = 60.0


class File(NamedTuple):
    """One file: below ``etc`` in the installation, and where it goes."""

    source: str
    target: Path
    mode: int = 0o644
    settings: bool = False
    """Whether it is the operator's own from its first day on."""


class Written(NamedTuple):
    """What became of a file."""

    path: Path
    outcome: str


def source() -> Path:
    """The folder with the files, in an installation or in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "etc"
    return installed if installed.is_dir() else package.parent / "etc"


def files(*, user: bool, sysv: bool, root: Path) -> list[File]:
    """What is written, for which of the three ways."""
    if user:
        base = os.environ.get("XDG_CONFIG_HOME", "")
        folder = Path(base) if base.startswith("/") else Path.home() / ".config"
        return [File("systemd/user/tursi.service", folder / "systemd/user/tursi.service")]
    etc = Path("/etc")
    # Red Hat's systems have the one, Debian's the other.
    sysconfig = (root / "etc/sysconfig").is_dir() and not (root / "etc/default").is_dir()
    common = [
        File(
            "default/tursi",
            etc / ("sysconfig" if sysconfig else "default") / "tursi",
            settings=True,
        ),
        File("tursi.toml", etc / "tursi/tursi.toml", 0o640, settings=True),
        File("logrotate.d/tursi", etc / "logrotate.d/tursi"),
    ]
    if sysv:
        return [File("init.d/tursi", etc / "init.d/tursi", 0o755), *common]
    return [
        File("systemd/tursi.service", etc / "systemd/system/tursi.service"),
        File("systemd/tursi.socket", etc / "systemd/system/tursi.socket"),
        File("sysusers.d/tursi.conf", etc / "sysusers.d/tursi.conf"),
        File("tmpfiles.d/tursi.conf", etc / "tmpfiles.d/tursi.conf"),
        *common,
    ]


@click.command("install-service")
@click.option("--user", is_flag=True, help="A systemd service of yours alone, without root.")
@click.option("--sysv", is_flag=True, help="An init.d script instead of systemd units.")
@as_json
def install_service(*, user: bool, sysv: bool, json: bool) -> None:
    """Have the machine's service manager run the daemon: write units or an init script.

    The same again changes nothing. A file that somebody has changed is kept, and the
    new one is written beside it. DESTDIR names another root folder, to make a package.
    """
    root = Path(os.environ.get("DESTDIR") or "/").absolute()
    # Of a service of one's own, and of a package, nothing but files is wanted.
    real = not user and root == Path("/")
    _check(user=user, sysv=sysv, real=real)
    try:
        written = [_install(each, root) for each in files(user=user, sysv=sysv, root=root)]
    except OSError as error:
        raise Failure(f"{error.filename or 'A file'} can't be written: {error.strerror}.") from None
    remarks = [_prepare()] if real else []
    remarks += _remarks(written, user=user, sysv=sysv)
    steps = _steps(user=user, sysv=sysv)
    if json:
        found = [{"path": str(path), "outcome": outcome} for path, outcome in written]
        dump({"files": found, "remarks": remarks, "next": steps})
        return
    for path, outcome in written:
        line(f"{outcome:9} {path}")
    for remark in remarks:
        note(f"tursi: {remark}")
    line("Next:")
    for step in steps:
        line(f"  {step}")


def _check(*, user: bool, sysv: bool, real: bool) -> None:
    if user and sysv:
        raise Failure("init.d scripts are the system's: choose --user or --sysv.", Exit.USAGE)
    if real and os.getuid() != 0:
        raise Failure(
            "Only root can write a system service; use sudo, or --user for a service of yours.",
            Exit.USAGE,
        )
    if not _PLAIN.fullmatch(str(BIN)):
        raise Failure(
            f"The path {BIN} has characters that units and scripts give a meaning; install Tursi "
            "in a folder with a plain name, such as /opt/tursi."
        )


# -- files ------------------------------------------------------------------------


def _install(file: File, root: Path) -> Written:
    target = root / file.target.relative_to("/")
    text = (source() / file.source).read_text(encoding="utf-8")
    content = _commented(text) if file.source == "tursi.toml" else _marked(_filled(text), file)
    before = _content(target)
    if before is None and not target.is_symlink():
        _make_folder(target.parent)
        textfile.replace(target, content, file.mode)
        return Written(file.target, "written")
    if before == content:
        return Written(file.target, "unchanged")
    if file.settings:
        return Written(file.target, "present")
    if before is not None and not target.is_symlink() and _is_ours(before):
        textfile.replace(target, content, file.mode)
        return Written(file.target, "updated")
    if not target.is_symlink():
        # Not executable, and under a name that no service manager reads.
        textfile.replace(target.with_name(f"{target.name}.new"), content, 0o644)
    return Written(file.target, "kept")


def _filled(text: str) -> str:
    """With the paths of this installation."""
    pages = source() / "operations.rst"
    if not pages.exists():
        pages = source().parent / "docs/operations.rst"
    return (
        text.replace("/usr/bin/twistd", str(BIN / "twistd"))
        .replace("/usr/bin/tursi", str(BIN / "tursi"))
        .replace("/usr/share/doc/tursi/operations.rst", str(pages))
    )


def _commented(text: str) -> str:
    """Every setting as a comment: what isn't set follows the defaults of later versions."""
    lines = (each if not each or each.startswith("#") else f"#{each}" for each in text.splitlines())
    return "\n".join(lines) + "\n"


def _marked(text: str, file: File) -> str:
    return text if file.settings else f"{text}\n{_MARK}{_digest(text)}\n"


def _is_ours(content: str) -> bool:
    """Whether it is as we have once written it."""
    text, mark, digest = content.rpartition(f"\n{_MARK}")
    return bool(mark) and digest == f"{_digest(text)}\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir()
        # Whatever the umask is.
        folder.chmod(0o755)


# -- the user ---------------------------------------------------------------------


def _prepare() -> str:
    """See to the daemon's user and to what it reads; what was done."""
    said = f"The daemon will run as the user {USER}, which exists."
    if _account() is None:
        said = f"The user {USER} was made, by {_make_user()}."
    account = _account()
    settings = Path("/etc/tursi/tursi.toml")
    if account is not None and not settings.is_symlink() and settings.stat().st_gid == 0:
        os.chown(settings, 0, account.pw_gid)
    # Twisted keeps a list of plugins beside them, where the service may not write.
    with suppress(OSError, subprocess.SubprocessError):
        _run(str(BIN / "twistd"), "--help")
    return said


def _make_user() -> str:
    """Make the daemon's user; by which program."""
    commands = [
        ("systemd-sysusers", str(source() / "sysusers.d/tursi.conf")),
        (
            "useradd", "--system", "--user-group", "--home-dir", "/var/lib/tursi",
            "--no-create-home", "--shell", "/usr/sbin/nologin", USER,
        ),
        ("adduser", "-S", "-D", "-H", "-h", "/var/lib/tursi", "-s", "/sbin/nologin", USER),
    ]  # fmt: skip
    for command in commands:
        if shutil.which(command[0]) is not None:
            with suppress(OSError, subprocess.SubprocessError):
                _run(*command)
            if _account() is not None:
                return command[0]
    raise Failure(
        f"The user {USER}, which the daemon runs as, can't be made; make it with the means of "
        "this system, and do this again."
    )


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        return None


def _run(*command: str) -> None:
    subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=True
    )


# -- what to do next --------------------------------------------------------------


def _remarks(written: list[Written], *, user: bool, sysv: bool) -> Iterator[str]:
    for path, outcome in written:
        if outcome == "kept":
            yield f"{path} was changed by somebody and is kept; {path}.new is the new one."
    if user:
        return
    for path in (BIN, Path(sys.base_prefix), source().parent):
        if not sysv and any(path.is_relative_to(each) for each in _HIDDEN):
            yield (
                f"{path} is hidden from system services; install Tursi and its Python outside of "
                "home and temporary folders, such as in /opt/tursi, and do this again."
            )
        elif not _open_to_all(path):
            yield f"The user {USER} can't reach {path}; install Tursi and its Python elsewhere."
    if not sysv and not Path("/run/systemd/system").is_dir():
        yield "systemd doesn't run here; --sysv writes an init.d script."


def _open_to_all(path: Path) -> bool:
    return all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents))


def _steps(*, user: bool, sysv: bool) -> list[str]:
    if user:
        return [
            "systemctl --user daemon-reload",
            "systemctl --user enable --now tursi",
            "loginctl enable-linger   # if it is to run while you are logged out",
        ]
    if sysv:
        enable = (
            "chkconfig --add tursi" if shutil.which("chkconfig") else "update-rc.d tursi defaults"
        )
        return [enable, "/etc/init.d/tursi start", "/etc/init.d/tursi status"]
    return [
        "systemctl daemon-reload",
        "systemctl enable --now tursi",
        "systemctl status tursi",
        f"usermod -aG {USER} NAME   # for each user who may control it",
    ]

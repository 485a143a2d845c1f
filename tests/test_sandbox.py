from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tursi import sandbox


@pytest.mark.parametrize(
    ("version", "size", "files"),
    [(1, 8, 13), (2, 8, 14), (3, 8, 15), (4, 16, 15), (5, 16, 16), (6, 24, 16), (9, 24, 16)],
)
def test_a_ruleset_has_what_its_version_knows(version: int, size: int, files: int) -> None:
    packed = sandbox.ruleset(version)
    assert len(packed) == size
    words = struct.unpack(f"={size // 8}Q", packed)
    assert words[0] == (1 << files) - 1
    assert words[1:] == (3, 3)[: len(words) - 1]


def test_a_rule_is_packed_as_the_kernel_has_it() -> None:
    # A __u64 and a __s32 without padding behind them.
    assert sandbox.rule(sandbox.READ, 7) == bytes([13, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0])


def test_only_what_is_private_may_be_changed_and_no_devices_be_made() -> None:
    assert not sandbox.READ & (sandbox.WRITE_FILE | sandbox.TRUNCATE | sandbox.MAKE_REG)
    assert not sandbox.WRITE & (sandbox.MAKE_CHAR | sandbox.MAKE_BLOCK)
    assert sandbox.LIST == sandbox.READ_DIR


def test_a_kernel_without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise OSError(errno.ENOSYS, "system call 444: not implemented")

    monkeypatch.setattr(sandbox, "_system_call", missing)
    assert sandbox.landlock_version() is None


def test_the_socket_filter_refuses_what_it_says() -> None:
    filters = {machine: run(machine) for machine in ("x86_64", "aarch64")}
    unix, inet, netlink = 1, 2, 16
    for machine, answer in filters.items():
        _, socket, connect = sandbox._MACHINES[machine]
        assert answer(socket, unix), machine
        assert not answer(socket, inet)
        assert not answer(socket, netlink)
        assert not answer(connect, 3)
        assert not answer(425, 8)
        for harmless in (0, 1, 45, 53, 57, 59, 60, 200, 231, 262, 450):
            if harmless not in {socket, connect}:
                assert answer(harmless, inet), (machine, harmless)
        # The x32 interface has the same calls under other numbers.
        assert not answer(0x40000000 + socket, unix)
        assert not answer(socket, unix, architecture=0x40000003)


def run(machine: str) -> Callable[..., bool]:
    """An interpreter of the filter: whether a system call is allowed."""
    program = list(struct.iter_unpack("=HBBI", sandbox.socket_filter(machine)))

    def answer(number: int, argument: int, architecture: int | None = None) -> bool:
        if architecture is None:
            architecture = sandbox._MACHINES[machine][0]
        data = struct.pack("=IIQQ", number, architecture, 0, argument)
        loaded, at = 0, 0
        while True:
            code, yes, no, operand = program[at]
            at += 1
            if code == 0x20:
                (loaded,) = struct.unpack_from("=I", data, operand)
            elif code == 0x15:
                at += yes if loaded == operand else no
            elif code == 0x35:
                at += yes if loaded >= operand else no
            else:
                assert code == 0x06
                return bool(operand == 0x7FFF0000)

    return answer


def confined(rights: list[tuple[str, int]], look: Callable[[], bool]) -> bool:
    """What ``look`` says in a process with these rights."""
    version = sandbox.landlock_version()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
            if version is not None:
                sandbox.restrict(version, rights)
            os._exit(0 if look() else 1)
        except BaseException:  # noqa: BLE001 - a forked child never returns
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except PermissionError:
        return False
    return True


def test_rights_are_of_folders_and_of_single_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder/in", "alone", "other"):
        (tmp_path / name).write_text("x")
    rights = [
        (str(tmp_path / "folder"), sandbox.READ),
        (str(tmp_path / "alone"), sandbox.WRITE),
        (str(tmp_path / "isn't there"), sandbox.READ),
    ]
    kept = sandbox.landlock_version() is not None
    assert confined(rights, lambda: readable(tmp_path / "folder/in"))
    assert confined(rights, lambda: readable(tmp_path / "alone"))
    assert confined(rights, lambda: readable(tmp_path / "other")) is not kept


def test_a_folder_that_may_only_be_listed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    rights = [(str(tmp_path), sandbox.LIST)]
    kept = sandbox.landlock_version() is not None
    assert confined(rights, lambda: [each.name for each in tmp_path.iterdir()] == ["secret"])
    assert confined(rights, lambda: readable(tmp_path / "secret")) is not kept


def test_a_models_files_are_what_they_are_links_to(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "weights").write_text("x")
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "sub" / "weights").symlink_to(shared / "weights")
    (model / "more").symlink_to(shared)
    (tmp_path / "link").symlink_to(model)
    paths = {path for path, rights in sandbox.model_rights(str(tmp_path / "link"))}
    assert paths == {str(model), str(shared), str(shared / "weights")}


def test_a_snapshot_in_the_cache_has_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert sandbox.model_rights(str(snapshot)) == [
        (str(tmp_path / "models--org--name"), sandbox.READ)
    ]

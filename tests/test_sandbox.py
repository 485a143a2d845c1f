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


def test_the_filter_refuses_what_it_says() -> None:
    filters = {machine: run(machine) for machine in ("x86_64", "aarch64")}
    unix, inet, netlink, stream, datagram, raw, seqpacket = 1, 2, 16, 1, 2, 3, 5
    nonblocking = 0o2004000
    numbers = {"x86_64": (41, 53, 42, 90, 302, 56, 435, 280),
               "aarch64": (198, 199, 203, 53, 261, 220, 435, 88)}  # fmt: skip
    for machine, answer in filters.items():
        socket, pair, connect, chmod, prlimit, clone, clone3, utimensat = numbers[machine]
        for call in (socket, pair):
            assert answer(call, unix, stream) == 0, machine
            assert answer(call, unix, seqpacket | nonblocking) == 0
            assert answer(call, unix, datagram) == errno.EACCES
            assert answer(call, unix, raw | nonblocking) == errno.EACCES
            for family in (0, inet, netlink, unix << 32):
                assert answer(call, family, stream) == errno.EACCES
        assert answer(connect, 3) == errno.EACCES
        assert answer(425, 8) == errno.EACCES
        assert answer(chmod, 0) == errno.EACCES
        assert answer(prlimit, 0, 7) == 0
        assert answer(prlimit, 4711, 7) == errno.EACCES
        assert answer(utimensat, 3, 0) == 0
        assert answer(utimensat, -100, 0x7FFF_0000_0000) == errno.EACCES
        thread, child, user_namespace = 0x3D0F00, 0x11, 0x10000000
        assert answer(clone, thread) == answer(clone, child) == 0
        assert answer(clone, child | user_namespace) == errno.EACCES
        assert answer(clone3, 0) == errno.ENOSYS
        for harmless in (0, 1, 45, 57, 59, 60, 200, 231, 262, 450):
            if harmless not in numbers[machine] and machine == "x86_64":
                assert answer(harmless, inet) == 0, (machine, harmless)
        # The x32 interface has the same calls under other numbers.
        assert answer(0x40000000 + socket, unix, stream) == errno.EACCES
        assert answer(socket, unix, stream, architecture=0x40000003) == errno.EACCES


def test_no_call_is_named_twice() -> None:
    for which in (0, 1):
        numbers = [each[which] for each in sandbox._REFUSED.values() if each[which] is not None]
        numbers += [each[which] for each in sandbox._REFUSED_FOR_OTHERS.values()]
        assert len(numbers) == len(set(numbers))


def run(machine: str) -> Callable[..., int]:
    """An interpreter of the filter: the error that a system call gets, 0 for none."""
    program = list(struct.iter_unpack("=HBBI", sandbox.call_filter(machine)))

    def answer(number: int, *arguments: int, architecture: int | None = None) -> int:
        if architecture is None:
            architecture = sandbox._ARCHITECTURES[machine]
        words = [each & (1 << 64) - 1 for each in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
        data = struct.pack("=IIQ6Q", number, architecture, 0, *words)
        loaded, at = 0, 0
        while True:
            code, yes, no, operand = program[at]
            at += 1
            if code == 0x20:
                (loaded,) = struct.unpack_from("=I", data, operand)
            elif code == 0x54:
                loaded &= operand
            elif code == 0x06:
                return 0 if operand == 0x7FFF0000 else operand & 0xFFFF
            else:
                taken = {
                    0x15: loaded == operand,
                    0x35: loaded >= operand,
                    0x45: bool(loaded & operand),
                }
                at += yes if taken[code] else no

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


def test_a_model_is_its_folder_wherever_links_in_it_lead(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "key").touch()
    (model / "sub" / "weights.safetensors").symlink_to(tmp_path / "key")
    (model / "more").symlink_to("/")
    (tmp_path / "link").symlink_to(model)
    assert sandbox.model_rights(str(tmp_path / "link")) == [(str(model), sandbox.READ)]
    assert sandbox.model_rights("") == []


def test_a_snapshot_in_the_cache_has_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert sandbox.model_rights(str(snapshot)) == [
        (str(tmp_path / "models--org--name"), sandbox.READ)
    ]

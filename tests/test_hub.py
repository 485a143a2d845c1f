from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fakes import InlineReactor, InlineThreadPool

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from tursi import config, wire
from tursi.errors import (
    FetchError,
    FetchInterrupted,
    HubUnreachable,
    ModelFilesMissing,
    ModelInUse,
    ModelRefused,
    RepositoryGated,
    ShuttingDown,
    TursiError,
)
from tursi.hub import Hub
from tursi.model import CatalogueEntry, Progress, Reference, Resolution, Trust
from tursi.supervision import life
from tursi.wire import Frame, Kind

TINY = Reference.parse("someone/tiny")
FOUND = Resolution(folder="/cache/tiny", commit="a" * 40, files=("config.json",), size=2)


class Reactor(InlineReactor):
    def getThreadPool(self) -> InlineThreadPool:  # noqa: N802 - Twisted's name
        return InlineThreadPool()


class HangingReactor(InlineReactor):
    def getThreadPool(self) -> HangingReactor:  # noqa: N802 - Twisted's name
        return self

    def callInThreadWithCallback(self, *_: object) -> None:  # noqa: N802 - Twisted's name
        """The disk doesn't answer."""


class Exit(life.Exit):
    def __init__(self, exit_status: int | None = 0, signal: int | None = None) -> None:
        super().__init__(exit_status, signal)


class FakeRunning:
    """A fetcher that says and does what a test tells it."""

    def __init__(
        self,
        name: str,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        receive: Callable[[Frame], None],
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.environment = environment
        self.finished: Deferred[Any] = Deferred()
        self.cancelled = False
        self._receive = receive

    def cancel(self) -> None:
        self.cancelled = True

    def say(self, kind: int, value: object) -> None:
        self._receive(Frame(kind, 0, msgspec.msgpack.encode(value)))

    def advance(self, done: float) -> None:
        self.say(Kind.PROGRESS, Progress("download", done, 100.0))


class Fetchers:
    """The way to spawn them, and those that were."""

    def __init__(self) -> None:
        self.all: list[FakeRunning] = []
        self.error: Exception | None = None

    def __call__(self, *arguments: Any) -> FakeRunning:
        if self.error is not None:
            raise self.error
        self.all.append(FakeRunning(*arguments))
        return self.all[-1]


class Bench:
    def __init__(self, cache: Path, settings: config.Hub, reactor: InlineReactor) -> None:
        self.reactor = reactor
        self.fetchers = Fetchers()
        self.progress: list[Progress] = []
        self.hub = Hub(
            cache=cache,
            imported=cache.parent / "imported",
            settings=settings,
            environment={"PATH": "/bin", "HF_TOKEN": "hf_secret"},
            spawn=self.fetchers,
            reactor=reactor,
        )

    def resolve(self, reference: Reference = TINY) -> Deferred[Resolution]:
        return self.hub.resolve(reference, self.progress.append)


@pytest.fixture(name="bench")
def _bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "cache", config.Hub(stall_seconds=60), Reactor())


def result(waiting: Deferred[Any]) -> Any:
    results: list[Any] = []
    waiting.addBoth(results.append)
    assert results, "nothing has come yet"
    return results[0].value if isinstance(results[0], Failure) else results[0]


def write(folder: Path, *names: str, data: bytes = b"{}") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


# -- the fetcher ------------------------------------------------------------------------


def test_a_download_has_one_fetcher_and_tells_all_who_wait(bench: Bench) -> None:
    first = bench.resolve()
    (fetcher,) = bench.fetchers.all
    assert fetcher.arguments[1:] == (
        "-I", "-m", "tursi.fetcher", "someone/tiny", "", str(bench.hub._cache)
    )  # fmt: skip
    assert "/" not in fetcher.name
    fetcher.advance(10)
    later: list[Progress] = []
    second = bench.hub.resolve(Reference.parse("someone/tiny"), later.append)
    assert later == [Progress("download", 10.0, 100.0)], "who comes later hears it at once"
    fetcher.advance(20)
    assert [p.done for p in bench.progress] == [10.0, 20.0]
    assert [p.done for p in later] == [10.0, 20.0]
    fetcher.say(Kind.READY, FOUND)
    assert not first.called, "the process still runs"
    fetcher.finished.callback(Exit())
    assert result(first) == result(second) == FOUND
    assert len(bench.fetchers.all) == 1
    assert not bench.reactor.getDelayedCalls()


def test_each_revision_has_a_download_of_its_own(bench: Bench) -> None:
    bench.resolve()
    bench.resolve(Reference.parse("someone/tiny@v1/a"))
    assert [f.arguments[4:6] for f in bench.fetchers.all] == [
        ("someone/tiny", ""),
        ("someone/tiny", "v1/a"),
    ]
    assert len({f.name for f in bench.fetchers.all}) == 2
    assert not any("/" in f.name for f in bench.fetchers.all)


def test_a_finished_download_is_asked_for_anew(bench: Bench) -> None:
    bench.resolve()
    bench.fetchers.all[0].say(Kind.READY, FOUND)
    bench.fetchers.all[0].finished.callback(Exit())
    again = bench.resolve()
    assert len(bench.fetchers.all) == 2
    assert not again.called


def test_the_fetchers_last_words_are_the_error(bench: Bench) -> None:
    waiting = bench.resolve()
    (fetcher,) = bench.fetchers.all
    fetcher.say(Kind.FAILED, wire.LastWords("repository_gated", "It is gated."))
    fetcher.finished.callback(Exit(77))
    error = result(waiting)
    assert type(error) is RepositoryGated
    assert error.message == "It is gated."


@pytest.mark.parametrize(
    ("end", "words", "kind"),
    [
        (Exit(None, 9), "was ended by signal 9", FetchInterrupted),
        (life.Exit(), "was ended together with its keeper", FetchInterrupted),
        (
            life.Exit(refusal=life.Refusal(11, "there is no room for another process")),
            "could not be started (there is no room for another process)",
            FetchInterrupted,
        ),
        # It would do so again.
        (Exit(1), "exited with status 1 and no word", FetchError),
        (Failure(OSError("no keeper")), "could not be started (no keeper)", FetchInterrupted),
    ],
)
def test_a_fetcher_that_dies_without_a_word(
    bench: Bench, end: object, words: str, kind: type[FetchError]
) -> None:
    waiting = bench.resolve()
    finished = bench.fetchers.all[0].finished
    finished.errback(end) if isinstance(end, Failure) else finished.callback(end)
    error = result(waiting)
    assert type(error) is kind
    assert words in error.message


def test_a_fetcher_that_cannot_be_spawned(bench: Bench) -> None:
    bench.fetchers.error = OSError("too many open files")
    assert "could not be started (too many open files)" in str(result(bench.resolve()))
    bench.fetchers.error = None
    bench.resolve()
    assert len(bench.fetchers.all) == 1
    assert len(bench.reactor.getDelayedCalls()) == 1


def test_a_fetcher_that_talks_nonsense_is_cancelled(bench: Bench) -> None:
    for kind in (Kind.READY, Kind.HELLO):
        waiting = bench.resolve()
        fetcher = bench.fetchers.all[-1]
        fetcher.say(kind, ["nonsense"])
        assert fetcher.cancelled
        fetcher.finished.callback(Exit(None, 9))
        assert "broke" in str(result(waiting))


def test_a_download_without_progress_is_given_up(bench: Bench) -> None:
    waiting = bench.resolve()
    (fetcher,) = bench.fetchers.all
    for done in (1, 2, 3):
        bench.reactor.advance(50)
        fetcher.advance(done)
    bench.reactor.advance(50)
    fetcher.advance(3)  # the same again is no progress
    assert not fetcher.cancelled
    bench.reactor.advance(11)
    assert fetcher.cancelled
    assert not waiting.called
    assert len(bench.fetchers.all) == 1
    fetcher.finished.callback(Exit(None, 9))
    error = result(waiting)
    assert type(error) is HubUnreachable
    assert "no progress for 60 seconds" in error.message


def test_the_last_waiter_to_leave_cancels_the_download(bench: Bench) -> None:
    first, second = bench.resolve(), bench.resolve()
    (fetcher,) = bench.fetchers.all
    first.cancel()
    assert isinstance(result(first), CancelledError)
    assert not fetcher.cancelled
    second.cancel()
    assert isinstance(result(second), CancelledError)
    assert fetcher.cancelled
    third = bench.resolve()
    assert len(bench.fetchers.all) == 2, "nobody joins a download that is being killed"
    fetcher.finished.callback(Exit(None, 9))
    bench.fetchers.all[1].say(Kind.READY, FOUND)
    bench.fetchers.all[1].finished.callback(Exit())
    assert result(third) == FOUND


def test_a_result_may_set_off_the_cancellation_of_another(bench: Bench) -> None:
    first, second = bench.resolve(), bench.resolve()
    first.addCallback(lambda _: second.cancel())
    (fetcher,) = bench.fetchers.all
    fetcher.say(Kind.READY, FOUND)
    fetcher.finished.callback(Exit())
    assert isinstance(result(second), CancelledError)


def test_a_listener_that_fails_costs_nobody_the_download(
    bench: Bench, logged_failures: Any
) -> None:
    def fail(_: Progress) -> None:
        raise ZeroDivisionError

    bad = bench.hub.resolve(TINY, fail)
    good = bench.resolve()
    (fetcher,) = bench.fetchers.all
    fetcher.advance(1)
    assert [p.done for p in bench.progress] == [1.0]
    fetcher.say(Kind.READY, FOUND)
    fetcher.finished.callback(Exit())
    assert result(bad) == result(good) == FOUND
    assert len(logged_failures.flush(ZeroDivisionError)) == 1


def test_only_so_many_fetchers_run_at_a_time(bench: Bench) -> None:
    waiting = [bench.resolve(Reference.parse(f"someone/model{n}")) for n in range(6)]
    assert len(bench.fetchers.all) == 4
    waiting[4].cancel()
    assert isinstance(result(waiting[4]), CancelledError)
    bench.fetchers.all[0].say(Kind.READY, FOUND)
    bench.fetchers.all[0].finished.callback(Exit())
    assert [f.arguments[4] for f in bench.fetchers.all[4:]] == ["someone/model5"]


def test_a_look_is_no_download_and_waits_for_none(bench: Bench) -> None:
    for number in range(5):
        bench.resolve(Reference.parse(f"someone/model{number}"))
    looked = [bench.hub.look(TINY, Trust()) for _ in range(2)]
    assert len(bench.fetchers.all) == 5
    look = bench.fetchers.all[-1]
    assert look.arguments[-1] == "--look"
    assert all("--look" not in each.arguments for each in bench.fetchers.all[:-1])
    look.say(Kind.READY, FOUND)
    look.finished.callback(Exit())
    assert [result(each) for each in looked] == [FOUND, FOUND]
    late = bench.hub.look(TINY, Trust())
    bench.reactor.advance(20)
    assert bench.fetchers.all[-1].cancelled
    bench.fetchers.all[-1].finished.callback(Exit(None, 9))
    assert isinstance(result(late), HubUnreachable)


def test_stop_ends_every_download(bench: Bench) -> None:
    models = [Reference.parse(f"someone/model{n}") for n in range(6)]
    waiting = [bench.resolve(model) for model in models]
    waiting[0].cancel()
    result(waiting[0])
    stopped = bench.hub.stop()
    assert len(bench.fetchers.all) == 4
    assert all(fetcher.cancelled for fetcher in bench.fetchers.all)
    for fetcher in bench.fetchers.all:
        assert not stopped.called
        fetcher.finished.callback(Exit(None, 9))
    assert result(stopped) is None
    assert all(isinstance(result(each), ShuttingDown) for each in waiting[1:])
    assert isinstance(result(bench.resolve()), ShuttingDown)
    assert not bench.reactor.getDelayedCalls()


def test_the_environment_of_a_fetcher(bench: Bench, tmp_path: Path) -> None:
    bench.resolve()
    environment = bench.fetchers.all[0].environment
    assert environment["HF_ENDPOINT"] == "https://huggingface.co"
    assert environment["HF_TOKEN"] == "hf_secret"
    assert environment["PATH"] == "/bin"
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert "HF_HUB_OFFLINE" not in environment
    assert not any("hf_secret" in each for each in bench.fetchers.all[0].arguments)

    settings = config.Hub(endpoint="http://mirror:1", token_file="/etc/token", offline=True)
    other = Bench(tmp_path, settings, Reactor())
    other.resolve()
    environment = other.fetchers.all[0].environment
    assert environment["HF_ENDPOINT"] == "http://mirror:1"
    assert environment["HF_TOKEN_PATH"] == "/etc/token"
    assert "HF_TOKEN" not in environment, "the file that the settings name goes first"
    assert environment["HF_HUB_OFFLINE"] == "1"


# -- folders ----------------------------------------------------------------------------


def look(bench: Bench, folder: Path) -> Any:
    return result(bench.resolve(Reference.parse(str(folder))))


def test_a_folder_is_used_in_place(bench: Bench, tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors", "1_Pooling/config.json", "README.md")
    folder = write(tmp_path / "model", *names)
    assert look(bench, folder) == Resolution(
        folder=str(folder),
        files=("1_Pooling/config.json", "config.json", "model.safetensors"),
        size=6,
    )
    assert not bench.fetchers.all


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        ((), ModelFilesMissing, "neither config.json nor modules.json"),
        (("model.safetensors",), ModelFilesMissing, "neither config.json nor modules.json"),
        (("config.json",), ModelFilesMissing, "has no weights"),
        (("modules.json", "1_Pooling/config.json"), ModelFilesMissing, "has no weights"),
        (("config.json", "pytorch_model.bin"), ModelRefused, "as pickle (pytorch_model.bin)"),
    ],
)
def test_a_folder_that_is_no_model(
    bench: Bench, tmp_path: Path, names: tuple[str, ...], error: type[TursiError], words: str
) -> None:
    (tmp_path / "model").mkdir()
    found = look(bench, write(tmp_path / "model", *names))
    assert isinstance(found, error)
    assert words in found.message
    assert str(tmp_path / "model") in found.message


def test_no_folder(bench: Bench, tmp_path: Path) -> None:
    assert look(bench, tmp_path / "no").message == f"There is no folder {tmp_path}/no."
    file = write(tmp_path, "file") / "file"
    assert look(bench, file).message.startswith(f"{file} is no folder")


def test_a_folder_whose_links_go_in_circles_or_nowhere(bench: Bench, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "config.json")
    (folder / "self").symlink_to(folder)
    (folder / "model.safetensors").symlink_to(folder / "gone")
    assert "has no weights" in look(bench, folder).message
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert type(look(bench, tmp_path / "loop")) is ModelFilesMissing


def test_weights_that_git_lfs_did_not_get(bench: Bench, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "config.json")
    write(folder, "model.safetensors", data=b"version https://git-lfs.github.com/spec/v1\noid x")
    assert "git lfs pull" in look(bench, folder).message


def test_a_disk_that_hangs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, config.Hub(), HangingReactor())
    waiting = bench.resolve(Reference.parse("/net/model"))
    bench.reactor.advance(31)
    error = result(waiting)
    assert type(error) is FetchInterrupted
    assert "/net/model doesn't answer" in error.message


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_just_now_is_tried_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    folder = write(tmp_path / "model", "config.json", "model.safetensors")
    monkeypatch.setattr("tursi.hub.disk.os.scandir", refused)
    error = result(bench.resolve(Reference.parse(str(folder))))
    assert type(error) is FetchInterrupted
    assert os.strerror(number) in error.message


# -- the catalogue ------------------------------------------------------------------------


def test_the_catalogue_has_every_snapshot_with_weights(bench: Bench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name, commit in (("someone--b", "c" * 40), ("gpt2", "a" * 40), ("gpt2", "b" * 40)):
        folder = write(cache / f"models--{name}/snapshots/{commit}", "config.json")
        blobs = write(cache / f"models--{name}/blobs", "blob", data=b"x" * 100)
        (folder / "model.safetensors").symlink_to(os.path.relpath(blobs / "blob", folder))
    write(cache / "models--someone--begun/snapshots/0", "config.json")
    write(cache / ".locks/models--gpt2", "x")

    def entry(name: str, commit: str) -> CatalogueEntry:
        folder = cache / f"models--{name.replace('/', '--')}/snapshots/{commit}"
        used_at = folder.stat().st_mtime
        return CatalogueEntry(
            name=name, folder=str(folder), size=102, commit=commit, used_at=used_at
        )

    assert result(bench.hub.catalogue()) == [
        entry("gpt2", "a" * 40),
        entry("gpt2", "b" * 40),
        entry("someone/b", "c" * 40),
    ]


def test_the_catalogue_of_no_cache_is_empty(bench: Bench) -> None:
    assert result(bench.hub.catalogue()) == []


def shelf(cache: Path, repository: str, files: Mapping[str, Mapping[str, str]]) -> Path:
    """A repository in a cache: commit to file name to blob."""
    folder = cache / ("models--" + repository.replace("/", "--"))
    for commit, names in files.items():
        snapshot = write(folder / "snapshots" / commit, "config.json")
        for name, blob in names.items():
            write(folder / "blobs", blob, data=b"x" * 100)
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        write(folder / "refs", commit[:1], data=commit.encode())
    return folder


def test_removing_a_revision_leaves_what_others_share(bench: Bench, tmp_path: Path) -> None:
    one, two = "1" * 40, "2" * 40
    folder = shelf(
        tmp_path / "cache",
        "org/name",
        {
            one: {"model.safetensors": "shared", "vocab.txt": "old"},
            two: {"model.safetensors": "shared"},
        },
    )
    assert [result(bench.hub.commit("org/name", each)) for each in ("2", "222", two)] == [
        two, "222", two,
    ]  # fmt: skip
    result(bench.hub.remove("org/name", [one]))
    assert sorted(each.name for each in (folder / "blobs").iterdir()) == ["shared"]
    assert [each.name for each in (folder / "snapshots").iterdir()] == [two]
    assert [each.name for each in (folder / "refs").iterdir()] == ["2"]
    [entry] = result(bench.hub.catalogue())
    assert entry.commit == two
    result(bench.hub.remove("org/name", [two]))
    assert not folder.exists()
    result(bench.hub.remove("org/name", [two]))


WEEK = 7 * 86400


def test_what_was_begun_and_left_is_no_model_and_goes_in_the_end(
    bench: Bench, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    one, two = "1" * 40, "2" * 40
    folder = shelf(
        cache,
        "org/name",
        {one: {"model.safetensors": "mine"}, two: {"model.safetensors": "half", "b": "mine"}},
    )
    (folder / "refs/2").unlink()
    locks = write(cache / ".locks/models--org--name", f"{two}.unfinished", "half.lock", data=b"")
    write(folder / "blobs", "other.kept.incomplete")
    [entry] = result(bench.hub.catalogue())
    assert entry.commit == one
    assert result(bench.hub.unfinished("org/name")) == [two]
    now = time.time()
    result(bench.hub.sweep(now))
    assert len(list((folder / "blobs").iterdir())) == 3, "somebody may go on with it"
    result(bench.hub.sweep(now + WEEK + 60))
    assert [each.name for each in (folder / "blobs").iterdir()] == ["mine"]
    assert [each.name for each in (folder / "snapshots").iterdir()] == [one]
    assert [each.name for each in (folder / "refs").iterdir()] == ["1"]
    assert result(bench.hub.unfinished("org/name")) == []
    assert not (locks / f"{two}.unfinished").exists()
    # Once a fetcher has seen all of it, the note of its beginning counts no more.
    write(locks, f"{one}.unfinished")
    write(folder / "refs", one, data=one.encode())
    assert len(result(bench.hub.catalogue())) == 1
    result(bench.hub.sweep(now + WEEK + 60))
    assert len(result(bench.hub.catalogue())) == 1


def test_a_removal_that_was_broken_off_is_finished(bench: Bench, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, two = "1" * 40, "2" * 40
    folder = shelf(cache, "org/name", {one: {"a": "one"}, two: {"model.safetensors": "two"}})
    os.utime(folder / "blobs/one", (1, 1))
    (folder / "snapshots" / one).rename(folder / "snapshots" / f".{one}.removed")
    assert [each.commit for each in result(bench.hub.catalogue())] == [two]
    result(bench.hub.sweep(time.time()))
    assert [each.name for each in (folder / "snapshots").iterdir()] == [two]
    assert [each.name for each in (folder / "blobs").iterdir()] == ["two"]
    # Downloaded again and removed again, with the rest of the first removal still there.
    shelf(cache, "org/other", {one: {"model.safetensors": "one"}})
    other = cache / "models--org--other"
    write(other / "snapshots" / f".{one}.removed", "x")
    result(bench.hub.remove("org/other", [one]))
    assert not other.exists()
    assert [each.name for each in (cache / ".locks/models--org--other").iterdir()] == [
        "fetcher.lock"
    ]


def test_what_is_being_downloaded_is_not_removed(bench: Bench, tmp_path: Path) -> None:
    folder = shelf(tmp_path / "cache", "org/name", {"1" * 40: {"model.safetensors": "a"}})
    locks = tmp_path / "cache/.locks/models--org--name"
    locks.mkdir(parents=True)
    with (locks / "fetcher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        refusal = result(bench.hub.remove("org/name", ["1" * 40]))
    assert isinstance(refusal, ModelInUse)
    assert (folder / "blobs/a").exists()


def test_a_model_that_is_used_is_noted_and_one_outside_is_left_alone(
    bench: Bench, tmp_path: Path
) -> None:
    folder = shelf(tmp_path / "cache", "org/name", {"1" * 40: {"model.safetensors": "a"}})
    outside = write(tmp_path / "mine", "config.json")
    for each in (snapshot := folder / "snapshots" / ("1" * 40), outside):
        os.utime(each, (1, 1))
        result(bench.hub.touch(str(each)))
    assert snapshot.stat().st_mtime > 1
    assert outside.stat().st_mtime == 1

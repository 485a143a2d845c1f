from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tursi import model
from tursi.errors import InvalidRequest
from tursi.model import (
    Folders,
    Host,
    Limits,
    Phase,
    Reference,
    Request,
    Task,
    deployment_name,
    folders,
    mebibytes,
)

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", fullmatch=True).filter(
    lambda name: ".." not in name
)


# -- references ---------------------------------------------------------------------


@given(NAMES, NAMES, st.none() | NAMES)
def test_a_hub_name_reads_as_it_is_written(
    organisation: str, name: str, revision: str | None
) -> None:
    text = f"{organisation}/{name}" + (f"@{revision}" if revision else "")
    reference = Reference.parse(text)
    assert (reference.repository, reference.revision) == (f"{organisation}/{name}", revision)
    assert reference.folder is None
    assert str(reference) == text
    deployment_name(reference.short_name)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200))
def test_a_folder_reads_as_it_is_written_and_gives_a_name(text: str) -> None:
    reference = Reference.parse(f"/{text}")
    assert reference.folder == str(reference) == f"/{text}"
    deployment_name(reference.short_name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "../models",
        "./models",
        "org/..",
        "org/a..b",
        "org/name@../../etc",
        "org/name@",
        "org/name/third",
        "org/",
        "-org/name",
        "org\\name",
        "org/na me",
        "org/name\n",
        "org/n\0me",
        "/models/\0",
        "C:\\models",
        "https://huggingface.co/org/name",
        "org/名前",
        "org/%2e%2e",
        "~/models",
        "a" * 97,
        "/" + "a" * 4096,
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Reference.parse(text)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("gpt2@main", "gpt2"),
        ("/models/my model (new)/", "my-model-new-"),
        ("/models/.hidden", "hidden"),
        ("/", "model"),
        ("/日本", "model"),
        ("/" + "x" * 300, "x" * 96),
    ],
)
def test_the_short_name(text: str, name: str) -> None:
    assert Reference.parse(text).short_name == name


# -- names and tasks ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a/b", ".a", "-a", "a b", "a\n", "é", "a" * 97, "a%20"])
def test_what_cannot_name_a_deployment(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        deployment_name(text)
    assert caught.value.param == "name"


def test_what_names_a_deployment() -> None:
    for name in ("a", "0", "e5.v2_x-y", "A" * 96):
        assert deployment_name(name) == name


def test_tasks_by_name_and_alias() -> None:
    for task in Task:
        assert Task.parse(task.value) is task
    assert Task.parse(" Embeddings ") is Task.FEATURE_EXTRACTION
    assert Task.parse("sentence-similarity") is Task.FEATURE_EXTRACTION
    assert Task.parse("sentiment-analysis") is Task.TEXT_CLASSIFICATION
    assert Task.parse("chat") is Task.TEXT_GENERATION


def test_an_unknown_task_is_told_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="fill-mask") as caught:
        Task.parse("juggling")
    assert caught.value.param == "task"


# -- values ---------------------------------------------------------------------------


def test_every_value_is_frozen_and_has_slots() -> None:
    values = [each for each in vars(model).values() if dataclasses.is_dataclass(each)]
    assert len(values) > 10
    for value in values:
        assert value.__dataclass_params__.frozen  # type: ignore[union-attr]
        assert "__slots__" in vars(value)


def test_the_phases_are_the_fifteen() -> None:
    assert len(Phase) == 15


# -- folders --------------------------------------------------------------------------


def test_folders_of_root() -> None:
    assert folders({"HOME": "/root"}, 0) == Folders(
        Path("/var/lib/tursi"),
        Path("/run/tursi"),
        Path("/var/cache/tursi"),
        Path("/etc/tursi/tursi.toml"),
    )


def test_folders_of_a_user() -> None:
    found = folders({"HOME": "/home/ada", "XDG_RUNTIME_DIR": "/run/user/7"}, 7)
    assert found == Folders(
        Path("/home/ada/.local/state/tursi"),
        Path("/run/user/7/tursi"),
        Path("/home/ada/.cache/tursi"),
        Path("/home/ada/.config/tursi/tursi.toml"),
    )
    assert found.socket == Path("/run/user/7/tursi/control.sock")
    assert found.database == Path("/home/ada/.local/state/tursi/tursi.sqlite")
    assert found.logs == Path("/home/ada/.local/state/tursi/workers")


def test_xdg_wins_and_a_relative_value_is_ignored() -> None:
    environ = {"HOME": "/home/ada", "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "c"}
    found = folders(environ, 7)
    assert found.state == Path("/s/tursi")
    assert found.cache == Path("/home/ada/.cache/tursi")
    assert found.runtime == Path("/s/tursi/run")


def test_our_own_variables_win_over_all() -> None:
    environ = {
        "XDG_STATE_HOME": "/s",
        "TURSI_STATE_DIR": "/1",
        "TURSI_RUNTIME_DIR": "/2",
        "TURSI_CACHE_DIR": "/3",
        "TURSI_CONFIG": "/4.toml",
    }
    expected = Folders(Path("/1"), Path("/2"), Path("/3"), Path("/4.toml"))
    assert folders(environ, 0) == folders(environ, 7) == expected


def test_where_the_log_and_the_files_that_tell_of_the_daemon_are() -> None:
    root = folders({}, 0)
    assert root.log == Path("/var/log/tursi/tursi.log")
    assert (root.pid_file, root.status_file) == (
        Path("/run/tursi/tursi.pid"),
        Path("/run/tursi/tursi.json"),
    )
    assert folders({"HOME": "/home/ada"}, 7).log == Path("/home/ada/.local/state/tursi/tursi.log")
    assert root.moved(state=Path("/s")).log == Path("/s/tursi.log")
    assert folders({"TURSI_LOG_DIR": "/l"}, 0).log == Path("/l/tursi.log")


def test_folders_follow_the_state_folder_unless_they_are_named() -> None:
    root = folders({}, 0)
    moved = root.moved(state=Path("/s"))
    assert (moved.state, moved.runtime, moved.cache) == (
        Path("/s"),
        Path("/s/run"),
        Path("/s/cache"),
    )
    assert moved.configuration == root.configuration
    named = root.moved(state=Path("/s"), runtime=Path("/r"), cache=Path("/c"))
    assert (named.state, named.runtime, named.cache) == (Path("/s"), Path("/r"), Path("/c"))
    assert root.moved(runtime=Path("r")).runtime == Path("r").absolute()
    assert root.moved() == root


HOST = Host(memory=8 * 2**30, cores=4, files=1024)


@pytest.mark.parametrize(
    ("limits", "name", "why"),
    [
        (Limits(memory=2**20), "memory", "1.0 MiB is less than 64.0 MiB"),
        (Limits(memory=-1), "memory", "less than 64.0 MiB"),
        (Limits(memory=9 * 2**30), "memory", "9.0 GiB is more than the 8.0 GiB here"),
        (Limits(cpu=0.001), "cpu", "less than 0.01 of a core"),
        (Limits(cpu=float("nan")), "cpu", "nan is no number of cores"),
        (Limits(cpu=float("inf")), "cpu", "inf is no number of cores"),
        (Limits(cpu=4.5), "cpu", "4.5 is more than the 4 cores"),
        (Limits(threads=0), "threads", "0 is less than 1"),
        (Limits(threads=5), "threads", "5 is more than the 4 cores"),
        (Limits(files=63), "files", "63 is less than 64"),
        (Limits(files=1025), "files", "1025 is more than the 1024 that the system allows"),
        (Limits(processes=15), "processes", "15 is less than 16"),
        (Limits(processes=10**7), "processes", "1e+07 is more than the"),
    ],
)
def test_limits_that_cannot_be_met(limits: Limits, name: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Request("org/name", limits=limits).checked(HOST)
    assert caught.value.param == f"limits.{name}"
    assert caught.value.message.startswith(f"The limit {name} can't be met: ")
    assert why in caught.value.message


@pytest.mark.parametrize(
    "limits", [Limits(memory=2**60), Limits(cpu=1e9), Limits(threads=2**20), Limits(files=2**40)]
)
def test_limits_that_no_machine_can_meet(limits: Limits) -> None:
    with pytest.raises(InvalidRequest, match="is more than the"):
        limits.check(Host())


def test_limits_that_can_be_met_or_are_not_known_to_be_too_much() -> None:
    most = Limits(memory=8 * 2**30, cpu=4.0, threads=4, files=1024, processes=512)
    assert Request("org/name", limits=most).checked(HOST).limits == most
    more = Limits(memory=2**50, cpu=64.0, threads=64, files=10**6)
    assert Request("org/name", limits=more).checked().limits == more


@pytest.mark.parametrize(
    ("size", "text"),
    [(5, "5 bytes"), (2**20, "1.0 MiB"), (1000 * 2**20, "1000.0 MiB"), (3 * 2**29, "1.5 GiB")],
)
def test_sizes_of_memory_for_people(size: int, text: str) -> None:
    assert mebibytes(size) == text

"""Imports point downwards only: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tursi"


class Floor(NamedTuple):
    """What one part of the house may import besides itself and the standard library."""

    ours: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


WORDS = ("loading", "errors", "model", "tasks", "folder", "duration")
PURE = (
    *WORDS, "heartbeat", "config", "wire", "claims", "lifecycle", "footprint", "admission", "plan",
    "residency", "canary", "scaling", "schema", "faces", "archive", "selection", "sketch", "rollup",
)  # fmt: skip
MACHINE = ("mark", "mounts", "textfile")
STATE = ("store", "supervision", "hub", "lock")
SANS_IO = ("msgspec", "automat")
NETWORK = ("twisted", "zope", *SANS_IO)
HOUSE = ("instance", "logging", "launch", "signals", "premises", "preflight", "host")
RUN = (
    *HOUSE, "listen", "certificates", "notify", "ports", "children", "lag", "heap", "health",
    "hooks", "gpus",
)  # fmt: skip
DAEMON = (*PURE, *MACHINE, *STATE, *RUN, "fleet", "api", "service", "keeper", "sandbox", "removal")

FLOORS = {
    # 0: the words of the domain
    "": Floor(),
    "loading": Floor(),
    "errors": Floor(("loading",)),
    "model": Floor(("errors",)),
    "tasks": Floor(("errors", "model")),
    "heartbeat": Floor(),
    "folder": Floor(("errors",)),
    "duration": Floor(),
    "sketch": Floor(),
    "rollup": Floor(("model", "sketch")),
    # 1: pure thought
    "config": Floor(WORDS, SANS_IO),
    "wire": Floor(WORDS, SANS_IO),
    "claims": Floor((*WORDS, "wire")),
    "footprint": Floor(WORDS),
    "admission": Floor((*WORDS, "footprint")),
    "plan": Floor((*WORDS, "footprint", "admission"), SANS_IO),
    "residency": Floor(WORDS, SANS_IO),
    "canary": Floor(),
    "scaling": Floor(),
    "schema": Floor(WORDS, SANS_IO),
    "selection": Floor(WORDS, SANS_IO),
    "archive": Floor((*WORDS, "selection"), SANS_IO),
    "lifecycle": Floor((*WORDS, "heartbeat", "config", "wire"), SANS_IO),
    "faces": Floor((*WORDS, "config", "wire", "schema"), SANS_IO),
    # 2: input and output, one kind each
    "lock": Floor(("errors",)),
    "instance": Floor(("textfile",)),
    "textfile": Floor(),
    "mark": Floor(),
    "mounts": Floor(),
    "launch": Floor(),
    "logging": Floor(PURE, NETWORK),
    "signals": Floor((), ("twisted",)),
    "store": Floor((*PURE, "mounts"), NETWORK),
    "hub": Floor(PURE, NETWORK),
    "supervision": Floor((*PURE, "mark", "removal"), (*NETWORK, "psutil")),
    "notify": Floor(PURE, NETWORK),
    "lag": Floor(PURE, NETWORK),
    "heap": Floor((), NETWORK),
    # NVML is asked for by name, where it is installed.
    "gpus": Floor(WORDS, NETWORK),
    "hooks": Floor(PURE, NETWORK),
    # 3
    "fleet": Floor((*PURE, *STATE), NETWORK),
    "health": Floor((*PURE, *STATE, "lag", "fleet"), NETWORK),
    # 4
    "api": Floor(
        (*(set(PURE) - {"wire"}), "store", "hub", "fleet", "lag"),
        (*NETWORK, "httptools", "klein", "werkzeug", "prometheus_client", "psutil"),
    ),
    # 5
    "listen": Floor(DAEMON, NETWORK),
    "ports": Floor(DAEMON, NETWORK),
    "children": Floor(DAEMON, NETWORK),
    "premises": Floor(DAEMON, NETWORK),
    "preflight": Floor(DAEMON, NETWORK),
    "host": Floor(DAEMON, NETWORK),
    "certificates": Floor(DAEMON, NETWORK),
    "service": Floor(DAEMON, (*NETWORK, "klein")),
    # The command line runs it in a process of its own, where no daemon answers.
    "database": Floor((*WORDS, "store", "lock")),
    "tap": Floor(DAEMON, NETWORK),
    # the children
    "keeper": Floor(("sandbox", "removal")),
    "removal": Floor(),
    "sandbox": Floor(),
    "hook": Floor(),
    "inference": Floor(
        (*WORDS, "heartbeat", "wire", "faces"),
        (
            "msgspec",
            "torch",
            "transformers",
            "safetensors",
            "tokenizers",
            "numpy",
            "jinja2",
            "accelerate",
        ),
    ),
    "fetcher": Floor(
        ("errors", "model", "wire", "selection"), ("msgspec", "huggingface_hub", "httpx")
    ),
    # the user
    "doctor": Floor((*WORDS, *MACHINE, "config", "lock", "sandbox"), ("msgspec", "psutil")),
    "cli": Floor(
        ("errors", "model", "duration", "config", "doctor", "lock", "instance", "mark", "textfile"),
        ("click", "rich", "httpx"),
    ),
}
CHILDREN_AND_USER = {"keeper", "hook", "inference", "fetcher", "cli"}


def modules() -> list[str]:
    """Every module of the package, as a dotted name below ``tursi``."""
    return sorted(
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        .removesuffix("__init__")
        .rstrip(".")
        for path in PACKAGE.rglob("*.py")
    )


def imports(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it."""
    path = PACKAGE.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            name = node.module or ""
            # "from tursi import errors" means tursi.errors.
            yield from (f"{name}.{alias.name}" if name == "tursi" else name for alias in node.names)


def part(module: str) -> str:
    """The part of the house that a module belongs to."""
    return module.partition(".")[0]


def test_every_part_has_its_floor() -> None:
    assert {part(module) for module in modules()} <= FLOORS.keys()


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_what_its_floor_may(module: str) -> None:
    floor = FLOORS[part(module)]
    wrong = set()
    for name in imports(module):
        top, _, rest = name.partition(".")
        if top == "tursi":
            # Names of the package itself, such as its version, are nobody's floor.
            allowed = (*floor.ours, part(module), "__version__")
            if part(rest) not in allowed:
                wrong.add(name)
        elif top not in sys.stdlib_module_names and top not in floor.others:
            wrong.add(name)
    assert not wrong


@pytest.mark.parametrize("module", [each for each in modules() if part(each) != "store"])
def test_sql_does_not_leave_the_store(module: str) -> None:
    assert "sqlite3" not in {part(name) for name in imports(module)}


@pytest.mark.parametrize(
    "module", [each for each in modules() if part(each) not in CHILDREN_AND_USER]
)
def test_the_daemon_starts_no_process_behind_twisteds_back(module: str) -> None:
    # Who else reaps children makes Twisted wait for them for ever.
    names = {part(name) for name in imports(module)}
    assert not names & {"subprocess", "multiprocessing", "concurrent"}


def loaded(module: str, *names: str) -> list[str]:
    """Which of ``names`` a fresh interpreter has loaded after importing ``module``."""
    program = f"import sys, {module}; print(*(each for each in {names!r} if each in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_daemon_loads_no_model_library() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "numpy", "tokenizers", "safetensors")
    assert loaded("tursi.service", *heavy) == []


def test_the_command_line_loads_neither_the_daemon_nor_a_model_library() -> None:
    assert loaded("tursi.cli", "twisted", "klein", "torch", "transformers", "sqlite3") == []


def test_faces_load_no_reactor() -> None:
    assert loaded("tursi.faces", "twisted", "klein", "torch", "numpy") == []

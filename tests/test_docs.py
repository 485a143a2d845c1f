"""What the documentation promises to be complete about is complete, and its examples are sound."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from tursi import config, errors
from tursi.cli import main
from tursi.cli.connection import Exit
from tursi.faces.route import status_of
from tursi.fleet import governor
from tursi.model import Phase

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

EXAMPLE = re.compile(
    r"^\.\. code-block:: (?P<language>\w+)\n(?:   :name: example-(?P<name>[\w-]+)\n)?\n"
    r"(?P<code>(?:(?:   .*)?\n)+)",
    re.MULTILINE,
)


def examples(document: Path, language: str) -> list[str]:
    return [
        re.sub("^   ", "", found["code"], flags=re.MULTILINE)
        for found in EXAMPLE.finditer(document.read_text() + "\n")
        if found["language"] == language
    ]


def rows(document: Path) -> dict[str, tuple[str, ...]]:
    """The rows of its list tables, by their first cell."""
    found = re.findall(r"   \* - (.*)((?:\n     - .*)+)", document.read_text())
    return {first.strip("`"): tuple(re.findall(r"- (.*)", rest)) for first, rest in found}


def commands(group: click.Group = main, above: str = "") -> dict[str, click.Command]:
    """Every command by its name, those of groups as in ``db backup``."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{above}{name} ")
        else:
            found[f"{above}{name}"] = command
    return found


# -- complete ---------------------------------------------------------------------


def test_every_error_code_is_documented_with_its_status() -> None:
    documented = rows(DOCS / "errors.rst")
    documented.pop("Code")
    assert set(documented) == set(errors.by_code())
    for code, (status, meaning) in documented.items():
        kind = errors.by_code()[code]
        assert status in {"none", str(status_of(kind()))}, code
        assert meaning.endswith("."), code


def test_every_command_and_option_is_documented() -> None:
    text = (DOCS / "cli.rst").read_text()
    for name, command in commands().items():
        section = re.search(rf"^``tursi {name}\b.*\n((?:\n|   .*\n)+)", text, re.MULTILINE)
        assert section, name
        assert command.help, name
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.name != "json":
                for option in parameter.opts:
                    assert f"``{option}``" in section[1], (name, option)
    assert all(f"``{each.opts[0]}" in text for each in main.params)


def test_every_command_takes_json() -> None:
    for name, command in commands().items():
        assert "--json" in {each for option in command.params for each in option.opts}, name


def test_every_exit_code_is_documented() -> None:
    documented = rows(DOCS / "cli.rst")
    documented.pop("Code")
    assert {int(code) for code in documented} == {int(each) for each in Exit}


def test_every_setting_is_documented() -> None:
    assert ".. literalinclude:: ../etc/tursi.toml" in (DOCS / "configuration.rst").read_text()
    shown = config.parse((ROOT / "etc" / "tursi.toml").read_text(), "etc/tursi.toml")
    assert shown == config.Configuration()
    lines = (ROOT / "etc" / "tursi.toml").read_text().splitlines()
    tables = [shown.http, shown.http.listeners[0], shown.requests, shown.workers, shown.memory]
    for table in (*tables, shown.hub, shown.storage, shown.log):
        for field in table.__struct_fields__:
            assert any(re.match(rf"\[*(\w+\.)?{field}\b", each) for each in lines), field


def test_every_phase_is_documented() -> None:
    documented = rows(DOCS / "reliability.rst")
    assert set(documented) - {"Phase"} == {each.value for each in Phase}


def test_the_diagram_of_the_phases_is_that_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    lifecycle = importlib.import_module("lifecycle")
    assert lifecycle.FILE.read_text() == lifecycle.render(), "run python docs/lifecycle.py"


def test_the_numbers_of_the_documentation_are_the_defaults() -> None:
    text = " ".join((DOCS / "reliability.rst").read_text().split())
    workers = config.Workers()
    assert f"{workers.max_failures} failures in a row quarantine" in text
    assert f"one try after {workers.quarantine_seconds / 60:g} minutes" in text
    assert f"{workers.good_seconds:g} s of service" in text
    hung = workers.beat_seconds * workers.beat_misses
    assert f"heartbeat {workers.beat_seconds:g} s {hung:g} s" in text
    assert f"progress {workers.first_seconds:g} s a {workers.beat_seconds:g} s later" in text
    assert f"{workers.step_seconds:g} s a token" in text
    hung = workers.ping_timeout * workers.ping_misses
    assert f"PING {workers.ping_timeout:g} s {hung:g} s" in text
    assert f"more than {governor.MAX_DEATHS} workers die" in text


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {page.stem for page in DOCS.glob("*.rst")} - {"index"}
    assert pages == set(re.findall(r"^   (\w+)$", (DOCS / "index.rst").read_text(), re.MULTILINE))


def test_every_route_is_in_the_http_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    http_reference = importlib.import_module("http_reference")
    document: dict[str, Any] = http_reference.description()
    text = http_reference.render(document)
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"``{method.upper()} {path}``" in text


# -- sound ------------------------------------------------------------------------

DOCUMENTS = [ROOT / "README.rst", *sorted(DOCS.glob("*.rst"))]


def test_the_readme_names_its_examples() -> None:
    names = {found["name"] for found in EXAMPLE.finditer((ROOT / "README.rst").read_text())}
    assert names >= {"cli", "curl", "openai", "huggingface", "control", "configuration"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_shell_examples_are_sound(document: Path) -> None:
    for code in examples(document, "bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True, timeout=30)
        for words in re.findall(r"^tursi (.*)", code, re.MULTILINE):
            names = [name for name in commands() if f"{words} ".startswith(f"{name} ")]
            command = commands()[max(names, key=len)]
            known = {each for option in command.params for each in option.opts}
            assert set(re.findall(r"--[\w-]+", words)) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_and_toml_examples_are_sound(document: Path) -> None:
    for code in examples(document, "python"):
        ast.parse(code)
        for line in re.findall(r"^(?:from|import) .*", code, re.MULTILINE):
            subprocess.run([sys.executable, "-c", line], check=True, timeout=60)
    for code in examples(document, "toml"):
        config.parse(code, str(document))

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tursi.config import Configuration, changes, load, parse
from tursi.errors import ConfigurationError
from tursi.model import Role

EXAMPLE = Path(__file__).parents[1] / "etc" / "tursi.toml"


def paths(value: Any, prefix: str = "") -> set[str]:
    """The dotted path of every key, those of the first entry of an array of tables included."""
    found: set[str] = set()
    for key, inner in value.items():
        path = f"{prefix}{key}"
        found.add(path)
        entry = inner[0] if isinstance(inner, (list, tuple)) and inner else inner
        if isinstance(entry, dict):
            found |= paths(entry, f"{path}.")
    return found


def test_the_example_shows_every_setting_with_its_default() -> None:
    text = EXAMPLE.read_text()
    assert parse(text, "etc/tursi.toml") == Configuration()
    assert paths(tomllib.loads(text)) == paths(msgspec.to_builtins(Configuration()))


def test_every_setting_of_the_example_has_its_comment() -> None:
    before = ""
    for line in EXAMPLE.read_text().splitlines():
        assert not re.match(r"\w+ =", line) or before.startswith("# "), line
        before = line


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[http]\nmax_bdy = 1", "unknown field `max_bdy` - at `$.http`"),
        ("x = 1", "unknown field `x`"),
        ("[nets]", "unknown field `nets`"),
        (
            "[[http.listeners]]\nendpoint = 'tcp:1'\nroles = []\nname = 'a'",
            "unknown field `name` - at `$.http.listeners[0]`",
        ),
        (
            "[[http.listeners]]\nendpoint = 'tcp:1'",
            "missing required field `roles` - at `$.http.listeners[0]`",
        ),
        (
            "[[http.listeners]]\nendpoint = 'tcp:1'\nroles = ['root']",
            "'root' - at `$.http.listeners[0].roles[0]`",
        ),
        ("[workers]\nthreads = 'two'", "got `str` - at `$.workers.threads`"),
        ("[workers]\nthreads = 1.5", "got `float` - at `$.workers.threads`"),
        ("[workers]\nthreads = true", "got `bool` - at `$.workers.threads`"),
        ("[workers]\nthreads = 0", ">= 1 - at `$.workers.threads`"),
        ("[workers]\nthreads = 99999999999999999999", "at `$.workers.threads`"),
        ("[workers]\nstop_seconds = 0", "> 0.0 - at `$.workers.stop_seconds`"),
        ("[workers]\nstop_seconds = inf", "at `$.workers.stop_seconds`"),
        ("[workers]\nstop_seconds = nan", "at `$.workers.stop_seconds`"),
        ("[workers]\nbackoff_jitter = 1.0", "<= 0.9 - at `$.workers.backoff_jitter`"),
        ("hub = 3", "got `int` - at `$.hub`"),
        ("[hub]\noffline = 'no'", "got `str` - at `$.hub.offline`"),
        ("[workers", "isn't valid TOML"),
        ("[hub]\noffline = no", "isn't valid TOML"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(text: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text, "my.toml")
    assert caught.value.message.startswith("my.toml")
    assert sentence in caught.value.message
    assert "\n" not in caught.value.message


def test_what_the_file_says_is_taken_and_the_rest_is_default(tmp_path: Path) -> None:
    file = tmp_path / "tursi.toml"
    file.write_text("[[http.listeners]]\nendpoint = 'tcp:0'\nroles = ['control']\n[workers]\n")
    (listener,) = load(file, tmp_path / "other.toml").http.listeners
    assert (listener.endpoint, listener.roles) == ("tcp:0", (Role.CONTROL,))
    assert load(None, file).workers == Configuration().workers


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert load(None, missing) == Configuration()
    with pytest.raises(ConfigurationError, match="There is no configuration file"):
        load(missing, missing)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        load(tmp_path, tmp_path)
    file = tmp_path / "tursi.toml"
    file.write_bytes(b"x = '\xff'")
    with pytest.raises(ConfigurationError, match="can't be read"):
        load(None, file)


def test_what_has_changed_is_called_as_in_the_file() -> None:
    old = parse("[workers]\nthreads = 2", "old.toml")
    new = parse("[workers]\nmax_failures = 9\n[http]\nhosts = ['a']", "new.toml")
    assert changes(old, new) == ["http.hosts", "workers.max_failures", "workers.threads"]
    assert changes(new, new) == []

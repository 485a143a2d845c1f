"""Keys on the command line, and a daemon that is reached with one."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scripted_api import Api, refusal, scripted_api
from self_signed import certificate

from tursi.cli import main
from tursi.cli.connection import Exit

KEY = {
    "id": 2, "name": "ci", "scopes": ["infer", "read"], "deployments": None,
    "created_at": "2026-01-02T03:04:05Z", "created_by": "uid 0", "last_used_at": None,
    "requests_per_minute": 5, "tokens_per_minute": None, "revoked_at": None,
}  # fmt: skip


@pytest.fixture
def api() -> Iterator[Api]:
    with scripted_api() as running:
        yield running


def test_a_new_key_is_all_that_goes_to_stdout(api: Api) -> None:
    api.on("POST", "/keys", {"key": KEY, "secret": "tursi_2_ab"})
    result = api.tursi("keys", "create", "ci")
    assert (result.exit_code, result.stdout) == (0, "tursi_2_ab\n")
    assert "not shown again" in result.stderr
    everything: dict[str, Any] = {
        "name": "ci", "scopes": ["infer", "read"], "deployments": ["a", "b"],
        "requests_per_minute": 5, "tokens_per_minute": 9,
    }  # fmt: skip
    options = ["--scope=infer", "--scope=read", "--deployment=a", "--deployment=b"]
    api.tursi("keys", "create", "ci", *options, "--requests=5", "--tokens=9")
    assert [one.body for one in api.asked] == [
        {
            **everything,
            "scopes": ["infer"],
            "deployments": None,
            "requests_per_minute": None,
            "tokens_per_minute": None,
        },
        everything,
    ]
    shown = json.loads(api.tursi("keys", "create", "ci", "--json").stdout)
    assert shown["secret"] == "tursi_2_ab"


def test_keys_are_listed_with_their_last_use(api: Api) -> None:
    used = {**KEY, "id": 3, "name": "app", "deployments": ["small"], "last_used_at": "2026-02-03"}
    gone = {**KEY, "id": 4, "name": "old", "revoked_at": "2026-03-04T00:00:00Z"}
    api.on("GET", "/keys", {"keys": [KEY, used, gone]})
    lines = api.tursi("keys", "list").stdout.splitlines()
    assert ["never" in lines[1], "2026-02-03" in lines[2], "revoked" in lines[3]] == [True] * 3
    assert "5 requests" in lines[1]
    assert json.loads(api.tursi("keys", "list", "--json").stdout)["keys"][0] == KEY


def test_a_key_is_revoked_by_name_or_id(api: Api) -> None:
    api.on("DELETE", "/keys/ci", KEY)
    assert api.tursi("keys", "revoke", "ci").stdout == "The key ci is revoked.\n"
    api.on("DELETE", "/keys/9", refusal(404, "key_not_found", "There is no such key."))
    assert api.tursi("keys", "revoke", "9").exit_code == Exit.NOT_FOUND


@pytest.mark.parametrize(
    "url", ["models.example", "ftp://x", "http://", "http://a b", "http://a/b"]
)
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    result = CliRunner().invoke(main, ["--url", url, "ps"])
    assert result.exit_code == Exit.USAGE
    assert "TURSI_API_KEY" in result.stderr


def test_nobody_at_a_url_is_told_as_such() -> None:
    environment = {"TURSI_URL": "http://127.0.0.1:1", "TURSI_API_KEY": "tursi_1_secret"}
    result = CliRunner().invoke(main, ["ps"], env=environment)
    assert result.exit_code == Exit.NO_DAEMON
    assert "No daemon answers at http://127.0.0.1:1 (" in result.stderr
    assert "secret" not in result.stderr


def test_a_certificate_that_is_not_trusted_is_told_as_such(tmp_path: Path) -> None:
    certificate(tmp_path, "stranger")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    def answer(listening: socket.socket) -> None:
        with suppress(OSError), listening.accept()[0] as accepted:
            context.wrap_socket(accepted, server_side=True).recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=(listening,))
        thread.start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        result = CliRunner().invoke(main, ["ps"], env={"TURSI_URL": url})
        thread.join()
    assert result.exit_code == Exit.NO_DAEMON
    assert result.stderr.startswith(f"tursi: The certificate of {url} isn't trusted here (")
    assert "SSL_CERT_FILE" in result.stderr

"""API keys: make, list and revoke them."""

from __future__ import annotations

from typing import Any

import click

from tursi.cli.connection import Connection, path
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, local_time, note, table
from tursi.model import Scope


@click.group()
def keys() -> None:
    """Make, list and revoke API keys."""


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([each.value for each in Scope]),
    default=(Scope.INFER.value,),
    show_default=True,
    help="What it allows: infer, read, or admin, which is all; may be given several times.",
)
@click.option("--deployment", "deployments", multiple=True, help="The only one it may use.")
@click.option("--requests", type=click.IntRange(min=1), help="Requests per minute.")
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens per minute, in and out.")
@as_json
@click.pass_obj
def create(
    connection: Connection,
    *,
    name: str,
    scopes: tuple[str, ...],
    deployments: tuple[str, ...],
    requests: int | None,
    tokens: int | None,
    json: bool,
) -> None:
    """Make a key and print it, this once: the daemon keeps only its hash."""
    body = {
        "name": name,
        "scopes": [*scopes],
        "deployments": [*deployments] or None,
        "requests_per_minute": requests,
        "tokens_per_minute": tokens,
    }
    made = connection.call("POST", "/keys", body=body).body
    if json:
        dump(made)
        return
    note("This is the key; it is not shown again:")
    line(str(made["secret"]))


@keys.command(name="list")
@as_json
@click.pass_obj
def list_keys(connection: Connection, *, json: bool) -> None:
    """List the keys: what they allow, and when they were last used."""
    found = connection.get("/keys")
    if json:
        dump(found)
        return
    columns = ("ID", "NAME", "SCOPES", "DEPLOYMENTS", "PER MINUTE", "CREATED", "LAST USED")
    rows = [_row(each) for each in found["keys"]]
    table(columns, rows, spare=("CREATED", "ID", "PER MINUTE"))


@keys.command()
@click.argument("key")
@as_json
@click.pass_obj
def revoke(connection: Connection, *, key: str, json: bool) -> None:
    """Revoke a key, by its name or id; it is invalid at once and for ever."""
    revoked = connection.call("DELETE", path("keys", key)).body
    if json:
        dump(revoked)
        return
    line(f"The key {revoked['name']} is revoked.")


def _row(key: dict[str, Any]) -> tuple[str, ...]:
    rates = [
        f"{key[f'{what}_per_minute']} {what}"
        for what in ("requests", "tokens")
        if key[f"{what}_per_minute"] is not None
    ]
    used = "never" if key["last_used_at"] is None else local_time(key["last_used_at"])
    return (
        str(key["id"]),
        key["name"],
        ", ".join(key["scopes"]),
        "all" if key["deployments"] is None else ", ".join(key["deployments"]),
        ", ".join(rates) or "no limit",
        local_time(key["created_at"]),
        used if key["revoked_at"] is None else f"revoked {local_time(key['revoked_at'])}",
    )

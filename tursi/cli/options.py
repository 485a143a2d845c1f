"""Options that every command has."""

from __future__ import annotations

import click

as_json = click.option("--json", is_flag=True, help="Print JSON, as the HTTP API has it.")
"""``--json``; a command takes it as ``json: bool``."""

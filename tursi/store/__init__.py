"""The store: everything durable, in one SQLite file. SQL doesn't leave this package."""

from tursi.store.backups import backup, report, restore
from tursi.store.deployments import Outcome, foretell
from tursi.store.file import give, inspect, prepare
from tursi.store.schema import UPGRADES
from tursi.store.store import Store

__all__ = [
    "NEWEST", "Outcome", "Store", "backup", "foretell", "give", "inspect", "prepare", "report",
    "restore",
]  # fmt: skip

NEWEST = len(UPGRADES)
"""The version of the schema that this Tursi makes of every database."""

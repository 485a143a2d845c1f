"""The store: everything durable, in one SQLite file. SQL doesn't leave this package."""

from tursi.store.backups import backup, report, restore
from tursi.store.deployments import Outcome
from tursi.store.file import give, inspect, prepare
from tursi.store.store import Store

__all__ = ["Outcome", "Store", "backup", "give", "inspect", "prepare", "report", "restore"]

"""The store: everything durable, in one SQLite file. SQL doesn't leave this package."""

from tursi.store.deployments import Outcome
from tursi.store.file import inspect, prepare
from tursi.store.store import Store

__all__ = ["Outcome", "Store", "inspect", "prepare"]

"""The HTTP front: inference by the faces' routes, control and everything else by Klein."""

from __future__ import annotations

from tursi.api.front import Front
from tursi.api.info import Info
from tursi.api.keys import Keys
from tursi.api.messages import Reloaded

__all__ = ["Front", "Info", "Keys", "Reloaded"]

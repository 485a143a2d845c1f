"""The fleet: what is deployed, converged to what is wanted, and the way of requests to it."""

from __future__ import annotations

from tursi.fleet.fleet import Fleet, Part
from tursi.fleet.passage import Passage, Work
from tursi.supervision.link import Sink

__all__ = ["Fleet", "Part", "Passage", "Sink", "Work"]

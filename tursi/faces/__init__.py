"""Faces: one file per protocol that clients speak; pure codecs, no sockets.

A face is a list of routes. The daemon uses them to find a route by path and to
shape its own errors; the worker uses the same objects to decode the body to a
task request and to encode the result. ``ROUTES`` has them all.
"""

from __future__ import annotations

from tursi.faces.route import ROUTES, STATUS, Answer, Codec, Context, Match, Route, find, route

__all__ = [
    "ROUTES",
    "STATUS",
    "Answer",
    "Codec",
    "Context",
    "Match",
    "Route",
    "find",
    "route",
]

"""Faces: one file per protocol that clients speak; pure codecs, no sockets.

A face is a list of routes. The daemon uses them to find a route by path and to
shape its own errors; the worker uses the same objects to decode a body to a
task request and to encode the result.
"""

from __future__ import annotations

from tursi.faces import huggingface, openai
from tursi.faces.route import Table

TABLE = Table((*openai.ROUTES, *huggingface.ROUTES))
"""Every route that serves a model."""

"""What clients of inference are told without learning where things are on this machine."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

_QUOTED = re.compile(r"""(['"])(/[^'"]*)\1""")
# Not within a word, a URL or a relative path.
_BARE = re.compile(r"""(?<![\w:/.~\]-])/[^\s'",;:()\[\]<>]*""")
_SHOWN = frozenset(
    {".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".py", ".pt", ".pkl"}
)
"""Endings of a model's files: their names are no secret, unlike where they are."""


def discreet(text: str, *folders: str | None) -> str:
    """``text`` without absolute paths; names of a model's files stay.

    ``folders`` are those known to occur in it, which may have spaces.
    """
    for folder in sorted(filter(None, folders), key=len, reverse=True):
        if folder.startswith("/"):
            text = text.replace(folder.rstrip("/") or folder, "[folder]")
    text = _QUOTED.sub(lambda match: f"{match[1]}{_short(match[2])}{match[1]}", text)
    return _BARE.sub(lambda match: _short(match[0]), text)


def _short(path: str) -> str:
    # A sentence may end right after the path.
    end = path[len(path.rstrip(".")) :]
    name = PurePosixPath(path.rstrip(".")).name
    shown = f"[path]/{name}" if PurePosixPath(name).suffix in _SHOWN else "[path]"
    return shown + end

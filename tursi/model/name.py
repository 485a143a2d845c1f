"""Names that users choose."""

from __future__ import annotations

import re

from tursi.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def key_name(text: str) -> str:
    """``text`` if it can name a key, else ``InvalidRequest``."""
    if not _NAME.fullmatch(text) or text.isdigit():
        raise InvalidRequest(
            "A key's name has 1 to 96 letters, digits, '.', '_' and '-', begins with a letter "
            "or digit, and isn't a number.",
            param="name",
        )
    return text


def deployment_name(text: str) -> str:
    """``text`` if it can name a deployment, else ``InvalidRequest``."""
    if not _NAME.fullmatch(text):
        raise InvalidRequest(
            "A deployment's name has 1 to 96 letters, digits, '.', '_' and '-', "
            "and begins with a letter or digit.",
            param="name",
        )
    return text

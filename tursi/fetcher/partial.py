"""What arrived of a file before its download was killed is kept and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".incomplete"
"""Of huggingface_hub's temporary files, ``ETAG.SOMETHING.incomplete`` beside the blobs."""


def resuming(get: Callable[..., None]) -> Callable[..., None]:
    """``huggingface_hub.file_download.http_get`` that begins where an earlier one ended.

    huggingface_hub gives each attempt a new temporary file and never comes back to
    it. Whoever installs this has to be alone with the repository: two downloads
    must not write into one file. The content is verified when it is complete.
    """

    def get_rest(url: str, temp_file: BinaryIO, **settings: Any) -> None:
        if "resume_size" in settings:
            # Its own next try, which calls itself by its name in the module.
            get(url, temp_file, **settings)
            return
        path = Path(temp_file.name)
        expected = settings.get("expected_size")
        kept = largest(path.parent, _etag(path), but=path)
        if kept is not None and (expected is None or kept.stat().st_size <= expected):
            # It is moved and opened by this name afterwards; the file that is open
            # now is empty and goes with its descriptor.
            kept.replace(path)
        with path.open("ab") as file:
            try:
                get(url, file, resume_size=file.tell(), **settings)
            except BaseException:
                # Who called removes the temporary file by its name.
                path.replace(path.with_name(f"{_etag(path)}.kept{SUFFIX}"))
                raise

    return get_rest


def largest(folder: Path, etag: str, but: Path | None = None) -> Path | None:
    """The largest part of this content that an earlier attempt has left."""
    parts = [each for each in folder.glob(f"{etag}.*{SUFFIX}") if each != but]
    return max(parts, key=lambda each: each.stat().st_size, default=None)


def _etag(path: Path) -> str:
    return path.name.partition(".")[0]

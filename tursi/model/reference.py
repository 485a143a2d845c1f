"""Where a model comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tursi.errors import InvalidRequest

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True, slots=True)
class Reference:
    """Where a model comes from: a folder on disk or a hub repository."""

    repository: str | None = None
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``/abs/folder`` or ``[org/]name[@revision]``.

        Whether a relative path exists is for the caller to know (the CLI makes
        it absolute): the daemon's working directory means nothing to a user.
        """
        if "\0" in text or not text or len(text) > 4096:
            raise InvalidRequest("The model must be a folder or a hub name.", param="model")
        if text.startswith("/"):
            if ".." in text.split("/"):
                raise InvalidRequest("A folder is named without '..' in its path.", param="model")
            return cls(folder=text)
        repository, at, revision = text.partition("@")
        if (
            not _REPOSITORY.fullmatch(repository)
            or (at and not _REVISION.fullmatch(revision))
            or ".." in text
        ):
            raise InvalidRequest(
                f"{text[:200]!r} is neither an absolute folder nor a hub name like "
                "'org/name' or 'org/name@revision'.",
                param="model",
            )
        return cls(repository=repository, revision=revision or None)

    def __str__(self) -> str:
        """The reference as the user would write it."""
        if self.folder is not None:
            return self.folder
        return f"{self.repository}@{self.revision}" if self.revision else str(self.repository)

    @property
    def short_name(self) -> str:
        """The last segment, which names a deployment when the user doesn't."""
        text = self.folder or self.repository or ""
        last = text.rstrip("/").rpartition("/")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:96] or "model"

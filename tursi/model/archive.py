"""What an import would do, before anything of it is done."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """An archive, and what importing it means here."""

    name: str
    """The deployment's."""
    model: str
    outcome: str
    """What would become of the deployment, as the import itself says then."""
    commit: str | None
    files: int
    size: int
    """Bytes of all files."""
    present: int
    """Bytes of those that are there already."""
    free: int
    """Bytes that the disk has."""
    exported_at: float
    exported_by: str
    """Who made it, where it was made."""
    version: str
    """Of the Tursi that made it."""
    allow_pickle: bool = False
    trust_remote_code: bool = False

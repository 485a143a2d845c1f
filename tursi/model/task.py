"""What a model does."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from tursi.errors import InvalidRequest


class Task(StrEnum):
    """What a model does, by the Hugging Face pipeline name."""

    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    FILL_MASK = "fill-mask"
    TEXT_GENERATION = "text-generation"

    @classmethod
    def parse(cls, name: str) -> Task:
        """The task with this name or common alias; ``InvalidRequest`` if there is none."""
        wanted = name.strip().lower()
        wanted = _TASK_ALIASES.get(wanted, wanted)
        try:
            return cls(wanted)
        except ValueError:
            known = ", ".join(task.value for task in cls)
            raise InvalidRequest(
                f"Tursi doesn't know the task {name!r}; choose one of: {known}.", param="task"
            ) from None


_TASK_ALIASES: Mapping[str, str] = {
    "embedding": "feature-extraction",
    "embeddings": "feature-extraction",
    "sentence-similarity": "feature-extraction",
    "sentiment-analysis": "text-classification",
    "chat": "text-generation",
}

"""What a model is, as its own files tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tursi.model.footprint import Footprint


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a model."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is known of a model without loading it; ``None`` where its files don't say."""

    files: tuple[ModelFile, ...] = ()
    architecture: str | None = None
    """Such as ``BertModel``."""
    parameters: int | None = None
    dtype: str | None = None
    """Of the weights in the files."""
    context_length: int | None = None
    """Tokens of one text."""
    dimensions: int | None = None
    """Of an embedding, or of the hidden states."""
    pooling: str | None = None
    """How tokens become one embedding."""
    normalizes: bool = False
    """Whether embeddings have length 1 by the model's own files."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """What is put before a text, by name."""
    default_prompt: str | None = None
    labels: tuple[str, ...] = ()
    """Of a classifier, the first of them."""
    has_chat_template: bool = False
    license: str | None = None
    task: str | None = None
    """As the README has it, which is called ``pipeline_tag`` there."""
    library: str | None = None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model on this machine's disk, and the deployment that was asked about."""

    name: str
    folder: str
    commit: str | None
    size: int
    """Bytes of all files."""
    card: ModelCard
    used_by: tuple[str, ...] = ()
    """Deployments."""
    used_at: float | None = None
    footprint: Footprint | None = None
    """What a worker of the deployment needs of memory, estimated and measured."""
    routes: tuple[str, ...] = ()
    """Paths that take requests for the deployment."""

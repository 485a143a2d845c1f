"""The typed requests and results of each task: what a face decodes to and encodes from.

A face (``tursi.faces``) turns the bytes of one protocol into these; the engines
(``tursi.inference``) know nothing else. Vectors cross as buffers of float32
(little-endian, C order), so that faces need no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tursi.model import Usage

Text: TypeAlias = str | tuple[int, ...]
"""One input: text, or token ids that are used as they are."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Embed each input."""

    inputs: tuple[Text, ...]
    normalize: bool | None = None
    """Scale to unit length; ``None`` means as the model's own files say."""
    truncate: bool | None = None
    """Cut over-long inputs; ``None`` means as the model's own files say, else refuse."""
    prompt_name: str | None = None
    """One of the prompts in the model's ``config_sentence_transformers.json``."""
    dimensions: int | None = None
    """Keep only this many leading dimensions (Matryoshka models)."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector per input, in order."""

    data: bytes
    """``count * dimensions`` little-endian float32 numbers, row after row."""
    count: int
    dimensions: int
    usage: Usage
    truncated: tuple[int, ...] = ()
    """Indexes of the inputs that were cut."""


@dataclass(frozen=True, slots=True)
class SimilarityRequest:
    """Compare one sentence with others by the cosine of their embeddings."""

    source: str
    sentences: tuple[str, ...]
    truncate: bool | None = None


@dataclass(frozen=True, slots=True)
class Similarities:
    """A cosine per sentence, in order."""

    scores: tuple[float, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class ClassifyRequest:
    """Give each input scored labels."""

    inputs: tuple[Text | tuple[str, str], ...]
    """A pair is a text with its second segment."""
    top_k: int | None = None
    """Labels per input, best first; ``None`` means all."""
    function: Literal["sigmoid", "softmax", "none"] | None = None
    """Applied to the scores; ``None`` means as the model's configuration says."""
    truncate: bool | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """A label with its score."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classifications:
    """The labels of each input, best first."""

    items: tuple[tuple[Label, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class FillMaskRequest:
    """Propose words for each mask token."""

    inputs: tuple[str, ...]
    top_k: int = 5
    targets: tuple[str, ...] | None = None
    truncate: bool | None = None


@dataclass(frozen=True, slots=True)
class Fill:
    """One proposal for one mask."""

    score: float
    token: int
    token_str: str
    sequence: str


@dataclass(frozen=True, slots=True)
class Fills:
    """For each input, for each of its masks, the proposals, best first."""

    items: tuple[tuple[tuple[Fill, ...], ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token; ``None`` means as the model's generation config says."""

    max_tokens: int | None = None
    """``None`` means as much as fits in the context."""
    min_tokens: int = 0
    temperature: float | None = None
    """0 means greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; they are never shown, not even in part."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue each prompt, ``n`` times each.

    Exactly one of ``prompts`` and ``messages`` is set; messages go through the
    tokenizer's chat template. Choice ``i`` belongs to prompt ``i // n``.
    """

    prompts: tuple[Text, ...] = ()
    messages: tuple[Message, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    logprobs: int | None = None
    """Report each token's log probability and that many alternatives (0-20)."""
    stream: bool = False
    truncate: bool = False
    """Cut the beginning of over-long prompts instead of refusing them."""
    template_arguments: dict[str, object] = field(default_factory=dict)
    """Extra variables for the chat template."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its natural-log probability; ``top`` holds the alternatives."""

    token: str
    id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one decode step adds to one choice.

    ``text`` holds whole characters only and never part of a stop string; it
    may be empty. ``finish_reason`` is set once, on the choice's last delta.
    """

    choice: int
    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    """One per generated token this delta stands for, when log probabilities were asked for."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished continuation."""

    index: int
    text: str
    finish_reason: FinishReason
    tokens: tuple[TokenLogprob, ...] = ()
    prompt: str = ""
    """The text of the prompt it continues, special tokens left out (for ``echo``)."""


@dataclass(frozen=True, slots=True)
class Generated:
    """All choices of a request, in order."""

    choices: tuple[Choice, ...]
    usage: Usage


TaskRequest: TypeAlias = (
    EmbedRequest | SimilarityRequest | ClassifyRequest | FillMaskRequest | GenerateRequest
)
TaskResult: TypeAlias = Embeddings | Similarities | Classifications | Fills | Generated

"""What chat and completions have in common: sampling fields, usage, and the frame of a stream."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tursi.errors import InvalidRequest
from tursi.faces.body import NonEmpty, TokenId, event
from tursi.faces.openai.errors import DONE
from tursi.faces.route import Context
from tursi.model import Usage
from tursi.tasks import Sampling

MAX_CHOICES = 128
"""Largest ``n``."""
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
StopList = Annotated[list[NonEmpty], Meta(max_length=16)]


class StreamOptions(msgspec.Struct):
    """How to stream."""

    include_usage: bool | None = None


class GenerationBody(msgspec.Struct, kw_only=True):
    """The fields that chat and completions share; ``null`` means absent for each."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """0 and -1 switch it off."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | StopList | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """-1 cuts the beginning of a prompt that is too long, instead of refusing it."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream shall end with a chunk that has only the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def truncate(self) -> bool:
        """Whether to cut prompts that are too long."""
        if self.truncate_prompt_tokens not in (None, -1):
            raise InvalidRequest(
                "The field 'truncate_prompt_tokens' can only be -1 (cut to what the model takes).",
                param="truncate_prompt_tokens",
            )
        return self.truncate_prompt_tokens == -1

    def sampling(self, max_tokens: int | None) -> Sampling:
        """How to choose tokens."""
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and min_tokens > max_tokens:
            raise InvalidRequest(
                f"The field 'min_tokens' ({min_tokens}) is larger than the most tokens "
                f"to generate ({max_tokens}).",
                param="min_tokens",
            )
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=dict(self.logit_bias or {}),
            seed=self.seed,
            stop=self._stop(),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    def _stop(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        if isinstance(self.stop, str):
            if not self.stop:
                raise InvalidRequest("The field 'stop' is empty.", param="stop")
            return (self.stop,)
        return tuple(self.stop)


class GenerationUsage(msgspec.Struct):
    """What the request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> GenerationUsage:
        """The counts of ``usage``."""
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        return cls(prompt, completion, prompt + completion)


class Chunk(msgspec.Struct):
    """One event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[Any, ...]
    usage: GenerationUsage | UnsetType | None = UNSET


class Chunks:
    """The events of one stream, around the choices that chat or completions put in.

    Nobody may see a chunk without choices who didn't ask for it, so without
    ``include_usage`` the usage goes onto the chunk that finishes the last
    choice; that one therefore waits for ``closing``.
    """

    def __init__(self, frame: Chunk, count: int, *, include_usage: bool) -> None:
        self._frame = frame
        self._unfinished = count
        self._include_usage = include_usage
        self._held: tuple[Any, ...] = ()
        if include_usage:
            frame.usage = None

    def chunk(self, choice: msgspec.Struct) -> bytes:
        """An event that adds to a choice."""
        self._frame.choices = (choice,)
        return event(self._frame)

    def finish(self, choice: msgspec.Struct) -> bytes:
        """The event that ends a choice."""
        self._unfinished -= 1
        if self._unfinished <= 0:
            self._held = (choice,)
            return b""
        return self.chunk(choice)

    def closing(self, usage: Usage) -> bytes:
        """The last events."""
        frame, parts = self._frame, []
        if self._include_usage:
            if self._held:
                frame.choices = self._held
                parts.append(event(frame))
            self._held = ()
        if self._held or self._include_usage:
            frame.choices = self._held
            frame.usage = GenerationUsage.of(usage)
            parts.append(event(frame))
        return b"".join((*parts, DONE))


def frame(kind: str, name: str, model: str | None, context: Context) -> Chunk:
    """The fields that every chunk of a stream repeats."""
    return Chunk(
        f"{kind}-{context.request_id}", name, context.created, model or context.deployment, ()
    )

"""``/v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tursi.errors import InvalidRequest, TursiError
from tursi.faces.body import MAX_INPUTS, Inputs, answer, finite, texts
from tursi.faces.openai import errors
from tursi.faces.openai.sampling import Chunks, GenerationBody, GenerationUsage, frame
from tursi.faces.route import Answer, Call, Context, decoded, require_task
from tursi.model import Task, Usage
from tursi.tasks import (
    Choice,
    Delta,
    FinishReason,
    Generated,
    GenerateRequest,
    TaskResult,
    TokenLogprob,
)

TASKS = frozenset({Task.TEXT_GENERATION})
DEFAULT_MAX_TOKENS = 16
"""Tokens to generate for a request that doesn't say."""


class CompletionBody(GenerationBody, kw_only=True):
    """A request to continue texts."""

    prompt: Inputs
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    response_format: Any = None
    structured_outputs: Any = None


class CompletionLogprobs(msgspec.Struct):
    """A list item for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One continuation, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(msgspec.Struct, kw_only=True):
    """The continuations; choice ``i`` belongs to prompt ``i // n``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: GenerationUsage


_DECODER = msgspec.json.Decoder(CompletionBody)


def decode(body: bytes, content_type: str, context: Context) -> Call:  # noqa: ARG001 - a codec's signature
    """Read a request for completions."""
    require_task(context, TASKS)
    asked = decoded(_DECODER, body)
    prompts, _ = texts(asked.prompt, "prompt")
    n = asked.n or 1
    _refuse_unsupported(asked, n)
    if len(prompts) * n > MAX_INPUTS:
        raise InvalidRequest(
            f"{len(prompts)} prompts times n={n} are more than {MAX_INPUTS} choices.", param="n"
        )
    if asked.echo and asked.stream and not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidRequest(
            "A stream can't echo prompts that are token ids; leave out 'echo' or 'stream'.",
            param="echo",
        )
    request = GenerateRequest(
        prompts=prompts,
        sampling=asked.sampling(asked.max_tokens or DEFAULT_MAX_TOKENS),
        n=n,
        logprobs=asked.logprobs,
        stream=bool(asked.stream),
        truncate=asked.truncate,
    )
    return CompletionCall(request, context, asked)


def _refuse_unsupported(asked: CompletionBody, n: int) -> None:
    if asked.suffix:
        raise InvalidRequest("Tursi doesn't insert text before a suffix.", param="suffix")
    if asked.best_of not in (None, n):
        raise InvalidRequest(
            f"The field 'best_of' must be equal to 'n' ({n}): Tursi doesn't rank choices.",
            param="best_of",
        )
    if asked.echo and asked.logprobs is not None:
        raise InvalidRequest(
            "Tursi doesn't give log probabilities of the prompt; leave out 'echo' or 'logprobs'.",
            param="echo",
        )
    if asked.response_format not in (None, {"type": "text"}):
        raise InvalidRequest(
            "Tursi doesn't support what the field 'response_format' asks for; leave it out.",
            param="response_format",
        )
    if asked.structured_outputs is not None:
        raise InvalidRequest(
            "Tursi doesn't support what the field 'structured_outputs' asks for; leave it out.",
            param="structured_outputs",
        )


class CompletionCall:
    """Completions, whole or streamed."""

    def __init__(self, request: GenerateRequest, context: Context, asked: CompletionBody) -> None:
        self.request = request
        self.stream = request.stream
        self._context = context
        self._model = asked.model or context.deployment
        self._echo = bool(asked.echo)
        count = len(request.prompts) * request.n
        self._offsets = [0] * count
        self._chunks = Chunks(
            frame("cmpl", "text_completion", asked.model, context),
            count,
            include_usage=asked.include_usage,
        )

    def whole(self, result: TaskResult) -> Answer:
        """All choices at once."""
        assert isinstance(result, Generated)  # noqa: S101 - tells mypy what the engine returns
        return answer(
            Completion(
                id=f"cmpl-{self._context.request_id}",
                created=self._context.created,
                model=self._model,
                choices=[self._choice(choice) for choice in result.choices],
                usage=GenerationUsage.of(result.usage),
            )
        )

    def _choice(self, choice: Choice) -> CompletionChoice:
        text = self._echoed(choice.index, choice.prompt) + choice.text
        logprobs = self._logprobs(choice.index, choice.tokens)
        return CompletionChoice(choice.index, text, logprobs, choice.finish_reason)

    def _echoed(self, index: int, decoded_prompt: str) -> str:
        if not self._echo:
            return ""
        prompt = self.request.prompts[index // self.request.n]
        return prompt if isinstance(prompt, str) else decoded_prompt

    def opening(self) -> bytes:
        """The prompt of each choice, where it is to be echoed."""
        if not self._echo:
            return b""
        return b"".join(
            self._chunks.chunk(CompletionChoice(index, self._echoed(index, "")))
            for index in range(len(self._offsets))
        )

    def delta(self, delta: Delta) -> bytes:
        """The new text, and the end of the choice as an event of its own."""
        out = b""
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.choice, delta.tokens)
            out = self._chunks.chunk(CompletionChoice(delta.choice, delta.text, logprobs))
        if delta.finish_reason is not None:
            out += self._chunks.finish(
                CompletionChoice(delta.choice, "", None, delta.finish_reason)
            )
        return out

    def closing(self, usage: Usage) -> bytes:
        """The usage and the end."""
        return self._chunks.closing(usage)

    def failure(self, error: TursiError) -> bytes:
        """An error event and the end."""
        return errors.failure(error)

    def _logprobs(self, index: int, tokens: tuple[TokenLogprob, ...]) -> CompletionLogprobs | None:
        if self.request.logprobs is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.token)
        return CompletionLogprobs(
            tokens=[token.token for token in tokens],
            token_logprobs=[finite(token.logprob) for token in tokens],
            top_logprobs=[
                {each.token: finite(each.logprob) for each in (*token.top, token)}
                for token in tokens
            ],
            text_offset=offsets,
        )

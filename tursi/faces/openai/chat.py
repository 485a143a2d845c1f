"""``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tursi.errors import InvalidRequest, TursiError
from tursi.faces.body import answer, finite
from tursi.faces.openai import errors
from tursi.faces.openai.messages import ChatMessage, read
from tursi.faces.openai.sampling import (
    Chunks,
    Count,
    GenerationBody,
    GenerationUsage,
    frame,
)
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

# Arguments of the tokenizer's own call, not variables of the template: a
# client that could set them could bring a template of its own.
_RESERVED = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "documents", "max_length", "messages", "padding", "processor_kwargs", "return_dict",
        "return_assistant_tokens_mask", "return_tensors", "tokenize", "tokenizer_kwargs",
        "tools", "truncation",
    }
)  # fmt: skip


class ResponseFormat(msgspec.Struct):
    """The form of the answer."""

    type: str


class ChatBody(GenerationBody, kw_only=True):
    """A request for the next turn of a chat."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    structured_outputs: Any = None


class TopLogprob(msgspec.Struct):
    """A token with its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    """A generated token, with the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """A token each."""

    content: list[ContentLogprob]
    refusal: None = None


class ChatReply(msgspec.Struct):
    """What the model says."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: str | None = None


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: GenerationUsage


class ChatDelta(msgspec.Struct):
    """What a chunk adds to a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


_DECODER = msgspec.json.Decoder(ChatBody)


def decode(body: bytes, content_type: str, context: Context) -> Call:  # noqa: ARG001 - a codec's signature
    """Read a request for a chat completion."""
    require_task(context, TASKS)
    asked = decoded(_DECODER, body)
    _refuse_unsupported(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequest(
            "The field 'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs"
        )
    limit = asked.max_completion_tokens or asked.max_tokens
    request = GenerateRequest(
        messages=read(asked.messages),
        sampling=asked.sampling(limit),
        n=asked.n or 1,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        stream=bool(asked.stream),
        truncate=asked.truncate,
        template_arguments=_template_arguments(asked),
    )
    return ChatCall(request, context, asked.model, include_usage=asked.include_usage)


def _refuse_unsupported(asked: ChatBody) -> None:
    wanted = {
        "tools": bool(asked.tools) and asked.tool_choice != "none",
        "functions": bool(asked.functions) and asked.function_call != "none",
        "tool_choice": not asked.tools and asked.tool_choice not in (None, "none", "auto"),
        "response_format": asked.response_format not in (None, ResponseFormat("text")),
        "modalities": any(item != "text" for item in asked.modalities or ()),
        "audio": asked.audio is not None,
        "web_search_options": asked.web_search_options is not None,
        "structured_outputs": asked.structured_outputs is not None,
    }
    for field, refused in wanted.items():
        if refused:
            raise InvalidRequest(
                f"Tursi doesn't support what the field {field!r} asks for; leave it out.",
                param=field,
            )


def _template_arguments(asked: ChatBody) -> dict[str, object]:
    arguments = asked.chat_template_kwargs or {}
    for name in arguments:
        if name in _RESERVED:
            raise InvalidRequest(
                f"The field 'chat_template_kwargs' can't set {name!r}.",
                param="chat_template_kwargs",
            )
    return arguments


class ChatCall:
    """A chat completion, whole or streamed."""

    def __init__(
        self, request: GenerateRequest, context: Context, model: str | None, *, include_usage: bool
    ) -> None:
        self.request = request
        self.stream = request.stream
        self._context = context
        self._model = model or context.deployment
        self._chunks = Chunks(
            frame("chatcmpl", "chat.completion.chunk", model, context),
            request.n,
            include_usage=include_usage,
        )

    def whole(self, result: TaskResult) -> Answer:
        """All choices at once."""
        assert isinstance(result, Generated)  # noqa: S101 - tells mypy what the engine returns
        return answer(
            ChatCompletion(
                id=f"chatcmpl-{self._context.request_id}",
                created=self._context.created,
                model=self._model,
                choices=[self._choice(choice) for choice in result.choices],
                usage=GenerationUsage.of(result.usage),
            )
        )

    def _choice(self, choice: Choice) -> ChatChoice:
        return ChatChoice(
            choice.index,
            ChatReply(choice.text),
            self._logprobs(choice.tokens),
            choice.finish_reason,
        )

    def opening(self) -> bytes:
        """The role of each choice; it is never repeated."""
        return b"".join(
            self._chunks.chunk(ChatChunkChoice(index, ChatDelta("assistant", "")))
            for index in range(self.request.n)
        )

    def delta(self, delta: Delta) -> bytes:
        """The new text, and the end of the choice as an event of its own."""
        out = b""
        if delta.text or delta.tokens:
            out = self._chunks.chunk(
                ChatChunkChoice(
                    delta.choice, ChatDelta(content=delta.text), self._logprobs(delta.tokens)
                )
            )
        if delta.finish_reason is not None:
            out += self._chunks.finish(
                ChatChunkChoice(delta.choice, ChatDelta(), None, delta.finish_reason)
            )
        return out

    def closing(self, usage: Usage) -> bytes:
        """The usage and the end."""
        return self._chunks.closing(usage)

    def failure(self, error: TursiError) -> bytes:
        """An error event and the end."""
        return errors.failure(error)

    def _logprobs(self, tokens: tuple[TokenLogprob, ...]) -> ChatLogprobs | None:
        if self.request.logprobs is None:
            return None
        return ChatLogprobs(
            [
                ContentLogprob(
                    token.token,
                    finite(token.logprob),
                    _bytes(token.token),
                    [
                        TopLogprob(top.token, finite(top.logprob), _bytes(top.token))
                        for top in token.top
                    ],
                )
                for token in tokens
            ]
        )


def _bytes(token: str) -> list[int] | None:
    # Part of a character has no text of its own.
    return None if "\ufffd" in token else list(token.encode("utf-8", "replace"))

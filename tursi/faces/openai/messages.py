"""The turns of a chat, as OpenAI's clients write them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from tursi.errors import InvalidRequest
from tursi.tasks import Message


class ContentPart(msgspec.Struct):
    """A piece of a message."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None


def read(messages: list[ChatMessage]) -> tuple[Message, ...]:
    """The turns with plain text; ``InvalidRequest`` for what isn't text."""
    return tuple(_message(index, item) for index, item in enumerate(messages))


def _message(index: int, item: ChatMessage) -> Message:
    where = f"messages[{index}]"
    if item.tool_calls:
        raise InvalidRequest(
            f"Tursi doesn't support tool calls; leave out '{where}.tool_calls'.",
            param=f"{where}.tool_calls",
        )
    if item.content is None and item.role != "assistant":
        raise InvalidRequest(f"The message '{where}' has no content.", param=f"{where}.content")
    # Few templates know the newer word for the same role.
    role = "system" if item.role == "developer" else item.role
    return Message(role, _content(item.content, where), item.name)


def _content(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text":
            raise InvalidRequest(
                f"The model takes only text, but '{where}.content[{index}]' has the type "
                f"{part.type[:100]!r}.",
                param=f"{where}.content[{index}].type",
            )
        if part.text is None:
            raise InvalidRequest(
                f"The part '{where}.content[{index}]' has no text.",
                param=f"{where}.content[{index}].text",
            )
    return "\n".join(part.text or "" for part in content)

"""A conversation with a model."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import click

from tursi.cli.connection import INFERENCE_SECONDS, Connection, Exit, Failure, failure, path
from tursi.cli.loading import shown_loading
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, note, safe

_LEAVE = "/exit"


@dataclass
class Conversation:
    """The turns so far, and how to get the next one."""

    connection: Connection
    model: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Iterator[str]:
        """The answer to ``text``, piece by piece.

        What has come of it belongs to the conversation, also when it is stopped
        midway; a turn that fails without an answer doesn't.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._pieces():
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _pieces(self) -> Iterator[str]:
        with self.connection.stream(
            "POST",
            "/v1/chat/completions",
            body={"model": self.model, "messages": self.messages, "stream": True},
            seconds=INFERENCE_SECONDS,
        ) as events:
            for event in events:
                if event.data == "[DONE]":
                    return
                chunk: dict[str, Any] = jsonlib.loads(event.data)
                if "error" in chunk:
                    raise failure(chunk, 500)
                for choice in chunk["choices"]:
                    content = choice["delta"].get("content")
                    if content:
                        yield content
        raise Failure("The answer broke off; the daemon may be stopping.", Exit.NO_DAEMON)


@click.command()
@click.argument("name")
@as_json
@click.pass_obj
def chat(connection: Connection, *, name: str, json: bool) -> None:
    """Chat with the model NAME.

    Ctrl-C stops an answer; Ctrl-D or /exit ends the chat. Lines from a pipe are
    turns too.
    """
    connection.get(path("v1", "models", name))
    conversation = Conversation(connection, name)
    interactive = sys.stdin.isatty()
    if interactive:
        # Makes the prompt editable, with a history.
        import readline  # noqa: F401

        note(f"Chatting with {name}. Ctrl-C stops an answer; Ctrl-D or {_LEAVE} ends the chat.")
    while True:
        text = _turn("> " if interactive else "")
        if text is None or text.strip() == _LEAVE:
            return
        if not text.strip():
            continue
        try:
            _answer(conversation, text, json=json)
        except KeyboardInterrupt:
            if not interactive:
                raise
            click.echo()
            note("Stopped.")
        except Failure as error:
            if not interactive or error.exit_code == Exit.NO_DAEMON:
                raise
            error.show()


def _turn(prompt: str) -> str | None:
    """The next line, or ``None`` at the end of the input."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                click.echo()
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            click.echo()


def _answer(conversation: Conversation, text: str, *, json: bool) -> None:
    # Closed at once when interrupted, so that the daemon cancels the work.
    with (
        shown_loading(conversation.connection, conversation.model) as loaded,
        closing(conversation.ask(text)) as pieces,  # type: ignore[type-var] # generators close
    ):
        for piece in pieces:
            loaded()
            if not json:
                click.echo(safe(piece, lines=True), nl=False)
    if json:
        dump(conversation.messages[-1], indent=None)
    else:
        click.echo()

"""Generation requests to token ids: prompts, chat templates, the context limit."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from tursi.errors import ContextLengthExceeded, InvalidRequest
from tursi.inference.templates import limit_templates, limited
from tursi.inference.tokens import Tokenizer, clipped
from tursi.tasks import GenerateRequest, Text

_ALLOWED_ARGUMENTS = {"add_generation_prompt", "continue_final_message"}
"""Parameters of ``apply_chat_template`` itself that a request may set."""


class Prompts:
    """Turns a request into prompts that fit."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        limit_templates()
        self._tokenizer = tokenizer
        self.context = context
        """Tokens that prompt and continuation may have together."""

    def read(self, request: GenerateRequest) -> tuple[list[tuple[int, ...]], int]:
        """Token ids per prompt, and the most tokens that each continuation may have."""
        if request.messages:
            prompts = [self._chat(request)]
        else:
            prompts = [
                self._text(text, index, truncate=request.truncate)
                for index, text in enumerate(request.prompts)
            ]
        if not prompts:
            raise InvalidRequest("There is no prompt.", param="prompt")
        wanted = request.sampling.max_tokens
        if wanted is not None and wanted < 1:
            raise InvalidRequest("max_tokens must be at least 1.", param="max_tokens")
        room = self.context - (wanted or 1)
        if request.truncate and room >= 1:
            prompts = [prompt[-room:] for prompt in prompts]
        longest = max(len(prompt) for prompt in prompts)
        param = "messages" if request.messages else "prompt"
        if longest >= self.context:
            raise ContextLengthExceeded(
                f"The model's context is {self.context} tokens, but the prompt has {longest}.",
                param=param,
            )
        if longest > room:
            raise ContextLengthExceeded(
                f"The model's context is {self.context} tokens, but {longest} in the prompt and "
                f"{wanted} to generate are asked for.",
                param=param,
            )
        return prompts, wanted if wanted is not None else self.context - longest

    def _text(self, text: Text, index: int, *, truncate: bool) -> tuple[int, ...]:
        tokenizer = self._tokenizer
        if text == "":
            # Nothing to continue is a fine beginning where the model has a token for it.
            begin = tokenizer.transformers.bos_token_id
            if begin is not None:
                return (int(begin),)
        if not text:
            raise InvalidRequest(f"Prompt {index} is empty.", param="prompt")
        if isinstance(text, str):
            text = clipped(
                text, self.context, f"Prompt {index}", "prompt", truncate=truncate, end=True
            )
        return tuple(tokenizer.encode([text], param="prompt")[0].ids)

    def _chat(self, request: GenerateRequest) -> tuple[int, ...]:
        tokenizer = self._tokenizer.transformers
        if not tokenizer.chat_template:
            raise InvalidRequest(
                "The model has no chat template, so it can't chat; send a prompt to "
                "/v1/completions instead.",
                param="messages",
            )
        arguments = request.template_arguments
        own = set(inspect.signature(tokenizer.apply_chat_template).parameters)
        refused = (own - _ALLOWED_ARGUMENTS).intersection(arguments)
        if refused:
            raise InvalidRequest(
                f"{min(refused)!r} can't be an argument of the chat template.",
                param="chat_template_kwargs",
            )
        messages = [
            {"role": message.role, "content": message.content}
            | ({} if message.name is None else {"name": message.name})
            for message in request.messages
        ]
        chosen: dict[str, Any] = {"add_generation_prompt": True, **arguments}
        if chosen.get("continue_final_message"):
            chosen["add_generation_prompt"] = False
        try:
            with limited():
                text = tokenizer.apply_chat_template(messages, tokenize=False, **chosen)
        except Exception as error:  # noqa: BLE001 - a foreign program may raise anything
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {str(error)[:500]}",
                param="messages",
            ) from None
        text = clipped(
            text, self.context, "The chat", "messages", truncate=request.truncate, end=True
        )
        # The template writes its special tokens itself.
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise InvalidRequest("The messages make an empty prompt.", param="messages")
        return tuple(ids)

"""Text to token ids, with padding and truncation under our control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from tursi.errors import ContextLengthExceeded, InvalidRequest
from tursi.tasks import Text

MAX_INPUTS = 2048
"""Inputs in one request (OpenAI's own limit)."""
_MAX_CHARACTERS = 256
"""Characters per token beyond which a text is too long without counting its tokens.

Counting them takes a second per megabyte, while others wait.
"""
_NO_LIMIT = 10**9
"""transformers writes an absurd number where a tokenizer has no maximum length."""


@dataclass(slots=True)
class Tokens:
    """One tokenised input."""

    ids: Sequence[int]
    type_ids: Sequence[int] | None = None
    truncated: bool = False
    prompt: int = 0
    """How many leading tokens are a prompt that pooling leaves out."""


class Tokenizer:
    """A transformers tokenizer that never pads, and cuts only when told to.

    The tokenizer's own files may carry fixed padding or truncation (that of
    all-MiniLM pads everything to 128 tokens), so both are set here.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, limit: int | None, lower: bool) -> None:
        self.transformers = tokenizer
        self.limit = limit
        """Most tokens per input, special ones included."""
        self._vocabulary = vocabulary
        self._lower = lower
        self._types = "token_type_ids" in tokenizer.model_input_names
        self._fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.no_truncation()

    @property
    def pad_id(self) -> int:
        """What fills a batch; masked, so any token will do where the tokenizer has none."""
        pad = self.transformers.pad_token_id
        return int(pad) if pad is not None else 0

    def encode(
        self,
        inputs: Sequence[Text | tuple[str, str]],
        *,
        truncate: bool = False,
        prefix: str = "",
        param: str = "input",
    ) -> list[Tokens]:
        """Token ids of each input, special tokens added; ids that are given are kept.

        ``prefix`` is put before each text. Raises ``InvalidRequest`` for an
        empty input, for ids that the model doesn't have, and, unless
        ``truncate``, for one that is too long.
        """
        if not inputs:
            raise InvalidRequest("There is no input.", param=param)
        if len(inputs) > MAX_INPUTS:
            raise InvalidRequest(
                f"One request takes at most {MAX_INPUTS} inputs; this one has {len(inputs)}.",
                param=param,
            )
        inputs = [
            self._checked(text, index, param, truncate=truncate)
            for index, text in enumerate(inputs)
        ]
        texts = [self._prepared(text, prefix) for text in inputs if not _is_ids(text)]
        encoded = iter(self._encode(texts))
        found: list[Tokens] = []
        for index, text in enumerate(inputs):
            tokens = Tokens(text) if _is_ids(text) else next(encoded)
            if self.limit is not None and len(tokens.ids) > self.limit:
                if not truncate:
                    raise ContextLengthExceeded(
                        f"Input {index} has {len(tokens.ids)} tokens, but the model takes at most "
                        f"{self.limit}; shorten it or ask for truncation.",
                        param=param,
                    )
                tokens = self._cut(text, prefix)
            if not tokens.ids:
                raise InvalidRequest(f"Input {index} is empty.", param=param)
            found.append(tokens)
        return found

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``; special tokens are left out unless ``special``."""
        if self._fast is not None:
            return str(self._fast.decode(list(ids), skip_special_tokens=not special))
        return str(
            self.transformers.decode(
                list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def _prepared(self, text: Any, prefix: str) -> Any:
        if prefix:
            text = (prefix + text[0], text[1]) if _is_pair(text) else prefix + text
        if self._lower:
            text = (text[0].lower(), text[1].lower()) if _is_pair(text) else text.lower()
        return text

    def _encode(self, texts: list[Any]) -> list[Tokens]:
        if not texts:
            return []
        if self._fast is not None:
            return [
                Tokens(encoding.ids, encoding.type_ids if self._types else None)
                for encoding in self._fast.encode_batch_fast(texts)
            ]
        found = []
        for text in texts:
            first, second = text if _is_pair(text) else (text, None)
            encoding = self.transformers(first, second, padding=False, truncation=False)
            found.append(Tokens(encoding["input_ids"], encoding.get("token_type_ids")))
        return found

    def _cut(self, text: Text | tuple[str, str], prefix: str) -> Tokens:
        assert self.limit is not None  # noqa: S101 - only over-long inputs come here
        if _is_ids(text):
            return Tokens(text[: self.limit], truncated=True)
        first = self._prepared(text, prefix)
        pair = first if _is_pair(first) else (first, None)
        encoding = self.transformers(*pair, padding=False, truncation=True, max_length=self.limit)
        if self._fast is not None:
            # The call above has left its settings in the shared tokenizer.
            self._fast.no_truncation()
        return Tokens(encoding["input_ids"], encoding.get("token_type_ids"), truncated=True)

    def _checked(self, text: Any, index: int, param: str, *, truncate: bool) -> Any:
        """The input, if there is anything in it and it is in the model's words."""
        if not any(text) if _is_pair(text) else not text:
            raise InvalidRequest(f"Input {index} is empty.", param=param)
        if not _is_ids(text):
            if self.limit is None:
                return text
            return clipped(text, self.limit, f"Input {index}", param, truncate=truncate)
        if min(text) < 0 or max(text) >= self._vocabulary:
            raise InvalidRequest(
                f"Input {index} has a token id outside of the model's vocabulary "
                f"(0 to {self._vocabulary - 1}).",
                param=param,
            )
        return text


def clipped(
    text: Any, limit: int, what: str, param: str, *, truncate: bool, end: bool = False
) -> Any:
    """``text`` without what lies far beyond ``limit`` tokens; its ``end`` stays if that is set.

    Raises ``ContextLengthExceeded`` instead unless ``truncate``.
    """
    most = limit * _MAX_CHARACTERS
    size = sum(map(len, text)) if _is_pair(text) else len(text)
    if size <= most:
        return text
    if not truncate:
        raise ContextLengthExceeded(
            f"{what} has {size} characters, but the model takes at most {limit} tokens; "
            "shorten it or ask for truncation.",
            param=param,
        )
    if _is_pair(text):
        return (text[0][:most], text[1][:most])
    return text[-most:] if end else text[:most]


def sane_limit(*limits: Any) -> int | None:
    """The smallest of the limits that are numbers and mean it."""
    real = [int(limit) for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT]
    return min(real, default=None)


def _is_pair(text: Any) -> TypeGuard[tuple[str, str]]:
    return isinstance(text, tuple) and len(text) == 2 and isinstance(text[0], str)


def _is_ids(text: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(text, tuple) and not _is_pair(text)

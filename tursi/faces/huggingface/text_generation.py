"""Text generation in the shape of text-generation-inference and the pipeline."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tursi.errors import InvalidRequest, TursiError
from tursi.faces.body import MAX_INPUTS, NonEmpty, answer, event, finite
from tursi.faces.huggingface import errors
from tursi.faces.route import Answer, Call, decoded
from tursi.model import Usage
from tursi.tasks import (
    Choice,
    Delta,
    FinishReason,
    Generated,
    GenerateRequest,
    Sampling,
    TaskResult,
    TokenLogprob,
)

DEFAULT_MAX_NEW_TOKENS = 100
"""What InferenceClient's documentation promises."""
StopList = Annotated[list[NonEmpty], Meta(max_length=16)]


class GenerationOptions(msgspec.Struct):
    """How to continue the text; ``null`` means absent for each."""

    max_new_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    do_sample: bool | None = None
    """Absent: sample if ``temperature``, ``top_k`` or ``top_p`` is given."""
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    return_full_text: bool | None = None
    stop: StopList | None = None
    stop_sequences: StopList | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    details: bool | None = None
    truncate: bool | int | None = None
    """``true`` cuts the beginning of a prompt that is too long."""
    best_of: int | None = None
    num_return_sequences: int | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: int | None = None
    typical_p: float | None = None
    watermark: bool | None = None
    adapter_id: str | None = None
    grammar: Any = None


class GenerationBody(msgspec.Struct):
    """A request to continue a text, or each of a list."""

    inputs: NonEmpty | Annotated[list[NonEmpty], Meta(min_length=1, max_length=MAX_INPUTS)]
    parameters: GenerationOptions | None = None
    stream: bool | None = None


class GeneratedToken(msgspec.Struct):
    """One token."""

    id: int
    text: str
    logprob: float | None
    special: bool = False


class GenerationDetails(msgspec.Struct, kw_only=True):
    """How a text came about."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int | UnsetType = UNSET
    prefill: list[GeneratedToken] | UnsetType = UNSET
    tokens: list[GeneratedToken] | UnsetType = UNSET


class GeneratedText(msgspec.Struct):
    """One continued text."""

    generated_text: str
    details: GenerationDetails | UnsetType = UNSET


class GenerationEvent(msgspec.Struct):
    """One token of a stream; the last one has the whole text."""

    index: int
    token: GeneratedToken
    generated_text: str | None = None
    details: GenerationDetails | None = None


GenerationReply = list[GeneratedText | list[GeneratedText]]

_DECODER = msgspec.json.Decoder(GenerationBody)


def decode(body: bytes) -> Call:
    """Read a request to continue texts."""
    asked = decoded(_DECODER, body)
    options = asked.parameters or GenerationOptions()
    _refuse_unsupported(options)
    several = isinstance(asked.inputs, list)
    if asked.stream and several:
        raise InvalidRequest(
            "A stream continues one text; give 'inputs' as a string.", param="inputs"
        )
    request = GenerateRequest(
        prompts=tuple(asked.inputs) if isinstance(asked.inputs, list) else (asked.inputs,),
        sampling=_sampling(options),
        # Events and details name each token, which comes only with its log probability.
        logprobs=0 if asked.stream or options.details else None,
        stream=bool(asked.stream),
        truncate=bool(options.truncate),
    )
    return GenerationCall(request, options, several=several)


def _refuse_unsupported(options: GenerationOptions) -> None:
    refused = {
        "best_of": options.best_of not in (None, 1),
        "num_return_sequences": options.num_return_sequences not in (None, 1),
        "decoder_input_details": bool(options.decoder_input_details),
        "top_n_tokens": bool(options.top_n_tokens),
        "typical_p": options.typical_p not in (None, 1.0),
        "watermark": bool(options.watermark),
        "adapter_id": options.adapter_id is not None,
        "grammar": options.grammar is not None,
        "truncate": not isinstance(options.truncate, bool | None),
    }
    for field, wanted in refused.items():
        if wanted:
            raise InvalidRequest(
                f"Tursi doesn't support what the parameter {field!r} asks for; leave it out.",
                param=f"parameters.{field}",
            )


def _sampling(options: GenerationOptions) -> Sampling:
    sample = options.do_sample
    if sample is None:
        sample = any(
            value is not None for value in (options.temperature, options.top_k, options.top_p)
        )
    temperature = 1.0 if options.temperature is None else options.temperature
    return Sampling(
        max_tokens=options.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        temperature=temperature if sample else 0.0,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        frequency_penalty=options.frequency_penalty or 0.0,
        seed=options.seed,
        stop=(*(options.stop or ()), *(options.stop_sequences or ())),
    )


class GenerationCall:
    """Continued texts, whole or as a stream of tokens."""

    def __init__(
        self, request: GenerateRequest, options: GenerationOptions, *, several: bool
    ) -> None:
        self.request = request
        self.stream = request.stream
        self._several = several
        self._details = bool(options.details)
        self._prompts = request.prompts if options.return_full_text else ()
        self._text: list[str] = []
        self._count = 0
        self._last: GenerationEvent | None = None
        self._finish: FinishReason = "length"

    def whole(self, result: TaskResult) -> Answer:
        """``[{"generated_text"}]``, or a list of such lists for a list of texts."""
        assert isinstance(result, Generated)  # noqa: S101 - tells mypy what the engine returns
        found = [self._generated(choice) for choice in result.choices]
        return answer([[item] for item in found] if self._several else found)

    def _generated(self, choice: Choice) -> GeneratedText:
        text = GeneratedText(self._before(choice.index) + choice.text)
        if self._details:
            text.details = GenerationDetails(
                finish_reason=self._reason(choice.finish_reason),
                generated_tokens=len(choice.tokens),
                seed=self.request.sampling.seed,
                prefill=[],
                tokens=[_token(token, token.token) for token in choice.tokens],
            )
        return text

    def _before(self, index: int) -> str:
        # Only strings are taken as inputs here.
        return str(self._prompts[index]) if self._prompts else ""

    def _reason(self, reason: FinishReason) -> str:
        if reason == "length":
            return "length"
        # What ended it isn't told apart; a request with stop strings expects them to.
        return "stop_sequence" if self.request.sampling.stop else "eos_token"

    def opening(self) -> bytes:
        """Nothing: the first token comes first."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """An event per token.

        Clients join the texts of the tokens, so a delta's text goes whole onto
        its last token; a token that ends no character has an empty one. The
        final event waits for ``closing``, as it carries the whole text.
        """
        self._text.append(delta.text)
        tokens = [_token(token, "") for token in delta.tokens]
        if not tokens and (delta.text or delta.finish_reason):
            # Text that was held back, or an end that no token shows.
            tokens = [GeneratedToken(0, "", None, special=not delta.text)]
        if tokens:
            tokens[-1].text = delta.text
        events = [self._event(token) for token in tokens]
        if delta.finish_reason is not None:
            self._finish = delta.finish_reason
            self._last = events.pop()
        return b"".join(event(item) for item in events)

    def _event(self, token: GeneratedToken) -> GenerationEvent:
        self._count += 1
        return GenerationEvent(self._count, token)

    def closing(self, usage: Usage) -> bytes:
        """The last token, with the whole text."""
        last = self._last or self._event(GeneratedToken(0, "", None, special=True))
        last.generated_text = self._before(0) + "".join(self._text)
        if self._details:
            last.details = GenerationDetails(
                finish_reason=self._reason(self._finish),
                generated_tokens=usage.completion_tokens,
                seed=self.request.sampling.seed,
                input_length=usage.prompt_tokens,
            )
        return event(last)

    def failure(self, error: TursiError) -> bytes:
        """An error event."""
        return errors.failure(error)


def _token(token: TokenLogprob, text: str) -> GeneratedToken:
    return GeneratedToken(token.id, text, finite(token.logprob))

"""Rows of generation: one continuation each, and the request that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tursi.inference.job import Job
from tursi.inference.sampling import Sampler
from tursi.inference.transcript import Transcript
from tursi.model import Usage
from tursi.tasks import Choice, Delta, FinishReason, GenerateRequest, TokenLogprob


@dataclass(eq=False, slots=True)
class Session:
    """A request with rows that aren't all done."""

    job: Job
    request: GenerateRequest
    ends: frozenset[int]
    """Tokens that end a row and aren't shown."""
    prompt_tokens: int
    unfinished: int
    """Rows that aren't done."""
    choices: dict[int, Choice] = field(default_factory=dict)
    completion_tokens: int = 0
    ended: bool = False
    began: float | None = None
    batch_size: int = 0

    def usage(self, now: float) -> Usage:
        """What it has cost up to ``now``."""
        began = self.began
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            batch_size=self.batch_size,
            queue_seconds=max(0.0, (now if began is None else began) - self.job.arrived),
            compute_seconds=0.0 if began is None else max(0.0, now - began),
        )


@dataclass(eq=False, slots=True)
class Row:
    """One continuation of one prompt."""

    session: Session
    choice: int
    prompt: tuple[int, ...]
    limit: int
    """Most tokens to generate."""
    sampler: Sampler
    transcript: Transcript
    name: Callable[[int], str]
    """The text of a token, for log probabilities."""
    ids: list[int] = field(default_factory=list)
    """What was generated so far."""
    finished: bool = False
    _held: list[tuple[int, TokenLogprob]] = field(default_factory=list)
    """Tokens that aren't passed on yet, each with the place where its text begins."""
    _text: list[str] = field(default_factory=list)
    _tokens: list[TokenLogprob] = field(default_factory=list)

    def advance(self, best: int, logits: torch.Tensor) -> Delta:
        """Choose the next token from float32 ``logits``, whose maximum is ``best``.

        What comes of it may be nothing to show yet; a ``finish_reason`` ends the row.
        """
        request = self.session.request
        token = best if self.sampler.plain else self.sampler.choose(logits)
        self.sampler.accept(token)
        self.ids.append(token)
        self.session.completion_tokens += 1
        reason: FinishReason | None = None
        if token in self.session.ends:
            reason, text = "stop", self.transcript.finish()
        else:
            if request.logprobs is not None:
                logprob = self._logprob(token, logits, request.logprobs)
                self._held.append((self.transcript.length, logprob))
            counts = len(self.ids) >= request.sampling.min_tokens
            text = self.transcript.push(token, stops=counts)
            if len(self.ids) >= self.limit and not self.transcript.stopped:
                reason = "length"
                text += self.transcript.finish()
        if self.transcript.stopped:
            reason = "stop"
        self.finished = reason is not None
        tokens = self._release() if text or reason else ()
        if not self.session.job.call.stream:
            self._text.append(text)
            self._tokens += tokens
        return Delta(self.choice, text, tokens, reason)

    def whole(self, reason: FinishReason, prompt: str) -> Choice:
        """The finished continuation of ``prompt``."""
        return Choice(self.choice, "".join(self._text), reason, tuple(self._tokens), prompt)

    def _release(self) -> tuple[TokenLogprob, ...]:
        """The tokens to pass on: all, but for those of a stop string, which isn't shown."""
        shown, stopped = self.transcript.shown, self.transcript.stopped
        tokens = tuple(token for begins, token in self._held if begins < shown or not stopped)
        self._held = []
        return tokens

    def _logprob(self, token: int, logits: torch.Tensor, count: int) -> TokenLogprob:
        """What the model itself thought, before penalties, temperature and cuts."""
        chances = logits.log_softmax(dim=-1)
        values, places = chances.topk(min(count, len(chances)))
        top = tuple(
            TokenLogprob(self.name(id_), id_, value)
            for id_, value in zip(places.tolist(), values.tolist(), strict=True)
        )
        return TokenLogprob(self.name(token), token, float(chances[token]), top)

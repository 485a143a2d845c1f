"""Text generation: one step at a time for all rows together.

A row is one continuation. Rows join after their prompt has been read and leave
when they end; each has its own sampler, so that what it gets doesn't depend on
its neighbours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tursi.errors import InternalError, InvalidRequest, TursiError
from tursi.heartbeat import Operation, Writer
from tursi.inference.cache import Decoder, SharedCache
from tursi.inference.continuation import Row, Session
from tursi.inference.job import NOT_FINITE, Job, incident
from tursi.inference.outbox import Outbox
from tursi.inference.prompts import Prompts
from tursi.inference.sampling import Sampler, resolve
from tursi.inference.scheduler import StickyError, sticky
from tursi.inference.tokens import MAX_INPUTS, Tokenizer
from tursi.inference.transcript import Transcript
from tursi.model import Task
from tursi.tasks import (
    Delta,
    Generated,
    GenerateRequest,
    TaskRequest,
)

_PREFILL_CHUNK = 512
"""Tokens of a prompt that are read per step, so that a long one doesn't stop the others."""
_CONTEXT_TOKENS = 5
"""Tokens of the prompt that the first word of a continuation is decoded after."""
_MAX_CHOICES = 128
_MAX_LOGPROBS = 20


@dataclass(eq=False, slots=True)
class _Prefill:
    """A prompt that is being read for one or more rows."""

    rows: list[Row]
    cache: SharedCache
    done: int = 0


class Generator:
    """The engine of a causal language model."""

    task = Task.TEXT_GENERATION
    requests: tuple[type[TaskRequest], ...] = (GenerateRequest,)

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        outbox: Outbox,
        page: Writer,
        *,
        context: int,
        max_sequences: int,
        clock: Callable[[], float],
    ) -> None:
        self._decoder = Decoder(model)
        self._tokenizer = tokenizer
        self._prompts = Prompts(tokenizer, context)
        self._outbox = outbox
        self._page = page
        self._clock = clock
        self._defaults = model.generation_config
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._eos = _eos(model, tokenizer)
        self._capacity = max_sequences if self._decoder.batched else 1
        self._sessions: dict[Job, Session] = {}
        self._waiting: deque[Row] = deque()
        self._prefill: _Prefill | None = None
        self._rows: list[Row] = []
        self._cache: SharedCache | None = None

    @property
    def busy(self) -> bool:
        """Whether any row isn't done."""
        return bool(self._sessions)

    @torch.inference_mode()
    def warm(self) -> None:
        """Read one token and decode one, as a first request would."""
        cache = SharedCache(self._decoder.empty_cache(), [0])
        self._forward_one((0,), cache, 1)
        if self._decoder.batched:
            cache.lengths = [1]
            cache.step(self._decoder, [0])

    def add(self, job: Job, request: TaskRequest) -> None:
        """Queue the rows of a request."""
        assert isinstance(request, GenerateRequest)  # noqa: S101 - the scheduler has looked
        sampling = request.sampling
        if not 1 <= request.n <= _MAX_CHOICES:
            raise InvalidRequest(f"n must be between 1 and {_MAX_CHOICES}.", param="n")
        if request.logprobs is not None and not 0 <= request.logprobs <= _MAX_LOGPROBS:
            raise InvalidRequest(
                f"At most {_MAX_LOGPROBS} log probabilities per token are given.", param="logprobs"
            )
        policy = resolve(sampling, self._defaults, vocabulary=self._vocabulary, choices=request.n)
        prompts, limit = self._prompts.read(request)
        if len(prompts) * request.n > MAX_INPUTS:
            raise InvalidRequest(
                f"One request makes at most {MAX_INPUTS} continuations.", param="prompt"
            )
        ends = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else self._eos
        )
        known = frozenset(end for end in ends if 0 <= end < self._vocabulary)
        session = Session(
            job,
            request,
            ends=ends,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            unfinished=len(prompts) * request.n,
        )
        rows: list[Row] = []
        for choice in range(session.unfinished):
            prompt = prompts[choice // request.n]
            rows.append(
                Row(
                    session=session,
                    choice=choice,
                    prompt=prompt,
                    limit=limit,
                    sampler=Sampler(
                        policy,
                        prompt=prompt,
                        choice=choice,
                        ends=known,
                        device=self._decoder.device,
                    ),
                    transcript=Transcript(
                        self._tokenizer.decode,
                        sampling.stop,
                        # A chat's answer begins afresh.
                        () if request.messages else prompt[-_CONTEXT_TOKENS:],
                    ),
                    name=self._name,
                )
            )
        self._sessions[job] = session
        self._waiting += rows

    @torch.inference_mode()
    def step(self) -> None:
        """Read a piece of a waiting prompt, then give every running row its next token."""
        now = self._clock()
        for session in list(self._sessions.values()):
            error = session.job.over(now)
            if error is not None:
                self._fail(session, error)
        self._clear()
        if self._prefill is None:
            self._begin_prefill(now)
        self._guarded(self._read_prompt, self._prefill.rows if self._prefill else [])
        self._clear()
        self._guarded(self._decode, self._rows)
        self._clear()

    def _guarded(self, work: Callable[[], None], rows: Sequence[Row]) -> None:
        """Run ``work``; a defect in it costs the requests of ``rows``, not the worker."""
        if not rows:
            return
        try:
            work()
        except Exception as error:
            failure = incident(error)
            lost = self._sessions.values() if sticky(error) else [row.session for row in rows]
            for session in list(lost):
                self._fail(session, failure)
            if sticky(error):
                raise StickyError from error
            # What a failed forward has left in the cache fits no row.
            if rows is self._rows:
                self._rows, self._cache = [], None
            else:
                self._prefill = None

    def _name(self, token: int) -> str:
        return self._tokenizer.decode([token], special=True)

    def _begin_prefill(self, now: float) -> None:
        free = self._capacity - len(self._rows)
        if not self._waiting or free < 1:
            return
        first = self._waiting.popleft()
        rows = [first]
        # Choices of one prompt share the reading of it.
        while (
            len(rows) < free
            and self._waiting
            and self._waiting[0].session is first.session
            and self._waiting[0].prompt is first.prompt
        ):
            rows.append(self._waiting.popleft())
        for row in rows:
            row.session.began = now if row.session.began is None else row.session.began
        self._prefill = _Prefill(rows, SharedCache(self._decoder.empty_cache(), [0]))

    def _read_prompt(self) -> None:
        prefill = self._prefill
        assert prefill is not None  # noqa: S101 - called with its rows
        prompt = prefill.rows[0].prompt
        # Only models whose rows can share a cache are known to read in pieces.
        size = _PREFILL_CHUNK if self._decoder.batched else len(prompt)
        stop = min(prefill.done + size, len(prompt))
        self._page.begin(Operation.PREFILL)
        logits = self._forward_one(prompt[prefill.done : stop], prefill.cache, stop)
        prefill.cache.lengths = [stop]
        self._page.advance(stop - prefill.done)
        prefill.done = stop
        if stop < len(prompt):
            return
        self._prefill = None
        prefill.cache.repeat(len(prefill.rows))
        if self._cache is None:
            self._cache = prefill.cache
        else:
            self._cache.join(prefill.cache)
        self._rows += prefill.rows
        self._take(prefill.rows, logits.expand(len(prefill.rows), -1))

    def _decode(self) -> None:
        cache = self._cache
        assert cache is not None  # noqa: S101 - there are rows
        self._page.begin(Operation.DECODE)
        if self._decoder.batched:
            logits = cache.step(self._decoder, [row.ids[-1] for row in self._rows])
        else:
            row = self._rows[0]
            length = cache.lengths[0] + 1
            new = row.ids[-1:] if self._decoder.cached else [*row.prompt, *row.ids]
            logits = self._forward_one(new, cache, length)
            cache.lengths = [length]
        self._take(self._rows, logits)
        self._page.advance(len(self._rows))

    def _forward_one(self, ids: Sequence[int], cache: SharedCache, length: int) -> torch.Tensor:
        """One row's forward; ``length`` counts all of its tokens, ``ids`` the new ones."""
        device = self._decoder.device
        return self._decoder.forward(
            torch.tensor([ids], dtype=torch.long, device=device),
            cache.cache,
            None,
            torch.arange(length - len(ids), length, device=device).unsqueeze(0),
        )

    def _take(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Choose each row's next token and pass on what it makes visible."""
        values, places = logits.max(dim=-1)
        best, greedy = values.tolist(), places.tolist()
        for index, row in enumerate(rows):
            session = row.session
            if session.ended:
                # Another row of the same request has just failed.
                continue
            session.batch_size = max(session.batch_size, len(self._rows))
            if not math.isfinite(best[index]):
                # The maximum of numbers of which one is NaN is NaN.
                self._fail(session, InternalError(NOT_FINITE))
                continue
            try:
                self._emit(row, row.advance(greedy[index], logits[index]))
            except TursiError as error:
                self._fail(session, error)
            except Exception as error:  # noqa: BLE001 - a defect must cost one request, not its neighbours
                self._fail(session, incident(error))

    def _emit(self, row: Row, delta: Delta) -> None:
        """Pass on what a step has added to a row, or keep it until the request is done."""
        session, job = row.session, row.session.job
        if job.call.stream and (delta.text or delta.tokens or delta.finish_reason):
            self._outbox.stream(job, job.call.delta(delta))
        if delta.finish_reason is None:
            return
        if not job.call.stream:
            prompt = "" if session.request.messages else self._tokenizer.decode(row.prompt)
            session.choices[row.choice] = row.whole(delta.finish_reason, prompt)
        session.unfinished -= 1
        if session.unfinished == 0:
            self._finish(session)

    def _finish(self, session: Session) -> None:
        job = session.job
        usage = session.usage(self._clock())
        if job.call.stream:
            self._outbox.close(job, usage)
        else:
            choices = tuple(session.choices[index] for index in sorted(session.choices))
            answer = job.call.whole(Generated(choices, usage))
            self._outbox.answer(job, answer, usage)
        self._forget(session)

    def _fail(self, session: Session, error: TursiError) -> None:
        if session.ended:
            return
        self._outbox.fail(session.job, error, session.usage(self._clock()))
        self._forget(session)

    def _forget(self, session: Session) -> None:
        session.ended = True
        del self._sessions[session.job]

    def _clear(self) -> None:
        """Let the rows leave that are done or that nobody waits for."""
        self._waiting = deque(row for row in self._waiting if not row.session.ended)
        if self._prefill is not None:
            self._prefill.rows = [row for row in self._prefill.rows if not row.session.ended]
            if not self._prefill.rows:
                self._prefill = None
        keep = [
            index for index, row in enumerate(self._rows) if not (row.finished or row.session.ended)
        ]
        if len(keep) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in keep]
        if not keep:
            self._cache = None
        elif self._cache is not None:
            self._cache.keep(keep)


def _eos(model: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Every token that ends a text, by the generation config and by the tokenizer."""
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    own = tokenizer.transformers.eos_token_id
    return frozenset(int(id_) for id_ in [*listed, own] if id_ is not None)

"""How the next token is chosen, row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tursi.errors import InvalidRequest
from tursi.tasks import Sampling

_SEEDS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Policy:
    """``Sampling`` with every default filled in."""

    temperature: float
    """0 means greedy."""
    top_p: float
    top_k: int
    """0 means all."""
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    seed: int | None

    @property
    def plain(self) -> bool:
        """Whether the best-scored token is simply taken."""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and not self.presence_penalty
            and not self.frequency_penalty
            and not self.logit_bias
            and not self.min_tokens
        )


def resolve(sampling: Sampling, defaults: Any, *, vocabulary: int, choices: int) -> Policy:
    """Fill in what the request leaves open from the model's generation config.

    Without a word on temperature from either, tokens are chosen greedily,
    unless the request asks for something that only sampling has: a nucleus, a
    ``top_k``, several choices. Raises ``InvalidRequest`` for values out of range.
    """
    asks_for_chance = choices > 1 or any(
        value is not None for value in (sampling.top_p, sampling.top_k, sampling.min_p)
    )
    temperature = sampling.temperature
    if temperature is None:
        if getattr(defaults, "do_sample", None):
            temperature = _default(defaults, "temperature", 1.0)
        else:
            temperature = 1.0 if asks_for_chance else 0.0
    _check("temperature", temperature, 0.0, 100.0)
    top_p = _either(sampling.top_p, defaults, "top_p", 1.0)
    _check("top_p", top_p, 0.0, 1.0)
    top_k = int(_either(sampling.top_k, defaults, "top_k", 0))
    min_p = _either(sampling.min_p, defaults, "min_p", 0.0)
    _check("min_p", min_p, 0.0, 1.0)
    repetition = _either(sampling.repetition_penalty, defaults, "repetition_penalty", 1.0)
    _check("repetition_penalty", repetition, 0.01, 100.0)
    _check("presence_penalty", sampling.presence_penalty, -100.0, 100.0)
    _check("frequency_penalty", sampling.frequency_penalty, -100.0, 100.0)
    for token, bias in sampling.logit_bias.items():
        if not 0 <= token < vocabulary:
            raise InvalidRequest(
                f"logit_bias names the token {token}, but the model has tokens 0 to "
                f"{vocabulary - 1}.",
                param="logit_bias",
            )
        _check("logit_bias", bias, -1000.0, 1000.0)
    return Policy(
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=min_p,
        repetition_penalty=repetition,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        min_tokens=sampling.min_tokens,
        seed=sampling.seed,
    )


class Sampler:
    """Chooses the tokens of one row; what it chooses depends on nothing outside of the row."""

    def __init__(
        self,
        policy: Policy,
        *,
        prompt: Sequence[int],
        choice: int,
        ends: frozenset[int],
        device: torch.device,
    ) -> None:
        self._policy = policy
        self._ends = sorted(ends)
        self._device = device
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if policy.repetition_penalty != 1 else set()
        self._made = 0
        self.plain = policy.plain
        # On the processor, so that a seed means the same on every device.
        self._generator = torch.Generator()
        if policy.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((policy.seed + choice) & _SEEDS)

    def accept(self, token: int) -> None:
        """Remember the token that was taken."""
        self._made += 1
        if not self.plain:
            self._counts[token] += 1
            self._seen.add(token)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from float32 ``logits`` of shape ``(vocabulary,)``, left unchanged."""
        policy = self._policy
        scores = self._penalized(logits.clone())
        if policy.temperature == 0:
            return int(scores.argmax())
        scores /= policy.temperature
        if 0 < policy.top_k < len(scores):
            scores[scores < scores.topk(policy.top_k).values[-1]] = -math.inf
        if policy.top_p < 1:
            ordered, places = scores.sort()
            # As transformers does: drop the tail that holds 1 - top_p, never the best.
            tail = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - policy.top_p
            tail[-1] = False
            scores[places[tail]] = -math.inf
        chances = scores.softmax(dim=-1)
        if policy.min_p > 0:
            chances[chances < policy.min_p * chances.max()] = 0
        return int(torch.multinomial(chances.cpu(), 1, generator=self._generator))

    def _penalized(self, scores: torch.Tensor) -> torch.Tensor:
        policy = self._policy
        if policy.repetition_penalty != 1 and self._seen:
            seen = self._tensor(list(self._seen))
            values = scores[seen]
            penalty = policy.repetition_penalty
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)
        if (policy.presence_penalty or policy.frequency_penalty) and self._counts:
            made = self._tensor(list(self._counts))
            counts = torch.tensor(
                list(self._counts.values()), dtype=scores.dtype, device=self._device
            )
            scores[made] -= policy.presence_penalty + policy.frequency_penalty * counts
        if policy.logit_bias:
            biased = self._tensor(list(policy.logit_bias))
            scores[biased] += torch.tensor(
                list(policy.logit_bias.values()), dtype=scores.dtype, device=self._device
            )
        if self._made < policy.min_tokens and self._ends:
            scores[self._tensor(self._ends)] = -math.inf
        return scores

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._device)


def _default(defaults: Any, name: str, otherwise: float) -> float:
    value = getattr(defaults, name, None)
    return otherwise if value is None else float(value)


def _either(value: float | None, defaults: Any, name: str, otherwise: float) -> float:
    return float(value) if value is not None else _default(defaults, name, otherwise)


def _check(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN fails.
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}.", param=name)

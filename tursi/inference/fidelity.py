"""How near a changed model is to what it was: its answers to fixed texts, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tursi.inference.padding import padded
from tursi.inference.pooling import Head
from tursi.inference.tokens import Tokenizer, Tokens
from tursi.model import Task

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password?",
    "The package arrived two days late and the box was open, but the seller paid it all back.",
    "I love this film; I have seen it four times.",
    "def add(a, b):\n    return a + b",
    "Water boils at 100 degrees Celsius at sea level, and at less on top of a mountain.",
    "The contract ends on 31 March 2027 unless one of the parties renews it in writing.",
    "Wo ist der nächste Bahnhof, bitte?",
    "La réunion est reportée à jeudi prochain.",
    "shares fall as prices rise faster than the central bank had expected",
    "A list of primes: 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31.",
    (
        "Whoever reads the weights of a model once and leaves them where the kernel finds them "
        "again loads it faster the second time. That holds for small models as for large ones, "
        "and it is why a restart doesn't need the disk."
    ),
)
_MOST_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Floors:
    """The least likeness that will do, by what a model answers with."""

    cosine: float
    """Of embeddings, the mean."""
    chance: float
    """Most that the probability of any label may differ."""
    divergence: float
    """Kullback-Leibler, in nats per token, the mean."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How near it is, as a clause, and whether that will do."""

    told: str
    enough: bool


class Fidelity:
    """Remembers what the model answers now; ``likeness`` compares later.

    Text by text, so that it needs little memory and no padding.
    """

    def __init__(
        self,
        task: Task,
        model: Any,
        tokenizer: Tokenizer,
        head: Head | None,
        *,
        limit: int | None,
        advanced: Callable[[int, int], None],
    ) -> None:
        self._task = task
        self._model = model
        self._head = head
        self._pad_id = tokenizer.pad_id
        self._advanced = advanced
        most = min(limit or _MOST_TOKENS, _MOST_TOKENS)
        self._items = [
            Tokens(tokens.ids[:most], tokens.type_ids and tokens.type_ids[:most])
            for tokens in tokenizer.encode(TEXTS, truncate=True)
        ]
        self._before = self._answers()

    def likeness(self, floors: Floors) -> Likeness:
        """What the model answers now, held against what it answered at first."""
        pairs = list(zip(self._before, self._answers(), strict=True))
        count = len(pairs)
        if self._task is Task.FEATURE_EXTRACTION:
            cosines = torch.stack(
                [functional.cosine_similarity(one, other, dim=-1).min() for one, other in pairs]
            )
            mean, least = cosines.mean().item(), cosines.min().item()
            return Likeness(
                f"on {count} texts the embeddings' cosine with those of the unquantized model is "
                f"{mean:.4f} in the mean and {least:.4f} at least ({floors.cosine:g} in the mean "
                "is asked for)",
                mean >= floors.cosine,
            )
        if self._task is Task.TEXT_CLASSIFICATION:
            chances = [(_chances(one), _chances(other)) for one, other in pairs]
            largest = max((one - other).abs().max().item() for one, other in chances)
            agree = sum(one.argmax().item() == other.argmax().item() for one, other in pairs)
            return Likeness(
                f"on {agree} of {count} texts the first label is that of the unquantized model, "
                f"and probabilities differ by at most {largest:.4f} ({floors.chance:g} is allowed)",
                largest <= floors.chance,
            )
        logarithms = [(one.log_softmax(-1), other.log_softmax(-1)) for one, other in pairs]
        divergence = torch.cat(
            [(one.exp() * (one - other)).sum(-1) for one, other in logarithms]
        ).mean()
        same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
        return Likeness(
            f"on {len(same)} tokens its distributions diverge from the unquantized model's by "
            f"{divergence.item():.4f} nats in the mean ({floors.divergence:g} are allowed), and "
            f"{100 * same.float().mean().item():.0f} % of the likeliest tokens are the same",
            divergence.item() <= floors.divergence,
        )

    @torch.inference_mode()
    def _answers(self) -> Sequence[torch.Tensor]:
        found = []
        for done, tokens in enumerate(self._items):
            inputs, mask = padded([tokens], self._pad_id, self._model.device)
            output = self._model(**inputs)
            answer = self._head(output[0], mask) if self._head else output.logits[0].float()
            found.append(answer.cpu())
            self._advanced(done + 1, len(self._items))
        return found


def _chances(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) if scores.shape[-1] > 1 else scores.sigmoid()

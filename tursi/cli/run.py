"""One request to a model, whatever its task, and its answer for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import click

from tursi.cli.connection import INFERENCE_SECONDS, Connection, path
from tursi.cli.loading import shown_loading
from tursi.cli.options import as_json
from tursi.cli.terminal import dump, line, note, safe, table

_SHOWN = 8
"""Numbers of an embedding that are printed."""


@click.command()
@click.argument("name")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@as_json
@click.pass_obj
def run(connection: Connection, *, name: str, texts: tuple[str, ...], json: bool) -> None:
    """Run the model NAME on TEXT.

    Embeds, classifies, fills in the mask or continues, as the model does. An
    embedding model that gets several texts shows how similar they are.
    """
    inputs = texts[0] if len(texts) == 1 else list(texts)
    with shown_loading(connection, name):
        answer = connection.call(
            "POST", path("models", name), body={"inputs": inputs}, seconds=INFERENCE_SECONDS
        )
    cut = answer.headers.get("x-tursi-truncated")
    if cut:
        note(f"{cut} of the inputs were cut to the model's maximum length.")
    if json:
        dump(answer.body)
    else:
        show(texts, answer.body)


def show(texts: Sequence[str], answer: Any) -> None:
    """Print a pipeline's answer; its shape tells the task."""
    leaf = answer
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    if isinstance(leaf, (int, float)):
        _embeddings(texts, answer)
        return
    kind = leaf if isinstance(leaf, dict) else {}
    # Labels come in a list per text even for one text; nothing else does.
    answers = answer if len(texts) > 1 or "label" in kind else [answer]
    for text, found in zip(texts, answers, strict=False):
        if len(texts) > 1:
            line(f"{text}:")
        items = list(_leaves(found))
        if "label" in kind:
            table(("LABEL", "SCORE"), [(item["label"], _score(item)) for item in items])
        elif "sequence" in kind:
            table(
                ("WORD", "SCORE", "TEXT"),
                [(item["token_str"], _score(item), item["sequence"]) for item in items],
            )
        elif "generated_text" in kind:
            for item in items:
                click.echo(safe(item["generated_text"], lines=True))
        else:
            dump(found)


def cosine(left: Sequence[float], right: Sequence[float]) -> float:
    """The cosine of two vectors, NaN if one has no direction."""
    norms = math.hypot(*left) * math.hypot(*right)
    if not norms:
        return math.nan
    return sum(one * other for one, other in zip(left, right, strict=True)) / norms


def _embeddings(texts: Sequence[str], vectors: list[list[float]]) -> None:
    if len(texts) == 1:
        numbers = vectors[0]
        more = " ..." if len(numbers) > _SHOWN else ""
        first = " ".join(f"{number:.4f}" for number in numbers[:_SHOWN])
        line(f"{len(numbers)} dimensions: {first}{more}")
        return
    columns = range(1, len(texts) + 1)
    table(
        ("COSINE", *(str(column) for column in columns), "TEXT"),
        [
            (column, *(f"{cosine(vector, other):.4f}" for other in vectors), text)
            for column, vector, text in zip(columns, vectors, texts, strict=True)
        ],
    )


def _leaves(answer: Any) -> Iterator[Any]:
    if isinstance(answer, list):
        for each in answer:
            yield from _leaves(each)
    else:
        yield answer


def _score(item: dict[str, Any]) -> str:
    return f"{item['score']:.4f}"

"""Reads what a model's files tell of it, other than its weights.

They are somebody else's and may be broken or hostile: every read has a bound, and what
can't be understood is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tursi.errors import ModelRefused
from tursi.folder import files
from tursi.footprint import Blueprint
from tursi.hub import blueprint
from tursi.model import ModelCard, ModelFile

_MAX_JSON = 4 * 1024 * 1024
_MAX_README = 64 * 1024
_MAX_PROMPTS = 50
_MAX_LABELS = 20
_LONG = 500
_ENDLESS = 10**7
"""Tokens; tokenizers have a number beyond it where there is no limit."""
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FIELD = re.compile(r"^(license|pipeline_tag|library_name):[ \t]*(\S.*)$", re.MULTILINE)


def read(folder: Path) -> ModelCard:
    """What the model in ``folder`` is; belongs into a thread.

    Raises ``OSError`` or ``ModelRefused`` where it can't be looked at.
    """
    sizes = dict(files(folder, depth=4))
    modules = _modules(folder)
    inside = next((path for path, kind in modules if kind.endswith("Transformer")), "")
    config = _object(folder / inside / "config.json")
    try:
        plan = blueprint.read(folder)
    except (OSError, ModelRefused):
        plan = None
    sentences = _object(folder / inside / "sentence_bert_config.json")
    tokenizer = _object(folder / inside / "tokenizer_config.json")
    prompts = _object(folder / "config_sentence_transformers.json")
    readme = _readme(folder / "README.md")
    pooling, width = _pooling(folder, modules)
    architectures = config.get("architectures")
    lengths = (
        _number(sentences.get("max_seq_length")),
        _number(tokenizer.get("model_max_length")),
        plan.positions if plan else None,
    )
    return ModelCard(
        files=tuple(ModelFile(name, size) for name, size in sorted(sizes.items())),
        architecture=_text(architectures[0]) if isinstance(architectures, list) and architectures
        else None,
        parameters=plan.parameters if plan else None,
        dtype=_dtype(plan, config),
        context_length=min((each for each in lengths if each), default=None),
        dimensions=width or (plan.hidden if plan else None),
        pooling=pooling,
        normalizes=any(kind.endswith("Normalize") for _, kind in modules),
        prompts=_prompts(prompts.get("prompts")),
        default_prompt=_text(prompts.get("default_prompt_name")),
        labels=_labels(config),
        has_chat_template="chat_template" in tokenizer or "chat_template.jinja" in sizes,
        license=readme.get("license"),
        task=readme.get("pipeline_tag"),
        library=readme.get("library_name"),
    )  # fmt: skip


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Folder and kind of each module that sentence-transformers has."""
    found = _json(folder / "modules.json")
    if not isinstance(found, list):
        return []
    listed = [each for each in found[:20] if isinstance(each, dict)]
    pairs = [(str(each.get("path", "")), str(each.get("type", ""))) for each in listed]
    return [pair for pair in pairs if re.fullmatch(r"\w*", pair[0])]


def _pooling(folder: Path, modules: list[tuple[str, str]]) -> tuple[str | None, int | None]:
    """How tokens become one vector, and how long that is."""
    name, width = None, None
    for path, kind in modules:
        config = _object(folder / path / "config.json")
        if kind.endswith("Pooling"):
            modes = [mode for key, mode in _POOLINGS.items() if config.get(key) is True]
            given = config.get("pooling_mode")
            name = " and ".join(modes) or _text(given)
            one = _number(config.get("word_embedding_dimension", config.get("embedding_dimension")))
            width = one * max(1, len(modes)) if one else None
        elif kind.endswith("Dense"):
            width = _number(config.get("out_features")) or width
    return name, width


def _dtype(plan: Blueprint | None, config: Mapping[str, Any]) -> str | None:
    """What most of the weights are, by their headers, or else by the configuration."""
    if plan is not None and plan.groups:
        most = max(plan.groups, key=lambda group: group.parameters).kind
        return _DTYPES.get(most, most.lower())
    return (plan.dtype if plan else None) or _text(config.get("torch_dtype"))


def _prompts(found: object) -> dict[str, str]:
    if not isinstance(found, dict):
        return {}
    return {
        str(name)[:_LONG]: str(text)[:_LONG]
        for name, text in islice(found.items(), _MAX_PROMPTS)
        if text
    }


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    found = config.get("id2label")
    architectures = str(config.get("architectures"))
    if not isinstance(found, dict) or "Classification" not in architectures:
        return ()
    return tuple(str(each)[:_LONG] for each in islice(found.values(), _MAX_LABELS))


def _readme(path: Path) -> dict[str, str]:
    """The fields of its head that say what the model is."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_README).decode("utf-8", "replace")
    except OSError:
        return {}
    if not text.startswith("---"):
        return {}
    head = text[3:].partition("\n---")[0]
    return {name: value.strip().strip("'\"")[:_LONG] for name, value in _FIELD.findall(head)}


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> Any:
    if not path.is_file():
        # What is something else might be waited for without end.
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
        return None if len(data) > _MAX_JSON else json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < _ENDLESS else None


def _text(value: object) -> str | None:
    return value[:_LONG] if isinstance(value, str) and value else None

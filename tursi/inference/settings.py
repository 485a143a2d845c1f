"""Settings of a model's files that make libraries run code, and who allows that.

transformers has been made to run code by keys of a JSON file although it was told
to trust no remote code, so the files are looked through before it sees them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tursi.errors import ModelRefused

_HARMLESS = frozenset(
    {
        "__type", "__version__", "_attn_implementation", "_attn_implementation_autoset",
        "_class_name", "_commit_hash", "_comment", "_diffusers_version", "_experts_implementation",
        "_flash_attn_2_enabled", "_from_auto", "_from_model_config", "_from_pipeline",
        "_name_or_path", "_num_labels", "_processor_class", "_remove_final_layer_norm",
        "_valid_processor_keys", "_vocab_size",
    }
)  # fmt: skip
"""Keys beginning with an underscore that saved files have, and that name no code."""
_CODE = frozenset({"auto_map", "custom_pipelines"})
_IMPLEMENTATIONS = frozenset(
    {
        "attn_implementation", "_attn_implementation", "experts_implementation",
        "_experts_implementation",
    }
)  # fmt: skip
_BUILT_IN = re.compile(r"[a-z][a-z0-9_]*")
"""An implementation that is part of transformers; others are fetched and run."""
_DATA = frozenset({"id2label", "label2id", "added_tokens_decoder", "vocab"})
"""Their keys are words of the model, not settings."""
_DEPTH = 32


def check_settings(name: str, value: Any, known: str | None) -> None:
    """Raise ``ModelRefused`` for what in the file ``name`` could make a library run code.

    ``known`` is the class by which the installed transformers knows the model.
    """
    for path, key, setting in _settings(value, "", 0):
        if key in _CODE and setting:
            without = (
                f", or remove {key} from a copy of the model: the installed transformers has "
                f"{known} itself"
                if known
                else ""
            )
            raise ModelRefused(
                f"{name} names Python code of the model ({path}), which only runs where that is "
                f"asked for: if you trust its author, allow it by --trust-remote-code{without}."
            )
        if key in _IMPLEMENTATIONS and not _built_in(setting):
            raise ModelRefused(
                f"{name} names a kernel from elsewhere ({path}: {str(setting)[:100]!r}), which is "
                "code; remove the key, or, if you trust the model's author, allow it by "
                "--trust-remote-code."
            )
        if key.startswith("_") and key not in _HARMLESS:
            raise ModelRefused(
                f"{name} has the internal key {path[:100]!r}, by which a model can make libraries "
                "run code; remove it, or, if you trust the model's author, allow it by "
                "--trust-remote-code."
            )


def _built_in(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_built_in(each) for each in value.values())
    return value is None or (isinstance(value, str) and _BUILT_IN.fullmatch(value) is not None)


def _settings(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of every key, in objects and in lists of them."""
    if depth > _DEPTH:
        raise ModelRefused(f"The settings of the model are nested too deeply ({prefix[:100]}).")
    if isinstance(value, dict):
        for key, each in value.items():
            yield f"{prefix}{key}", key, each
            if key not in _DATA:
                yield from _settings(each, f"{prefix}{key}.", depth + 1)
    elif isinstance(value, list):
        for each in value:
            yield from _settings(each, prefix, depth + 1)

"""Which files of a repository a model needs: a pure choice from their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import msgspec

from tursi.errors import FetchError, RepositoryRefused, SafetensorsMissing
from tursi.model import Trust

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"

# A name is a path of ours as soon as it is downloaded: plain segments only.
SAFE_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*/){0,3}[A-Za-z0-9_][A-Za-z0-9_.-]*")
# sentence-transformers keeps a folder per module, numbered in order.
_CODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py")
_MODULE = re.compile(r"[0-9]+_[A-Za-z][A-Za-z0-9_]*")
_CONFIGURATION = frozenset(
    {
        "config.json",
        "generation_config.json",
        # tokenizers
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "bpe.codes",
        "spiece.model",
        "spm.model",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "tokenizer.model",
        "source.spm",
        "target.spm",
        "tekken.json",
        "normalizer.json",
        "chat_template.jinja",
        "chat_template.json",
        # images and audio
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        # sentence-transformers
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "sentence_roberta_config.json",
        "sentence_distilbert_config.json",
        "sentence_camembert_config.json",
        "sentence_albert_config.json",
        "sentence_xlm-roberta_config.json",
        "sentence_xlnet_config.json",
    }
)
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npz", ".npy")
_OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax"}
_CONVERT = "https://huggingface.co/spaces/safetensors/convert"


class Selection(NamedTuple):
    """The files to have, main weights apart: they are fetched last.

    A folder in which the main weights are complete is therefore complete.
    """

    first: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, sorted."""
        return tuple(sorted(self.first + self.weights))


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def select(
    model: str,
    names: Collection[str],
    read: Callable[[str], bytes],
    trust: Trust = Trust(),  # noqa: B008 - a frozen value
) -> Selection:
    """Choose from the ``names`` that the repository ``model`` lists.

    ``read`` gives the content of a listed file (only an index of shards is
    read). ``trust`` allows Python code, and pickle files where there is nothing
    better. Raises ``SafetensorsMissing``, ``RepositoryRefused`` or ``FetchError`` with
    a sentence that says what the repository lacks.
    """
    names = {name for name in names if SAFE_NAME.fullmatch(name)}
    first: list[str] = []
    main: tuple[str, ...] = ()
    for folder in ("", *_modules(names)):
        first += _configuration(folder, names)
        if trust.trust_remote_code:
            first += [n for n in names if n.startswith(folder) and _CODE.fullmatch(n, len(folder))]
        weights = _weights(model, folder, names, read)
        if not weights and trust.allow_pickle:
            weights = _weights(model, folder, names, read, _PICKLED, _PICKLED_INDEX)
            if folder + _PICKLED_INDEX in names:
                first.append(folder + _PICKLED_INDEX)
        if not weights:
            if folder + "config.json" in names and (
                folder == "" or any(n.startswith(folder) and n.endswith(_PICKLE) for n in names)
            ):
                raise _no_safetensors(model, folder, names)
            continue
        if main:
            first += weights
        else:
            main = weights
    if not main:
        raise _no_safetensors(model, "", names)
    if "config.json" not in names and "modules.json" not in names:
        raise FetchError(
            f"{model} has neither config.json nor modules.json, so it is no model "
            "that transformers loads."
        )
    return Selection(tuple(first), main)


def _modules(names: Collection[str]) -> Iterator[str]:
    folders = {name.partition("/")[0] for name in names if "/" in name}
    numbered = (folder for folder in folders if _MODULE.fullmatch(folder))
    for folder in sorted(numbered, key=lambda folder: int(folder.partition("_")[0])):
        yield folder + "/"


def _configuration(folder: str, names: Collection[str]) -> list[str]:
    found = [folder + name for name in _CONFIGURATION if folder + name in names]
    templates = folder + "additional_chat_templates/"
    found += [n for n in names if n.startswith(templates) and n.endswith(".jinja")]
    # transformers prefers the one file, so its index isn't needed beside it.
    if folder + WEIGHTS not in names and folder + INDEX in names:
        found.append(folder + INDEX)
    return found


def _weights(
    model: str,
    folder: str,
    names: Collection[str],
    read: Callable[[str], bytes],
    single: str = WEIGHTS,
    many: str = INDEX,
) -> tuple[str, ...]:
    if folder + single in names:
        return (folder + single,)
    index = folder + many
    if index not in names:
        return ()
    try:
        shards = msgspec.json.decode(read(index), type=_Index).weight_map.values()
    except msgspec.MsgspecError as error:
        raise SafetensorsMissing(f"{index} of {model} can't be read: {error}.") from error
    files = tuple(sorted({folder + shard for shard in shards}))
    for file in files:
        if file not in names or not file.endswith(single[single.rindex(".") :]):
            raise SafetensorsMissing(
                f"{index} of {model} names {file[:200]!r}, which isn't among its files."
            )
    return files


def _no_safetensors(model: str, folder: str, names: Collection[str]) -> FetchError:
    here = sorted(name for name in names if name.startswith(folder))
    pickles = [name for name in here if name.endswith(_PICKLE)]
    if pickles:
        return RepositoryRefused(
            f"{model} has its weights only as pickle ({pickles[0]}), which can run code when it is "
            f"loaded: choose a revision with {folder}{WEIGHTS}, have it converted at {_CONVERT}, "
            "or, if you trust its author, allow it by --allow-pickle."
        )
    for suffix, format_name in _OTHER_FORMATS.items():
        if any(name.endswith(suffix) for name in here):
            return SafetensorsMissing(
                f"{model} has its weights only in {format_name} format; "
                f"Tursi loads safetensors ({folder}{WEIGHTS})."
            )
    return SafetensorsMissing(
        f"{model} has no safetensors weights ({folder}{WEIGHTS} or {folder}{INDEX})."
    )

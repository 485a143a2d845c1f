"""What transformers reads from a checkpoint, with a sentence for each way it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from tursi.errors import (
    ArchitectureUnsupported,
    LoadError,
    ModelFilesMissing,
    ModelRefused,
    TaskUnsuitable,
    WeightsCorrupt,
)
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.weights import Shard
from tursi.model import Progress, Task

_AUTO_CLASSES: Mapping[Task, str] = {
    Task.TEXT_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.FILL_MASK: "AutoModelForMaskedLM",
    Task.TEXT_GENERATION: "AutoModelForCausalLM",
}
_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
}


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        # What torch's allocator for the processor raises.
        isinstance(error, RuntimeError)
        and ("can't allocate memory" in text or "not enough memory" in text)
    )


def read_config(checkpoint: Checkpoint) -> Any:
    """The configuration object."""
    return _read(
        "configuration",
        lambda: transformers.AutoConfig.from_pretrained(checkpoint.folder, **_local(checkpoint)),
    )


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer."""
    if not any((checkpoint.folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelFilesMissing("The model has no tokenizer (tokenizer.json or vocabulary files).")
    return _read(
        "tokenizer",
        lambda: transformers.AutoTokenizer.from_pretrained(checkpoint.folder, **_local(checkpoint)),
    )


def find_class(checkpoint: Checkpoint, task: Task, config: Any) -> Any:
    """Transformers' class for the head that ``task`` needs, with all that it imports."""
    if task is not Task.FEATURE_EXTRACTION:
        name = _AUTO_CLASSES[task]
    elif config.is_encoder_decoder:
        # Only the encoder: an embedding reads and doesn't write.
        name = "AutoModelForTextEncoding"
    else:
        name = "AutoModel"
    auto_class = getattr(transformers, name)
    if name in checkpoint.remote:
        return auto_class
    classes = auto_class._model_mapping  # noqa: SLF001 - the list behind the public class
    if type(config) not in classes:
        raise TaskUnsuitable(
            f"The model can't do {task.value}: transformers has no such head for "
            f"{config.model_type!r}."
        )
    _read("architecture", lambda: classes[type(config)])
    return auto_class


def read_model(
    checkpoint: Checkpoint,
    task: Task,
    config: Any,
    auto_class: Any,
    dtype: torch.dtype | str,
    progress: Callable[[Progress], None],
    places: Mapping[str, Any] | None = None,
) -> Any:
    """The model with the head that ``task`` needs, on the processor.

    Or, with ``places``, each module on the device that they name for it.
    """
    with _ProgressBar(checkpoint.shards, progress):
        model, report = _read(
            "weights",
            lambda: auto_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                use_safetensors=not checkpoint.pickled,
                weights_only=True,
                output_loading_info=True,
                # Not to ignore them: they are in the report, which names them.
                ignore_mismatched_sizes=True,
                **({} if places is None else {"device_map": dict(places)}),
                **_local(checkpoint),
            ),
        )
    mismatched = report["mismatched_keys"]
    if mismatched:
        key, found, wanted = min(mismatched)
        raise WeightsCorrupt(
            f"The model's weights don't fit its configuration: {key} has the shape "
            f"{tuple(found)}, not {tuple(wanted)}."
        )
    _check_keys(model, task, report["missing_keys"])
    return model


def _local(checkpoint: Checkpoint) -> dict[str, Any]:
    """What keeps transformers from the network, and from code that nobody allowed."""
    return {
        "local_files_only": True,
        "trust_remote_code": checkpoint.trust.trust_remote_code,
    }


def _read(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except LoadError:
        raise
    except ImportError as error:
        raise ArchitectureUnsupported(
            f"The model's {what} needs a Python package that isn't installed: {_line(error)}"
        ) from error
    except SafetensorError as error:
        raise WeightsCorrupt(f"The model's weights are damaged: {_line(error)}") from error
    except Exception as error:
        if out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelRefused(
                f"The model's {what} needs Python code of its own, which only runs where that is "
                "asked for: if you trust its author, allow it by --trust-remote-code."
            ) from error
        raise WeightsCorrupt(f"The model's {what} can't be read: {_line(error)}") from error


def _check_keys(model: Any, task: Task, missing: set[str]) -> None:
    """Refuse weights that transformers has filled up with random numbers."""
    # The pooler of a bare model isn't used here.
    lacking = sorted(key for key in missing if "pooler." not in key)
    if not lacking:
        return
    body = f"{model.base_model_prefix}."
    if task is not Task.FEATURE_EXTRACTION and not any(key.startswith(body) for key in lacking):
        raise TaskUnsuitable(
            f"The model can't do {task.value}: its weights lack the head for it ({lacking[0]})."
        )
    raise WeightsCorrupt(
        f"The model's weights don't fit its configuration: {len(lacking)} tensors are missing, "
        f"the first is {lacking[0]}."
    )


class _ProgressBar:
    """Takes the place of transformers' progress bar while weights are loaded."""

    def __init__(self, shards: Sequence[Shard], progress: Callable[[Progress], None]) -> None:
        self._shards = shards
        self._progress = progress
        self._previous: Any = None

    def __enter__(self) -> None:
        self._previous = transformers.utils.logging.set_tqdm_hook(self._bar)

    def __exit__(self, *_: object) -> None:
        transformers.utils.logging.set_tqdm_hook(self._previous)

    def _bar(self, factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        items = args[0] if args else kwargs.get("iterable")
        if items is None or not hasattr(items, "__len__"):
            return factory(*args, **kwargs)
        return self._by_bytes(items) if self._counts(items) else self._by_number(items)

    def _counts(self, items: Any) -> bool:
        """Whether the items are what tensors of the files become."""
        return (
            bool(self._shards)
            and all(shard.tensors for shard in self._shards)
            and all(_sources(item) is not None for item in items)
        )

    def _by_number(self, items: Any) -> Any:
        total = len(items)
        step = max(1, total // 100)
        for done, item in enumerate(items):
            if done % step == 0:
                self._progress(Progress("load", float(done), float(total), "tensors"))
            yield item
        self._progress(Progress("load", float(total), float(total), "tensors"))

    def _by_bytes(self, items: Any) -> Any:
        parts = len(self._shards)
        where = {
            name: (size, part)
            for part, shard in enumerate(self._shards, 1)
            for name, size in shard.tensors.items()
        }
        total = sum(size for size, _ in where.values())
        # Not each tensor, of which there may be tens of thousands.
        done, part, told = 0, 1, -1
        for item in items:
            if 100 * done > told * total:
                told = 100 * done // max(total, 1) + 1
                self._tell(done, total, part, parts)
            yield item
            for source in _sources(item) or ():
                size, part = where.pop(source, (0, part))
                done += size
        # Tensors that the model doesn't use are done with too.
        self._tell(total, total, parts, parts)

    def _tell(self, done: int, total: int, part: int, parts: int) -> None:
        self._progress(Progress("load", float(done), float(total), "bytes", part, parts))


def _sources(item: Any) -> list[str] | None:
    """Names of the files' tensors that make one of the model's, if ``item`` knows them."""
    match item:
        case (str(), mapping) if isinstance(getattr(mapping, "layer_targets", None), dict):
            return [source for sources in mapping.layer_targets.values() for source in sources]
    return None


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

"""From a LoadOrder to an engine that has answered a first request."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError

from tursi.errors import (
    ArchitectureUnsupported,
    LoadError,
    ModelFilesMissing,
    ModelRefused,
    OutOfMemory,
    TaskUnsuitable,
    WeightsCorrupt,
)
from tursi.inference.batcher import Batcher, Encoder
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.classification import Classifier
from tursi.inference.device import choose_device, choose_dtype
from tursi.inference.embedding import Embedder
from tursi.inference.fill_mask import MaskFiller
from tursi.inference.generation import Generator
from tursi.inference.outbox import Outbox
from tursi.inference.pooling import read_head
from tursi.inference.scheduler import Engine
from tursi.inference.tokens import Tokenizer, Tokens, sane_limit
from tursi.model import Loaded, LoadOrder, Progress, Task

_DEFAULT_CONTEXT = 4096
"""Of a decoder whose files name no limit."""
_LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_AUTO_CLASSES: Mapping[Task, str] = {
    Task.TEXT_CLASSIFICATION: "AutoModelForSequenceClassification",
    Task.FILL_MASK: "AutoModelForMaskedLM",
    Task.TEXT_GENERATION: "AutoModelForCausalLM",
}


def load(
    order: LoadOrder,
    outbox: Outbox,
    progress: Callable[[Progress], None],
    clock: Callable[[], float],
) -> tuple[Engine, Loaded]:
    """Load what is ordered; any failure is a ``LoadError`` with its sentence."""
    began = clock()
    try:
        return _load(order, outbox, progress, clock, began)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(order) from error
    except RuntimeError as error:
        # What torch's allocator for the processor raises.
        if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory(order) from error
        raise


def _load(
    order: LoadOrder,
    outbox: Outbox,
    progress: Callable[[Progress], None],
    clock: Callable[[], float],
    began: float,
) -> tuple[Engine, Loaded]:
    torch.set_num_threads(order.threads)
    progress(Progress("load"))
    checkpoint = Checkpoint(Path(order.folder))
    device = choose_device(order.device)
    dtype = choose_dtype(order.dtype)
    checkpoint.check()
    task = checkpoint.task(order.task)
    config = _read("configuration", lambda: _config(checkpoint))
    tokenizer = _read("tokenizer", lambda: _tokenizer(checkpoint))
    model = _model(checkpoint, task, config, dtype, progress).eval().requires_grad_(False)
    model.to(device)
    limit = _limit(checkpoint, config, tokenizer)
    wrapped = Tokenizer(
        tokenizer,
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        limit=None if task is Task.TEXT_GENERATION else limit,
        lower=bool(_sentence_settings(checkpoint).get("do_lower_case")),
    )
    progress(Progress("warm"))
    engine, dimensions = _engine(order, task, model, wrapped, checkpoint, limit, outbox, clock)
    loaded = Loaded(
        task=task.value,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        max_length=limit,
        dimensions=dimensions,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        load_seconds=clock() - began,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    )
    return engine, loaded


def _engine(
    order: LoadOrder,
    task: Task,
    model: Any,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    limit: int | None,
    outbox: Outbox,
    clock: Callable[[], float],
) -> tuple[Engine, int | None]:
    """The engine, warmed up, and the number of dimensions of an embedder."""
    if task is Task.TEXT_GENERATION:
        generator = Generator(
            model,
            tokenizer,
            outbox,
            context=limit or _DEFAULT_CONTEXT,
            max_sequences=order.max_sequences,
            clock=clock,
        )
        generator.warm()
        return generator, None
    encoder: Encoder
    dimensions = None
    budget = order.max_batch_tokens
    if task is Task.FEATURE_EXTRACTION:
        settings = checkpoint.json("config_sentence_transformers.json")
        prompts = settings.get("prompts")
        encoder = Embedder(
            model,
            tokenizer,
            read_head(checkpoint, model.device),
            prompts=prompts if isinstance(prompts, dict) else {},
            default_prompt=settings.get("default_prompt_name"),
            max_batch_tokens=budget,
        )
        dimensions = encoder.dimensions()
    elif task is Task.TEXT_CLASSIFICATION:
        encoder = Classifier(model, tokenizer, max_batch_tokens=budget)
    else:
        encoder = MaskFiller(model, tokenizer, max_batch_tokens=budget)
    # Kernels are chosen and memory is taken on the first computations.
    for length in (1, min(32, limit or 32)):
        encoder.compute([Tokens([tokenizer.pad_id] * length)] * 2)
    return Batcher(encoder, outbox, clock), dimensions


def _read(what: str, action: Callable[[], Any]) -> Any:
    """Run ``action``, which reads a part of the checkpoint; its errors get a sentence."""
    try:
        return action()
    except (LoadError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise ArchitectureUnsupported(
            f"The model's {what} needs a Python package that isn't installed: {_line(error)}"
        ) from error
    except SafetensorError as error:
        raise WeightsCorrupt(f"The model's weights are damaged: {_line(error)}") from error
    except Exception as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelRefused(
                f"The model's {what} needs Python code from its own folder, which Tursi "
                "doesn't run."
            ) from error
        if "can't allocate memory" in text or "not enough memory" in text:
            raise
        raise WeightsCorrupt(f"The model's {what} can't be read: {_line(error)}") from error


def _config(checkpoint: Checkpoint) -> Any:
    return transformers.AutoConfig.from_pretrained(checkpoint.folder, **_LOCAL)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
    files = [path for path in checkpoint.folder.iterdir() if path.is_file()]
    known = {*names, "sentencepiece.bpe.model", "tokenizer_config.json", "tekken.json"}
    if not any(path.name in known for path in files):
        raise ModelFilesMissing(
            f"{checkpoint.folder} has no tokenizer (tokenizer.json or vocabulary files)."
        )
    return transformers.AutoTokenizer.from_pretrained(checkpoint.folder, **_LOCAL)


def _model(
    checkpoint: Checkpoint,
    task: Task,
    config: Any,
    dtype: torch.dtype | str,
    progress: Callable[[Progress], None],
) -> Any:
    if task is not Task.FEATURE_EXTRACTION:
        name = _AUTO_CLASSES[task]
    elif config.is_encoder_decoder:
        # Only the encoder: an embedding reads and doesn't write.
        name = "AutoModelForTextEncoding"
    else:
        name = "AutoModel"
    auto_class = getattr(transformers, name)
    if type(config) not in auto_class._model_mapping:  # noqa: SLF001 - the list behind the public class
        raise TaskUnsuitable(
            f"The model can't do {task.value}: transformers has no such head for "
            f"{config.model_type!r}."
        )
    with _ProgressBar(progress):
        model, report = _read(
            "weights",
            lambda: auto_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                # Not to ignore them: they are in the report, which names them.
                ignore_mismatched_sizes=True,
                **_LOCAL,
            ),
        )
    mismatched = report["mismatched_keys"]
    if mismatched:
        name, found, wanted = min(mismatched)
        raise WeightsCorrupt(
            f"The model's weights don't fit its configuration: {name} has the shape "
            f"{tuple(found)}, not {tuple(wanted)}."
        )
    _check_keys(model, task, report["missing_keys"])
    return model


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


def _limit(checkpoint: Checkpoint, config: Any, tokenizer: Any) -> int | None:
    """Most tokens of one input, from whichever of the model's files says least."""
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and type(config).__name__ in _OFFSET_POSITIONS:
        positions -= int(text.pad_token_id or 0) + 1
    own = _sentence_settings(checkpoint).get("max_seq_length")
    return sane_limit(own, positions, tokenizer.model_max_length)


_OFFSET_POSITIONS = frozenset(
    f"{name}Config" for name in ("Roberta", "XLMRoberta", "Camembert", "MPNet", "Longformer")
)
"""Models whose positions begin after the padding token's id."""


def _sentence_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json"):
        path = os.path.relpath(checkpoint.folder / name, checkpoint.root)
        settings = checkpoint.json(path)
        if settings:
            return settings
    return {}


class _ProgressBar:
    """Takes the place of transformers' progress bar while weights are loaded."""

    def __init__(self, progress: Callable[[Progress], None]) -> None:
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
        return self._reported(items)

    def _reported(self, items: Any) -> Any:
        total = len(items)
        step = max(1, total // 100)
        for done, item in enumerate(items):
            if done % step == 0:
                self._progress(Progress("load", float(done), float(total), "tensors"))
            yield item
        self._progress(Progress("load", float(total), float(total), "tensors"))


def _out_of_memory(order: LoadOrder) -> OutOfMemory:
    return OutOfMemory(
        f"There isn't enough memory on {order.device} to load the model; free some, or use a "
        "smaller model or dtype."
    )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]

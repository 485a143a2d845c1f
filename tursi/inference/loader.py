"""From a LoadOrder to an engine that has answered a first request."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from tursi.errors import OutOfMemory
from tursi.heartbeat import Writer
from tursi.inference import quantization
from tursi.inference.batcher import Batcher, Encoder
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.classification import Classifier
from tursi.inference.device import (
    choose_dtype,
    explain_attention,
    explain_device,
    explain_dtype,
    torch_dtype,
)
from tursi.inference.embedding import Embedder
from tursi.inference.fidelity import Fidelity
from tursi.inference.fill_mask import MaskFiller
from tursi.inference.generation import Generator
from tursi.inference.memory import Meter
from tursi.inference.outbox import Outbox
from tursi.inference.pooling import read_head
from tursi.inference.pretrained import (
    find_class,
    out_of_memory,
    read_config,
    read_model,
    read_tokenizer,
)
from tursi.inference.readahead import Readahead
from tursi.inference.scheduler import Engine
from tursi.inference.split import free_memory, split
from tursi.inference.tokens import Tokenizer, Tokens, sane_limit
from tursi.model import Loaded, LoadOrder, Progress, Task, Trust

_POLL_SECONDS = 0.1
_DEFAULT_CONTEXT = 4096
"""Of a decoder whose files name no limit."""
_OFFSET_POSITIONS = frozenset(
    f"{name}Config" for name in ("Roberta", "XLMRoberta", "Camembert", "MPNet", "Longformer")
)
"""Models whose positions begin after the padding token's id."""


def load(
    order: LoadOrder,
    outbox: Outbox,
    page: Writer,
    progress: Callable[[Progress], None],
    clock: Callable[[], float],
    readahead: Readahead | None = None,
) -> tuple[Engine, Loaded]:
    """Load what is ordered; what can be foreseen to fail is a ``LoadError`` with its sentence."""
    try:
        return _load(order, outbox, page, progress, clock, readahead)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise OutOfMemory(
            f"There isn't enough memory to load the model (device {order.device}); free some, or "
            "use a smaller model or dtype."
        ) from error


def _load(
    order: LoadOrder,
    outbox: Outbox,
    page: Writer,
    progress: Callable[[Progress], None],
    clock: Callable[[], float],
    readahead: Readahead | None,
) -> tuple[Engine, Loaded]:
    began = clock()
    torch.set_num_threads(order.threads)
    progress(Progress("load"))
    checkpoint = Checkpoint(Path(order.folder), Trust(order.allow_pickle, order.trust_remote_code))
    choice = explain_device(order.device, order.device_because)
    dtype = choose_dtype(order.dtype)
    checkpoint.check()
    task = checkpoint.task(order.task)
    config = read_config(checkpoint)
    quantization.check(order.quantization, config, choice.devices)
    tokenizer = read_tokenizer(checkpoint)
    auto_class = find_class(checkpoint, task, config)
    places = None
    if len(choice.devices) > 1:
        computes_in = torch_dtype(dtype, checkpoint.named_dtype, checkpoint.stored_dtype)
        places = split(auto_class, config, computes_in, free_memory(choice.devices))
    _await(readahead, progress)
    model = read_model(checkpoint, task, config, auto_class, dtype, progress, places)
    model.eval().requires_grad_(False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = checkpoint.json("sentence_bert_config.json", inside=True)
    if task is Task.TEXT_GENERATION:
        limit: int | None = _context(config, tokenizer)
        wrapped = _tokenizer(model, tokenizer, None)
    else:
        limit = _limit(config, tokenizer, settings)
        wrapped = _tokenizer(model, tokenizer, limit, lower=bool(settings.get("do_lower_case")))
    choices = {
        "device": choice.why,
        "dtype": explain_dtype(
            order.dtype, model.dtype, checkpoint.named_dtype, checkpoint.stored_dtype
        ),
        "attention": explain_attention(model),
        "quantization": _quantize(
            order.quantization, task, model, wrapped, limit, checkpoint, choice.first, progress
        ),
    }
    if places is None:
        model.to(choice.first)
    meter = Meter()
    meter.loaded()
    progress(Progress("warm"))
    engine: Engine
    dimensions = None
    if task is Task.TEXT_GENERATION:
        assert limit is not None  # noqa: S101 - a context always has a length
        generator = Generator(
            model,
            wrapped,
            outbox,
            page,
            context=limit,
            max_sequences=order.max_sequences,
            clock=clock,
        )
        generator.warm()
        engine = generator
    else:
        encoder = _encoder(order, task, model, wrapped, checkpoint)
        # Kernels are chosen and memory is taken on the first computations.
        for length in (1, min(32, limit or 32)):
            encoder.compute([Tokens([wrapped.pad_id] * length)] * 2)
        if isinstance(encoder, Embedder):
            dimensions = encoder.dimensions()
        engine = Batcher(encoder, outbox, page, clock)
    meter.warm()
    loaded = Loaded(
        task=task.value,
        device=str(model.device if places is None else choice),
        dtype=str(model.dtype).removeprefix("torch."),
        max_length=limit,
        dimensions=dimensions,
        parameters=parameters,
        load_seconds=clock() - began,
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        choices=choices,
        host=meter.host,
        gpus=meter.gpus,
    )
    return engine, loaded


def _await(readahead: Readahead | None, progress: Callable[[Progress], None]) -> None:
    """Wait until the weights are in the page cache, and tell whenever that has come further."""
    told = 0
    while readahead is not None and readahead.is_alive():
        if readahead.done > told:
            told = readahead.done
            progress(readahead.progress())
        readahead.join(_POLL_SECONDS)


def _quantize(
    wanted: str,
    task: Task,
    model: Any,
    tokenizer: Tokenizer,
    limit: int | None,
    checkpoint: Checkpoint,
    device: torch.device,
    progress: Callable[[Progress], None],
) -> str:
    """Make the weights smaller, if that is wanted, and say what was done and why."""
    if wanted == quantization.NONE:
        return quantization.explain_none(model.config)
    fidelity = None
    if device.type == "cpu":
        # On a GPU the unquantized model may not fit, which is why it is quantized.
        head = read_head(checkpoint, device) if task is Task.FEATURE_EXTRACTION else None
        fidelity = Fidelity(
            task,
            model,
            tokenizer,
            head,
            limit=limit,
            advanced=lambda done, total: progress(
                Progress("measure", float(done), float(total), "texts")
            ),
        )
    return quantization.quantize(
        wanted,
        model,
        device,
        fidelity,
        lambda done, total: progress(Progress("quantize", float(done), float(total), "layers")),
    )


def _encoder(
    order: LoadOrder, task: Task, model: Any, tokenizer: Tokenizer, checkpoint: Checkpoint
) -> Encoder:
    budget = order.max_batch_tokens
    if task is Task.TEXT_CLASSIFICATION:
        return Classifier(model, tokenizer, max_batch_tokens=budget)
    if task is Task.FILL_MASK:
        return MaskFiller(model, tokenizer, max_batch_tokens=budget)
    settings = checkpoint.json("config_sentence_transformers.json")
    prompts = settings.get("prompts")
    return Embedder(
        model,
        tokenizer,
        read_head(checkpoint, model.device),
        prompts=prompts if isinstance(prompts, dict) else {},
        default_prompt=settings.get("default_prompt_name"),
        max_batch_tokens=budget,
    )


def _tokenizer(model: Any, tokenizer: Any, limit: int | None, *, lower: bool = False) -> Tokenizer:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return Tokenizer(tokenizer, vocabulary=vocabulary, limit=limit, lower=lower)


def _limit(config: Any, tokenizer: Any, settings: dict[str, Any]) -> int | None:
    """Most tokens of one input, by whichever of the model's files says least."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and type(config).__name__ in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id or 0) + 1
    return sane_limit(settings.get("max_seq_length"), positions, tokenizer.model_max_length)


def _context(config: Any, tokenizer: Any) -> int:
    """Tokens that a decoder can look back on; its tokenizer often knows less well."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return sane_limit(positions) or sane_limit(tokenizer.model_max_length) or _DEFAULT_CONTEXT

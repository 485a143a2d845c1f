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
from tursi.inference.batcher import Batcher, Encoder
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.classification import Classifier
from tursi.inference.device import choose_device, choose_dtype
from tursi.inference.embedding import Embedder
from tursi.inference.fill_mask import MaskFiller
from tursi.inference.generation import Generator
from tursi.inference.memory import Meter
from tursi.inference.outbox import Outbox
from tursi.inference.pooling import read_head
from tursi.inference.pretrained import out_of_memory, read_config, read_model, read_tokenizer
from tursi.inference.scheduler import Engine
from tursi.inference.tokens import Tokenizer, Tokens, sane_limit
from tursi.model import Loaded, LoadOrder, Progress, Task, Trust

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
) -> tuple[Engine, Loaded]:
    """Load what is ordered; what can be foreseen to fail is a ``LoadError`` with its sentence."""
    try:
        return _load(order, outbox, page, progress, clock)
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
) -> tuple[Engine, Loaded]:
    began = clock()
    torch.set_num_threads(order.threads)
    progress(Progress("load"))
    checkpoint = Checkpoint(Path(order.folder), Trust(order.allow_pickle, order.trust_remote_code))
    device = choose_device(order.device)
    dtype = choose_dtype(order.dtype)
    checkpoint.check()
    task = checkpoint.task(order.task)
    config = read_config(checkpoint)
    tokenizer = read_tokenizer(checkpoint)
    model = read_model(checkpoint, task, config, dtype, progress)
    model.eval().requires_grad_(False).to(device)
    meter = Meter()
    meter.loaded()
    progress(Progress("warm"))
    engine: Engine
    limit: int | None
    dimensions = None
    if task is Task.TEXT_GENERATION:
        limit = context = _context(config, tokenizer)
        generator = Generator(
            model,
            _tokenizer(model, tokenizer, None),
            outbox,
            page,
            context=context,
            max_sequences=order.max_sequences,
            clock=clock,
        )
        generator.warm()
        engine = generator
    else:
        settings = checkpoint.json("sentence_bert_config.json", inside=True)
        limit = _limit(config, tokenizer, settings)
        wrapped = _tokenizer(model, tokenizer, limit, lower=bool(settings.get("do_lower_case")))
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
        host=meter.host,
        gpus=meter.gpus,
    )
    return engine, loaded


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

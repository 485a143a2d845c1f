"""Builders of tiny models with random weights, saved as folders that look like real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "a worker answers what the daemon asks",
    "hello world, how are you today?",
    "paris is the capital of france",
)
"""What the tokenizers are trained on."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as most decoders have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def chat(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, context: int = 256) -> Path:
    """A Llama that can chat (about 100,000 parameters)."""
    tokenizer = byte_level_tokenizer(chat_template)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_decoder(tokenizer, context)))
    return _save(folder, model, tokenizer)


def sliding_window(folder: Path, *, window: int = 8) -> Path:
    """A Mistral whose layers see only the last ``window`` tokens."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = MistralConfig(**_decoder(tokenizer, 256), sliding_window=window)
    return _save(folder, MistralForCausalLM(config), tokenizer)


def classifier(folder: Path) -> Path:
    """A BERT with two labels."""
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        **_encoder(tokenizer),
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    return _save(folder, BertForSequenceClassification(config), tokenizer)


def multi_label(folder: Path) -> Path:
    """A BERT whose three labels don't exclude each other."""
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        **_encoder(tokenizer),
        id2label={0: "spam", 1: "rude", 2: "fun"},
        label2id={"spam": 0, "rude": 1, "fun": 2},
        problem_type="multi_label_classification",
    )
    return _save(folder, BertForSequenceClassification(config), tokenizer)


def fill_mask(folder: Path) -> Path:
    """A BERT with a masked-language head."""
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(0)
    return _save(folder, BertForMaskedLM(BertConfig(**_encoder(tokenizer))), tokenizer)


def bare(folder: Path) -> Path:
    """A BERT without any head and without sentence-transformers files."""
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(0)
    return _save(folder, BertModel(BertConfig(**_encoder(tokenizer))), tokenizer)


def sentence(
    folder: Path,
    *,
    pooling: dict[str, Any] | None = None,
    normalize: bool = False,
    dense: tuple[torch.Tensor, torch.Tensor] | None = None,
    settings: dict[str, Any] | None = None,
    max_length: int = 32,
) -> Path:
    """A sentence-transformers model around ``bare``; ``dense`` is a weight and a bias."""
    from safetensors.torch import save_file

    bare(folder)
    modules = ["Transformer", "Pooling"]
    _write(
        folder / "1_Pooling/config.json",
        {"word_embedding_dimension": 32} | (pooling or {"pooling_mode_mean_tokens": True}),
    )
    if dense is not None:
        weight, bias = dense
        config = {
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        _write(folder / f"{len(modules)}_Dense/config.json", config)
        save_file(
            {"linear.weight": weight, "linear.bias": bias},
            folder / f"{len(modules)}_Dense/model.safetensors",
        )
        modules.append("Dense")
    if normalize:
        modules.append("Normalize")
    _write(
        folder / "modules.json",
        [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{name}" if index else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for index, name in enumerate(modules)
        ],
    )
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": max_length, "do_lower_case": False},
    )
    _write(folder / "config_sentence_transformers.json", settings or {})
    return folder


# -- models that can't be loaded ----------------------------------------------------


def without_config(folder: Path) -> Path:
    """No ``config.json``."""
    bare(folder)
    (folder / "config.json").unlink()
    return folder


def without_weights(folder: Path) -> Path:
    """No weights at all."""
    bare(folder)
    (folder / "model.safetensors").unlink()
    return folder


def without_tokenizer(folder: Path) -> Path:
    """No tokenizer."""
    bare(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def cut_short(folder: Path) -> Path:
    """Weights of which the second half is missing."""
    bare(folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    return folder


def garbage(folder: Path) -> Path:
    """Weights that are no safetensors file."""
    bare(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    return folder


def git_lfs_pointer(folder: Path) -> Path:
    """A clone without its large files."""
    bare(folder)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "model.safetensors").write_bytes(pointer)
    return folder


def other_shapes(folder: Path) -> Path:
    """A configuration that the weights don't fit."""
    return _configured(bare(folder), hidden_size=64, intermediate_size=128)


def other_depth(folder: Path) -> Path:
    """A configuration with more layers than the weights have."""
    return _configured(bare(folder), num_hidden_layers=3)


def only_pickle(folder: Path) -> Path:
    """Weights only as a pickle file."""
    bare(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def unknown_architecture(folder: Path) -> Path:
    """An architecture that no transformers has."""
    return _configured(bare(folder), model_type="tursibert", architectures=["TursiBertModel"])


def remote_code(folder: Path) -> Path:
    """An architecture that comes as Python code in the model's folder."""
    return _configured(
        bare(folder),
        model_type="tursibert",
        architectures=["TursiBertModel"],
        auto_map={"AutoModel": "modeling_tursibert.TursiBertModel"},
    )


def missing_shard(folder: Path) -> Path:
    """An index that names a file that isn't there."""
    bare(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    _write(
        folder / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}},
    )
    return folder


def copy(source: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a built model with something changed."""
    shutil.copytree(source, folder)
    change(folder)
    return folder


def _decoder(tokenizer: PreTrainedTokenizerFast, context: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        # Larger than usual, so that random weights have opinions.
        "initializer_range": 0.4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _encoder(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _configured(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    _write(path, json.loads(path.read_text(encoding="utf-8")) | changes)
    return folder


def _write(path: Path, value: dict[str, Any] | Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")

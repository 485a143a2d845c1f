"""What a model's files tell of it, whatever is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from minilm import minilm_folder

from tursi.hub import card
from tursi.model import ModelCard, ModelFile


def folder(path: Path, **files: Any) -> Path:
    """A folder with these files, as JSON unless they are bytes."""
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_json", ".json").replace("_md", ".md")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_a_model_as_it_is() -> None:
    found = card.read(minilm_folder())
    assert (found.architecture, found.parameters, found.dtype) == ("BertModel", 22713728, "float32")
    assert (found.context_length, found.dimensions) == (256, 384)
    assert (found.pooling, found.normalizes) == ("mean", True)
    assert (found.license, found.task) == ("apache-2.0", "sentence-similarity")
    assert found.library == "sentence-transformers"
    assert ModelFile("model.safetensors", 90868376) in found.files
    assert not found.has_chat_template


def test_prompts_labels_and_layers_are_told(tmp_path: Path) -> None:
    found = card.read(
        folder(
            tmp_path,
            config_json={
                "architectures": ["XForSequenceClassification"],
                "id2label": {"0": "good", "1": "bad"},
                "max_position_embeddings": 512,
                "hidden_size": 8,
            },
            modules_json=[
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            ],
            **{"1_Pooling__config_json": {
                "word_embedding_dimension": 8,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": True,
            }},
            **{"2_Dense__config_json": {"in_features": 16, "out_features": 4}},
            config_sentence_transformers_json={
                "prompts": {"query": "query: ", "none": ""}, "default_prompt_name": "query",
            },
            tokenizer_config_json={"model_max_length": 10**30, "chat_template": "{{ x }}"},
            README_md=b"---\nlicense: 'mit'\npipeline_tag: text-ranking\n---\nlicense: other\n",
        )
    )  # fmt: skip
    assert found.labels == ("good", "bad")
    assert (found.pooling, found.dimensions, found.normalizes) == ("cls and mean", 4, False)
    assert (found.prompts, found.default_prompt) == ({"query": "query: "}, "query")
    assert (found.context_length, found.has_chat_template) == (512, True)
    assert (found.license, found.task, found.library) == ("mit", "text-ranking", None)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[" * 100_000, b"\xff", b"[]", b"7", b'{"architectures": [[]]}', b'"x"',
     b'{"architectures": 5, "id2label": 5, "torch_dtype": 5, "model_max_length": "x"}',
     b'[{"path": "../../etc", "type": 7}, 5]', b'{"prompts": [1], "default_prompt_name": {}}'],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_files_that_make_no_sense_tell_nothing(content: bytes, tmp_path: Path) -> None:
    names = ("config_json", "modules_json", "tokenizer_config_json", "sentence_bert_config_json")
    more = ("config_sentence_transformers_json", "README_md", "1_Pooling__config_json")
    found = card.read(folder(tmp_path, **dict.fromkeys((*names, *more), content)))
    assert len(found.files) == 7
    assert found == ModelCard(files=found.files)


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder(tmp_path, README_md=b"---\nlicense: mit\n---\n" + b"x" * (1 << 20))
    (tmp_path / "config.json").write_bytes(b'{"architectures": ["X"]}' + b" " * (5 << 20))
    found = card.read(tmp_path)
    assert (found.license, found.architecture) == ("mit", None)

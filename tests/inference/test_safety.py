"""Models that would run code: refused by their content, on real worker processes too."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import msgspec
import pytest
import torch
from worker_process import worker_process

from tursi.errors import LoadError, ModelFilesMissing, ModelRefused, WeightsCorrupt
from tursi.folder import disguise
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.settings import check_settings
from tursi.inference.weights import check_weights
from tursi.model import LoadOrder, Trust
from tursi.wire import Kind, LastWords


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._canary,))


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return file.getvalue()


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c\x00\x04"
DISGUISES: dict[str, Callable[[Path], bytes]] = {
    "protocol 0": lambda canary: pickle.dumps(Touch(canary), 0),
    "protocol 2": lambda canary: pickle.dumps(Touch(canary), 2),
    "protocol 5": lambda canary: pickle.dumps(Touch(canary), 5),
    "zip": lambda canary: zipped(pickle.dumps(Touch(canary))),
    "torch.save": lambda canary: saved(Touch(canary)),
    "7z": lambda canary: SEVEN_ZIP + pickle.dumps(Touch(canary)),
    "gzip": lambda canary: gzip.compress(pickle.dumps(Touch(canary))),
}


# -- on real worker processes --------------------------------------------------------


def refused(folder: Path, canary: Path, **order: Any) -> str:
    """What a worker says that refuses the model; it has run nothing of it."""
    with worker_process(folder.parent / "log") as process:
        process.send(Kind.LOAD, 0, msgspec.msgpack.encode(LoadOrder("test", str(folder), **order)))
        process.until(lambda: bool(process.of(Kind.FAILED) or process.of(Kind.READY)))
        (failed,) = process.of(Kind.FAILED)
        assert process.status() == 77
    assert not canary.exists()
    words = msgspec.msgpack.decode(failed.body, type=LastWords)
    assert words.code == "model_refused"
    assert str(folder) not in words.message
    return words.message


def code_of_its_own(folder: Path, canary: Path) -> Path:
    """A BERT by code in its folder, which tells that it runs."""
    models.bare(folder)
    (folder / "modeling_own.py").write_text(
        f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    changed(
        folder / "config.json",
        model_type="own",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
    )
    return folder


def changed(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(value | changes), "utf-8")


def test_a_pickle_by_the_name_of_safetensors(tmp_path: Path) -> None:
    folder, canary = models.bare(tmp_path / "model"), tmp_path / "canary"
    (folder / "model.safetensors").write_bytes(saved(Touch(canary)))
    message = refused(folder, canary, allow_pickle=True)
    assert "model.safetensors is no safetensors file but a zip archive" in message


def test_only_a_pickle(tmp_path: Path) -> None:
    folder, canary = models.bare(tmp_path / "model"), tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(saved(Touch(canary)))
    assert "--allow-pickle" in refused(folder, canary)


def test_code_of_its_own_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = code_of_its_own(tmp_path / "model", canary)
    message = refused(folder, canary)
    assert "config.json names Python code of the model (auto_map)" in message
    assert "--trust-remote-code" in message
    with worker_process(tmp_path / "log") as process:
        loaded = process.load(folder, device="cpu", trust_remote_code=True)
    assert loaded.task == "feature-extraction"
    assert canary.exists()


def test_pickled_weights_are_loaded_where_it_is_allowed_and_code_in_them_is_not(
    tmp_path: Path,
) -> None:
    folder, canary = models.bare(tmp_path / "model"), tmp_path / "canary"
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with worker_process(tmp_path / "log") as process:
        assert process.load(folder, device="cpu", allow_pickle=True).dimensions == 32
    torch.save({**weights, "evil": Touch(canary)}, folder / "pytorch_model.bin")
    with worker_process(tmp_path / "log") as process:
        order = LoadOrder("test", str(folder), device="cpu", allow_pickle=True)
        process.send(Kind.LOAD, 0, msgspec.msgpack.encode(order))
        process.until(lambda: bool(process.of(Kind.FAILED) or process.of(Kind.READY)))
        assert process.of(Kind.FAILED)
        assert process.status() in {65, 77}
    assert not canary.exists()


def test_a_template_bomb_costs_its_request_and_not_the_worker(tmp_path: Path) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    folder = models.chat(tmp_path / "model", chat_template=loop)
    with worker_process(tmp_path / "log") as process:
        process.load(folder, device="cpu")
        messages = [{"role": "user", "content": "hello"}]
        process.ask(1, "openai.chat", {"model": "m", "messages": messages, "max_tokens": 2})
        head, body, _ = process.answer(1)
        assert head is not None
        assert head.status == 400
        assert b"processor time" in body
        process.ask(2, "openai.completions", {"model": "m", "prompt": "hello", "max_tokens": 2})
        head, _, _ = process.answer(2)
        assert head is not None
        assert head.status == 200


# -- by content ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISGUISES)
def test_what_weights_really_are(tmp_path: Path, kind: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.safetensors"
    path.write_bytes(DISGUISES[kind](canary))
    with pytest.raises(ModelRefused, match="is no safetensors file but"):
        check_weights(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "spiece.model", "sub/x.json"])
@pytest.mark.parametrize("kind", DISGUISES)
def test_no_pickle_hides_among_the_files_that_are_read(
    tmp_path: Path, name: str, kind: str
) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    (folder / name).parent.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / name).write_bytes(DISGUISES[kind](canary))
    with pytest.raises(ModelRefused, match="isn't what its name says"):
        Checkpoint(folder).check()
    assert not canary.exists()


def test_pickles_that_are_never_read_do_not_matter(tmp_path: Path) -> None:
    folder = models.bare(tmp_path / "model")
    for name in ("training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
    Checkpoint(folder).check()
    assert not (tmp_path / "canary").exists()


def header(value: object, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def tensor(begin: object, end: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        header({}, length=2**63),
        header({}, length=100_000_001),
        header({}, length=3),
        header(b"[" * 100_000),
        header(b"\xff\xff"),
        header([]),
        header(tensor(0, 8)) + b"\0" * 4,
        header(tensor(-4, 0)) + b"\0" * 4,
        header(tensor(4, 0)) + b"\0" * 4,
        header(tensor("0", "4")) + b"\0" * 4,
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4,
    ],
)
def test_a_header_that_does_not_fit_the_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsCorrupt, match="is damaged"):
        check_weights(path)


def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    space = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = struct.pack("<Q", 0x0280) + space.ljust(0x0280) + b"\0" * 4
    assert data[:2] == b"\x80\x02"
    assert disguise(data) is None
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    check_weights(path)


def test_an_index_of_safetensors_names_no_pickles(tmp_path: Path) -> None:
    folder = models.missing_shard(tmp_path / "model")
    index = {"weight_map": {"a": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
    for trust in (Trust(), Trust(allow_pickle=True)):
        with pytest.raises(ModelRefused, match="isn't a file of safetensors"):
            Checkpoint(folder, trust).check()


# -- settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, r"\(auto_map\), .* --trust-remote-code"),
        ({"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, r"\(text_config.auto_map\)"),
        ({"parts": [{"auto_map": ["x.Y"]}]}, "auto_map"),
        ({"custom_pipelines": {"mine": {"impl": "x.Y"}}}, "custom_pipelines"),
        ({"_attn_implementation_internal": "evil/kernel"}, "internal key"),
        ({"_experts_implementation_internal": "evil/kernel"}, "internal key"),
        ({"_whatever": 1}, "internal key '_whatever'"),
        ({"__class__": "x"}, "internal key"),
        ({"_attn_implementation": "evil/kernel"}, "a kernel from elsewhere"),
        ({"attn_implementation": "sdpa|evil/kernel@main"}, "a kernel from elsewhere"),
        ({"attn_implementation": {"text_config": "evil/kernel:f"}}, "a kernel from elsewhere"),
    ],
)
def test_settings_that_would_run_code(value: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelRefused, match=sentence):
        check_settings("config.json", value, None)


def test_settings_that_are_harmless() -> None:
    value = {
        "_name_or_path": "org/name",
        "_commit_hash": None,
        "_attn_implementation": "sdpa",
        "_attn_implementation_autoset": True,
        "_from_model_config": True,
        "auto_map": {},
        "id2label": {"0": "_NONE", "1": "auto_map"},
        "label2id": {"_NONE": 0, "auto_map": 1},
    }
    check_settings("config.json", value, None)


def test_a_known_model_can_do_without_its_own_code(tmp_path: Path) -> None:
    folder = models.bare(tmp_path / "model")
    changed(folder / "config.json", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(ModelRefused, match="the installed transformers has BertModel itself"):
        Checkpoint(folder).check()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json",
             "preprocessor_config.json", "processor_config.json"],
)  # fmt: skip
def test_every_file_of_settings_is_looked_through(tmp_path: Path, name: str) -> None:
    folder = models.bare(tmp_path / "model")
    changed(folder / name, auto_map={"AutoTokenizer": ["x.Y", None]})
    with pytest.raises(ModelRefused, match=f"{name} names Python code"):
        Checkpoint(folder).check()


# -- links ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "README.md", "sub/deep.txt", "model.safetensors"])
def test_a_link_out_of_the_folder_is_never_opened(tmp_path: Path, name: str) -> None:
    folder, secret = models.bare(tmp_path / "model"), tmp_path / "secret"
    # Whoever opened it would wait for ever.
    os.mkfifo(secret)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(ModelRefused, match="leads out of the model's folder") as caught:
        Checkpoint(folder)
    assert str(tmp_path) not in str(caught.value)


def test_links_within_the_folder_and_to_a_caches_blobs_are_fine(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    source = models.bare(tmp_path / "source")
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "again.json").symlink_to("config.json")
    Checkpoint(snapshot).check()
    (snapshot / "elsewhere.json").symlink_to("../../../source")
    with pytest.raises(ModelRefused, match=r"elsewhere\.json"):
        Checkpoint(snapshot)


def test_modules_and_shards_do_not_point_outside(tmp_path: Path) -> None:
    folder = models.sentence(tmp_path / "model")
    for path in ("../other", "/etc", "a/../../b"):
        modules = [{"idx": 0, "path": path, "type": "sentence_transformers.models.Transformer"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(WeightsCorrupt, match="outside of its folder"):
            Checkpoint(folder)
    with pytest.raises(LoadError):
        raise ModelFilesMissing

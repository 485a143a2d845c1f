from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minilm
import models
import pytest
import torch
from transformers import BertModel

from tursi.errors import (
    ArchitectureUnsupported,
    DeviceUnavailable,
    DeviceUnsupported,
    LoadError,
    ModelFilesMissing,
    ModelRefused,
    OutOfMemory,
    TaskUnsuitable,
    WeightsCorrupt,
)
from tursi.heartbeat import SIZE, Writer
from tursi.inference import loader
from tursi.inference.checkpoint import Checkpoint
from tursi.inference.device import choose_device, explain_device
from tursi.inference.outbox import Outbox
from tursi.inference.readahead import Readahead
from tursi.model import Loaded, LoadOrder, Progress, Task

SECONDS = 7.0


def page() -> Writer:
    return Writer(mmap.mmap(-1, SIZE))


def load(folder: Path, **order: Any) -> Loaded:
    outbox = Outbox(lambda data: None, lambda job: None)
    return loader.load(
        LoadOrder("test", str(folder), **order),
        outbox,
        page(),
        lambda progress: None,
        lambda: SECONDS,
    )[1]


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (models.without_config, ModelFilesMissing, "has no config.json"),
        (models.without_weights, ModelFilesMissing, "has no weights"),
        (models.without_tokenizer, ModelFilesMissing, "has no tokenizer"),
        (models.missing_shard, ModelFilesMissing, "1 of 2 weight files are missing"),
        (models.git_lfs_pointer, ModelFilesMissing, "only a Git LFS pointer"),
        (models.cut_short, WeightsCorrupt, "model.safetensors is damaged"),
        (models.garbage, WeightsCorrupt, "model.safetensors is damaged"),
        (models.other_shapes, WeightsCorrupt, r"has the shape \(32,\), not \(64,\)"),
        (models.other_depth, WeightsCorrupt, "16 tensors are missing"),
        (
            models.only_pickle,
            ModelRefused,
            "only as pytorch_model.bin, .* --allow-pickle",
        ),
        (models.remote_code, ModelRefused, "names Python code .* --trust-remote-code"),
        (
            models.unknown_architecture,
            ArchitectureUnsupported,
            "doesn't know the architecture 'TursiBertModel'",
        ),
    ],
)
def test_a_model_that_can_not_be_loaded_says_why(
    tmp_path: Path, build: Callable[[Path], Path], error: type[LoadError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        load(build(tmp_path))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesMissing, match="There is no model folder"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    models.bare(tmp_path)
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(WeightsCorrupt, match=r"isn't (valid JSON|a JSON object)"):
        load(tmp_path)


def test_a_config_with_wrong_types(tmp_path: Path) -> None:
    models.bare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}), "utf-8")
    with pytest.raises(WeightsCorrupt, match="configuration can't be read"):
        load(tmp_path)


def test_a_tokenizer_that_is_damaged(tmp_path: Path) -> None:
    models.bare(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(WeightsCorrupt, match="tokenizer can't be read"):
        load(tmp_path)


def test_files_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    models.missing_shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}), "utf-8")
    with pytest.raises(WeightsCorrupt, match="point outside"):
        load(tmp_path)


# -- the task --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "task"),
    [
        (models.chat, Task.TEXT_GENERATION),
        (models.classifier, Task.TEXT_CLASSIFICATION),
        (models.fill_mask, Task.FILL_MASK),
        (models.bare, Task.FEATURE_EXTRACTION),
        (models.sentence, Task.FEATURE_EXTRACTION),
    ],
)
def test_the_task_comes_from_the_files(
    tmp_path: Path, build: Callable[[Path], Path], task: Task
) -> None:
    loaded = load(build(tmp_path))
    assert loaded.task == task.value
    assert (loaded.device, loaded.dtype) == (str(choose_device("auto")), "float32")
    assert set(loaded.versions) == {"python", "torch", "transformers", "tokenizers"}


def test_sentence_files_come_before_the_architecture(tmp_path: Path) -> None:
    models.fill_mask(tmp_path)
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), "utf-8")
    assert Checkpoint(tmp_path).task(None) is Task.FEATURE_EXTRACTION


def test_sentence_modules_that_are_not_known(tmp_path: Path) -> None:
    models.sentence(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text("utf-8"))
    for place, name in ((0, "StaticEmbedding"), (1, "LSTM")):
        changed = [dict(module) for module in modules]
        changed[place]["type"] = f"sentence_transformers.models.{name}"
        (tmp_path / "modules.json").write_text(json.dumps(changed), "utf-8")
        with pytest.raises(ArchitectureUnsupported, match=f"module '{name}'"):
            load(tmp_path)


def test_the_readme_decides_where_the_weights_can_do_it(tmp_path: Path) -> None:
    models.fill_mask(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\npipeline_tag: sentence-similarity\n---\n", "utf-8")
    assert Checkpoint(tmp_path).task(None) is Task.FEATURE_EXTRACTION
    readme.write_text("---\npipeline_tag: text-generation\n---\n", "utf-8")
    assert Checkpoint(tmp_path).task(None) is Task.FILL_MASK
    readme.write_text("---\npipeline_tag: video-to-smell\n---\n", "utf-8")
    assert Checkpoint(tmp_path).task(None) is Task.FILL_MASK


def test_the_user_decides_first(tmp_path: Path) -> None:
    assert load(models.classifier(tmp_path), task="embeddings").task == "feature-extraction"


@pytest.mark.parametrize(
    ("build", "task", "sentence"),
    [
        (models.bare, "text-classification", "BertModel, which does feature-extraction"),
        (models.fill_mask, "text-generation", "BertForMaskedLM, which does fill-mask"),
        (models.chat, "fill-mask", "LlamaForCausalLM, which does text-generation"),
        (models.bare, "juggling", "doesn't know the task 'juggling'"),
    ],
)
def test_a_task_that_the_model_can_not_do(
    tmp_path: Path, build: Callable[[Path], Path], task: str, sentence: str
) -> None:
    with pytest.raises(TaskUnsuitable, match=sentence):
        load(build(tmp_path), task=task)


def test_a_head_that_the_weights_lack_is_not_made_up(tmp_path: Path) -> None:
    models.bare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(TaskUnsuitable, match=r"weights lack the head for it \(classifier.bias\)"):
        load(tmp_path, task="text-classification")
    with pytest.raises(TaskUnsuitable, match="can't tell what this model does"):
        load(tmp_path)


def test_an_architecture_of_another_kind_of_task(tmp_path: Path) -> None:
    models.bare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config |= {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(TaskUnsuitable, match="can't tell what WhisperForConditionalGeneration"):
        load(tmp_path)


# -- device, dtype, memory -----------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda:x"])
def test_a_device_that_is_not_there(tmp_path: Path, device: str) -> None:
    # Which of the two it is, depends on how torch was built.
    with pytest.raises((DeviceUnavailable, DeviceUnsupported), match=device):
        load(models.bare(tmp_path), device=device)


def test_there_is_no_apple_gpu_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(DeviceUnsupported, match="there is no Apple GPU"):
        load(models.bare(tmp_path), device="mps")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_dtype(tmp_path: Path, dtype: str) -> None:
    for build in (models.sentence, models.chat):
        loaded = load(build(tmp_path / build.__name__), device="cpu", dtype=dtype)
        assert loaded.dtype == dtype


def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    models.bare(tmp_path)
    from transformers import AutoModel

    AutoModel.from_pretrained(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == "bfloat16"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_running_out_of_memory_has_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModel.from_pretrained", exhausted)
    with pytest.raises(OutOfMemory, match=r"enough memory to load the model \(device auto\)"):
        load(models.bare(tmp_path))


def progress_of(folder: Path, **order: Any) -> list[Progress]:
    seen: list[Progress] = []
    outbox = Outbox(lambda data: None, lambda job: None)
    load_order = LoadOrder("test", str(folder), **order)
    loader.load(load_order, outbox, page(), seen.append, lambda: SECONDS)
    return seen


def test_progress_counts_bytes_up_to_all_of_them() -> None:
    folder = minilm.minilm_folder()
    seen = progress_of(folder)
    assert [progress.stage for progress in seen] == ["load"] * (len(seen) - 1) + ["warm"]
    done = [progress.done for progress in seen if progress.done is not None]
    assert done == sorted(done)
    assert (seen[-2].done, seen[-2].unit) == (seen[-2].total, "bytes")
    # The file has a header too.
    size = (folder / "model.safetensors").stat().st_size
    assert size - 20_000 < done[-1] < size
    assert (seen[-2].part, seen[-2].parts) == (1, 1)
    assert len(done) > 20


def test_progress_tells_which_of_several_files(tmp_path: Path) -> None:
    model = BertModel.from_pretrained(models.bare(tmp_path / "whole"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    models.word_piece_tokenizer().save_pretrained(tmp_path / "parts")
    count = len([*(tmp_path / "parts").glob("*.safetensors")])
    assert count > 2
    seen = [each for each in progress_of(tmp_path / "parts") if each.done is not None]
    assert {each.parts for each in seen} == {count}
    assert {each.part for each in seen} == {*range(1, count + 1)}
    assert seen[-1].done == seen[-1].total


def test_a_load_waits_for_its_files_and_tells_how_far_they_are(tmp_path: Path) -> None:
    folder = models.bare(tmp_path)
    told = threading.Event()
    seen: list[Progress] = []

    class Slow(Readahead):
        def run(self) -> None:
            self.done = 10
            assert told.wait(30)

    def progress(each: Progress) -> None:
        seen.append(each)
        if each.stage == "read":
            told.set()

    readahead = Slow([folder / "model.safetensors"], 2**40)
    readahead.start()
    outbox = Outbox(lambda data: None, lambda job: None)
    order = LoadOrder("test", str(folder))
    loader.load(order, outbox, page(), progress, lambda: SECONDS, readahead)
    assert not readahead.is_alive()
    [read] = [each for each in seen if each.stage == "read"]
    assert read.done == 10
    assert [*dict.fromkeys(each.stage for each in seen)] == ["load", "read", "warm"]


def test_progress_of_pickled_weights_counts_tensors(tmp_path: Path) -> None:
    model = BertModel.from_pretrained(models.bare(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    last = progress_of(tmp_path, allow_pickle=True)[-2]
    assert (last.stage, last.done, last.unit) == ("load", last.total, "tensors")


# -- why it is as it is ------------------------------------------------------------------


def test_choices_say_why(tmp_path: Path) -> None:
    choices = load(models.bare(tmp_path)).choices
    assert [*choices] == ["device", "dtype", "attention", "quantization"]
    assert choices["dtype"] == "float32: the checkpoint's own, by its config.json."
    assert choices["attention"].startswith("sdpa: ")
    assert choices["quantization"] == "None: none was asked for."
    if not torch.cuda.is_available():
        assert choices["device"].startswith("cpu: ")
    asked = load(tmp_path, device="cpu", dtype="bfloat16").choices
    assert asked["device"] == "cpu: it was asked for."
    assert asked["dtype"] == "bfloat16: it was asked for; its weights are stored as float32."
    chosen = load(tmp_path, device="cpu", device_because="no GPU has room for it").choices
    assert chosen["device"] == "cpu: no GPU has room for it."


def test_a_configuration_that_names_no_dtype(tmp_path: Path) -> None:
    models.bare(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    assert load(tmp_path).choices["dtype"] == "float32: the checkpoint's own, by its weights."


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert explain_device("auto").why == "cpu: there is no usable GPU or driver."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert explain_device("auto").why == "cpu: CUDA_VISIBLE_DEVICES hides all GPUs."

"""A model's folder: what is in it, whether it can be used, and for which task.

Everything that can be known without reading the weights is checked here, so
that a wrong folder fails at once and with its own sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto import modeling_auto

from tursi.errors import (
    ArchitectureUnsupported,
    InvalidRequest,
    ModelFilesMissing,
    ModelRefused,
    TaskUnsuitable,
    WeightsCorrupt,
)
from tursi.model import Task

_JSON_LIMIT = 32 * 1024 * 1024
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAPPINGS: Mapping[Task, tuple[str, ...]] = {
    Task.TEXT_CLASSIFICATION: ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    Task.FILL_MASK: ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    Task.TEXT_GENERATION: ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    Task.FEATURE_EXTRACTION: ("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
}
"""In the order in which an architecture is looked up: heads before bare models."""


class Checkpoint:
    """The files of one model."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ModelFilesMissing(f"There is no model folder {folder}.")
        self.root = folder
        self.modules: list[dict[str, Any]] = self._modules()
        """What sentence-transformers' ``modules.json`` lists; empty if there is none."""
        path = self.modules[0].get("path", "") if self.modules else ""
        self.folder = self.root / _inside(path)
        """Where the transformer itself is."""
        self.config: dict[str, Any] = self._configuration()

    def json(self, name: str, *, inside: bool = False) -> dict[str, Any]:
        """The JSON object in a file of the root folder; empty if there is no such file.

        ``inside`` means beside the transformer's own files.
        """
        value = _read_json((self.folder if inside else self.root) / _inside(name))
        return value if isinstance(value, dict) else {}

    @cached_property
    def architecture(self) -> str | None:
        """The class that the weights were saved from."""
        architectures = self.config.get("architectures") or [None]
        return architectures[0] if isinstance(architectures, list) else None

    def check(self) -> None:
        """Raise the ``LoadError`` that says why this can't be loaded, if it can't."""
        self._check_architecture()
        for path in self._weight_files(self.folder):
            check_weights(path)

    def task(self, wanted: str | None) -> Task:
        """What to do with the model: the user's word, else what its own files say."""
        natural = self._natural_task()
        if wanted is not None:
            try:
                task = Task.parse(wanted)
            except InvalidRequest as error:
                raise TaskUnsuitable(error.message) from None
            if natural not in {task, None} and task is not Task.FEATURE_EXTRACTION:
                raise TaskUnsuitable(
                    f"The model can't do {task.value}: its weights are those of "
                    f"{self.architecture}, which does {natural}."
                )
            return task
        if self.modules:
            return Task.FEATURE_EXTRACTION
        if natural is not None:
            return self._card_task(natural) or natural
        raise TaskUnsuitable(
            f"Tursi can't tell what {self.architecture or 'this model'} does; it serves "
            f"{', '.join(task.value for task in Task)}. Name the task if it is one of these."
        )

    def _card_task(self, natural: Task) -> Task | None:
        """The ``pipeline_tag`` of the README, where the weights can do it."""
        try:
            text = (self.root / "README.md").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        header = re.match(r"---\s*\n(.*?)\n---", text[:65_536], re.DOTALL)
        tag = header and re.search(r"^pipeline_tag:\s*[\"']?([\w-]+)", header[1], re.MULTILINE)
        if not tag:
            return None
        try:
            task = Task.parse(tag[1])
        except InvalidRequest:
            return None
        return task if task in {natural, Task.FEATURE_EXTRACTION} else None

    def _natural_task(self) -> Task | None:
        name = self.architecture
        if name is None:
            return None
        for task, mappings in _MAPPINGS.items():
            if any(name in _names(mapping) for mapping in mappings):
                return task
        # Weights from pre-training hold the masked-language head.
        if name in _names("MODEL_FOR_PRETRAINING_MAPPING_NAMES") and (
            self.config.get("model_type") in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
        ):
            return Task.FILL_MASK
        return None

    def _modules(self) -> list[dict[str, Any]]:
        modules = _read_json(self.root / "modules.json")
        if not isinstance(modules, list) or not modules:
            return []
        if not all(isinstance(entry, dict) for entry in modules):
            raise WeightsCorrupt(f"{self.root / 'modules.json'} isn't a list of modules.")
        kind = str(modules[0].get("type", "")).rpartition(".")[2]
        if kind != "Transformer":
            raise ArchitectureUnsupported(
                f"The model begins with the sentence-transformers module {kind!r}; Tursi serves "
                "those that begin with a Transformer."
            )
        return modules

    def _configuration(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        config = _read_json(path)
        if config is None:
            raise ModelFilesMissing(
                f"{self.folder} has no config.json; a model's folder needs config.json, its "
                "tokenizer and *.safetensors weights."
            )
        if not isinstance(config, dict):
            raise WeightsCorrupt(f"{path} isn't a JSON object.")
        return config

    def _check_architecture(self) -> None:
        kind = self.config.get("model_type")
        name = self.architecture
        known = kind in transformers.CONFIG_MAPPING and (
            name is None or hasattr(transformers, name)
        )
        if known:
            return
        if self.config.get("auto_map"):
            raise ModelRefused(
                f"The model {name or kind!r} needs Python code from its own folder (auto_map), "
                "which Tursi doesn't run."
            )
        raise ArchitectureUnsupported(
            f"The installed transformers {transformers.__version__} doesn't know the "
            f"architecture {name or kind!r}; a newer transformers may."
        )

    def _weight_files(self, folder: Path) -> list[Path]:
        single = folder / "model.safetensors"
        if single.is_file():
            return [single]
        index = _read_json(folder / "model.safetensors.index.json")
        if index is not None:
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(shards, dict) or not shards:
                raise WeightsCorrupt("model.safetensors.index.json has no weight_map.")
            paths = [folder / _inside(str(name)) for name in sorted(set(shards.values()))]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise ModelFilesMissing(
                    f"{len(missing)} of {len(paths)} weight files are missing in {folder}, "
                    f"the first is {missing[0]}."
                )
            return paths
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ModelRefused(
                f"{folder} has its weights only as {pickles[0]}, a pickle file that could run "
                "code when it is loaded; convert it to safetensors."
            )
        raise ModelFilesMissing(f"{folder} has no weights (model.safetensors).")


def check_weights(path: Path) -> None:
    """Raise ``WeightsCorrupt`` unless the header of a safetensors file fits the file."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise ModelFilesMissing(
                f"{path.name} is only a Git LFS pointer; fetch the real file with 'git lfs pull'."
            )
        with safe_open(path, framework="numpy") as weights:
            if not weights.keys():
                raise WeightsCorrupt(f"{path.name} holds no weights.")
    except SafetensorError as error:
        raise WeightsCorrupt(
            f"{path.name} is damaged ({error}); replace it with a fresh copy."
        ) from None
    except OSError as error:
        raise ModelFilesMissing(f"{path} can't be read: {error.strerror or error}.") from None


def _names(mapping: str) -> set[str]:
    names: set[str] = set()
    for value in getattr(modeling_auto, mapping, {}).values():
        names.update((value,) if isinstance(value, str) else value)
    return names


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in Path(path).parts:
        raise WeightsCorrupt(f"The model's files point outside of its folder: {path!r}.")
    return path


def _read_json(path: Path) -> Any:
    """The value in the file, ``None`` if there is no file."""
    try:
        with path.open("rb") as file:
            data = file.read(_JSON_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ModelFilesMissing(f"{path} can't be read: {error.strerror or error}.") from None
    if len(data) > _JSON_LIMIT:
        raise WeightsCorrupt(f"{path} is far too large.")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WeightsCorrupt(f"{path} isn't valid JSON: {error}.") from None

"""A model's folder: what is in it, whether it can be used, and for which task.

Everything that can be known without reading the weights is checked here, so
that a wrong folder fails at once and with its own sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from tursi.errors import (
    ArchitectureUnsupported,
    InvalidRequest,
    ModelFilesMissing,
    ModelRefused,
    TaskUnsuitable,
    WeightsCorrupt,
)
from tursi.folder import PICKLES, START, disguise, files
from tursi.inference.settings import check_settings
from tursi.inference.weights import Shard, check_pickled, check_weights
from tursi.model import Task, Trust

_JSON_LIMIT = 32 * 1024 * 1024
_READ = (".json", ".jinja", ".txt", ".model", ".spm", ".codes", ".vocab", ".tiktoken")
"""Endings of the files besides weights that are opened for a model."""
_REMOTE: Mapping[str, Task] = {
    "AutoModelForSequenceClassification": Task.TEXT_CLASSIFICATION,
    "AutoModelForMaskedLM": Task.FILL_MASK,
    "AutoModelForCausalLM": Task.TEXT_GENERATION,
    "AutoModel": Task.FEATURE_EXTRACTION,
}
"""What code of a model's own says that it is for; heads before bare models."""
_MAPPINGS: Mapping[Task, tuple[str, ...]] = {
    Task.TEXT_CLASSIFICATION: ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",),
    Task.FILL_MASK: ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    Task.TEXT_GENERATION: ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    Task.FEATURE_EXTRACTION: ("MODEL_MAPPING_NAMES", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
}
"""In the order in which an architecture is looked up: heads before bare models."""


class Checkpoint:
    """The files of one model, and what it may bring besides data."""

    def __init__(self, folder: Path, trust: Trust = Trust()) -> None:  # noqa: B008 - a frozen value
        if not folder.is_dir():
            raise ModelFilesMissing(f"There is no model folder {folder}.")
        self.root = folder
        self.trust = trust
        # First of all: not even a configuration is read through a link to elsewhere.
        self._names = _listed(folder)
        self.modules: list[dict[str, Any]] = self._modules()
        """What sentence-transformers' ``modules.json`` lists; empty if there is none."""
        path = self.modules[0].get("path", "") if self.modules else ""
        self.folder = self.root / _inside(path)
        """Where the transformer itself is."""
        self.config: dict[str, Any] = self._configuration()
        self.shards: list[Shard] = []
        """Its files of weights, once they are checked."""

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

    @cached_property
    def remote(self) -> dict[str, Any]:
        """What the model's own code has for transformers' automatic classes, if it may run."""
        auto_map = self.config.get("auto_map") if self.trust.trust_remote_code else None
        return auto_map if isinstance(auto_map, dict) else {}

    @cached_property
    def pickled(self) -> bool:
        """Whether the weights are in pickle files, and may be."""
        return any(path.suffix != ".safetensors" for path in self._weight_files(self.folder))

    @property
    def stored_dtype(self) -> str | None:
        """What most of the bytes of its weights are, by torch's name; ``None`` if unknown."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.dtypes)
        return total.most_common(1)[0][0] if total else None

    @property
    def named_dtype(self) -> str | None:
        """What its configuration names, if it does."""
        found = self.config.get("dtype", self.config.get("torch_dtype"))
        return found.removeprefix("torch.") if isinstance(found, str) else None

    def check(self) -> None:
        """Raise the ``LoadError`` that says why this can't be loaded, if it can't."""
        self._check_content()
        self._check_architecture()
        self.shards = [
            check_weights(path) if path.suffix == ".safetensors" else check_pickled(path)
            for path in self._weight_files(self.folder)
        ]

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
        for auto_class, task in _REMOTE.items():
            if auto_class in self.remote:
                return task
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
            raise WeightsCorrupt("modules.json isn't a list of modules.")
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
                "The model has no config.json; a model's folder needs config.json, its "
                "tokenizer and *.safetensors weights."
            )
        if not isinstance(config, dict):
            raise WeightsCorrupt(f"{path.name} isn't a JSON object.")
        return config

    def _check_content(self) -> None:
        """Refuse what isn't what its name says, and settings that make libraries run code."""
        name = self.architecture
        known = name if name is not None and hasattr(transformers, name) else None
        for file in self._names:
            path = self.root / file
            if path.suffix not in _READ:
                continue
            what = disguise(_read(path, START))
            if what is not None:
                raise ModelRefused(f"{file} isn't what its name says but {what}; remove it.")
            if self.trust.trust_remote_code or path.suffix != ".json" or "config" not in path.name:
                continue
            check_settings(file, _read_json(path), known)

    def _check_architecture(self) -> None:
        kind = self.config.get("model_type")
        name = self.architecture
        if self.remote or (
            kind in transformers.CONFIG_MAPPING and (name is None or hasattr(transformers, name))
        ):
            return
        raise ArchitectureUnsupported(
            f"The installed transformers {transformers.__version__} doesn't know the "
            f"architecture {name or kind!r}; a newer transformers may."
        )

    def _weight_files(self, folder: Path) -> list[Path]:
        found = self._weights(folder, "model.safetensors")
        if found:
            return found
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if not pickles:
            raise ModelFilesMissing("The model's folder has no weights (model.safetensors).")
        if not self.trust.allow_pickle:
            raise ModelRefused(
                f"The model has its weights only as {pickles[0]}, a pickle file, which can run "
                "code when it is loaded: convert it to safetensors, or, if you trust its author, "
                "allow it by --allow-pickle."
            )
        found = self._weights(folder, "pytorch_model.bin")
        if not found:
            raise ModelFilesMissing(
                f"transformers doesn't load weights from {pickles[0]}, only from pytorch_model.bin."
            )
        return found

    def _weights(self, folder: Path, name: str) -> list[Path]:
        """The file of this name, or those that its index names; empty if there is neither."""
        single = folder / name
        if single.is_file():
            return [single]
        index = _read_json(folder / f"{name}.index.json")
        if index is None:
            return []
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not shards:
            raise WeightsCorrupt(f"{name}.index.json has no weight_map.")
        paths = [folder / _inside(str(shard)) for shard in sorted(set(shards.values()))]
        # transformers chooses how to read each by its ending.
        other = [path.name for path in paths if path.suffix != single.suffix]
        if other:
            raise ModelRefused(
                f"{name}.index.json names {other[0]!r}, which isn't a file of {single.suffix[1:]}."
            )
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelFilesMissing(
                f"{len(missing)} of {len(paths)} weight files are missing in the model's folder, "
                f"the first is {missing[0]}."
            )
        return paths


def _listed(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(name for name, _ in files(folder, depth=3)))
    except OSError as error:
        raise ModelFilesMissing(
            f"The model's folder can't be read: {error.strerror or error}."
        ) from None


def _names(mapping: str) -> set[str]:
    names: set[str] = set()
    for value in getattr(modeling_auto, mapping, {}).values():
        names.update((value,) if isinstance(value, str) else value)
    return names


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in Path(path).parts:
        raise WeightsCorrupt(f"The model's files point outside of its folder: {path!r}.")
    return path


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ModelFilesMissing(f"{path.name} can't be read: {error.strerror or error}.") from None


def _read_json(path: Path) -> Any:
    """The value in the file, ``None`` if there is no file."""
    if not path.is_file():
        return None
    data = _read(path, _JSON_LIMIT + 1)
    if len(data) > _JSON_LIMIT:
        raise WeightsCorrupt(f"{path.name} is far too large.")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WeightsCorrupt(f"{path.name} isn't valid JSON: {error}.") from None

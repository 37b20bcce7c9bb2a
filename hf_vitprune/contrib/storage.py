"""What many tasks take on disk: one backbone with an adapter a task, against a model of its own for every task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType
from rich.table import Table
from safetensors import safe_open
from transformers import AutoConfig

from ..errors import AdapterError, InvalidDataError
from ..modeling.embedded import BASE_FOLDER
from ..modeling.peft_twin import is_peft
from ..peft.record import seal
from ..publish.report import human
from ..spec.architecture import Architecture, unwrap

#: name of a tensor, its elements, its bytes
_Tensor = tuple[str, int, int]


@dataclass(frozen=True)
class TaskStorage:
    """One task's adapter.

    Attributes:
        name: of the task.
        kept_layers: how many layers of the backbone it runs: the one integer that is stored for the pruning.
        adapter_params: elements of the adapter's tensors.
        head_params: elements of what is trained as a whole, the classifier.
        bytes: of its folder, configuration included; of the tensors alone for a model in memory.
    """

    name: str
    kept_layers: int
    adapter_params: int
    head_params: int
    bytes: int

    @property
    def params(self) -> int:
        return self.adapter_params + self.head_params


@dataclass(frozen=True)
class ModelStorage:
    """A whole model: its name, elements of its tensors, and bytes (of the folder, where it is one)."""

    name: str
    params: int
    bytes: int


@dataclass(frozen=True)
class StorageReport:
    """The accounting of :func:`storage_report`.

    Attributes:
        backbone: stored once.
        layers: of the backbone.
        tasks: one adapter each.
        models: what the tasks take as models of their own; copies of the backbone where none were given.
    """

    backbone: ModelStorage
    layers: int
    tasks: tuple[TaskStorage, ...]
    models: tuple[ModelStorage, ...]

    @property
    def params(self) -> int:
        """Of backbone and adapters; the integers come on top, one a task."""
        return self.backbone.params + sum(task.params for task in self.tasks)

    @property
    def bytes(self) -> int:
        return self.backbone.bytes + sum(task.bytes for task in self.tasks)

    @property
    def models_params(self) -> int:
        return sum(model.params for model in self.models)

    @property
    def models_bytes(self) -> int:
        return sum(model.bytes for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "backbone": vars(self.backbone),
            "layers": self.layers,
            "tasks": [vars(task) for task in self.tasks],
            "models": [vars(model) for model in self.models],
            "params": self.params,
            "bytes": self.bytes,
            "models_params": self.models_params,
            "models_bytes": self.models_bytes,
        }

    def table(self) -> Table:
        """For a terminal: a row a task, and the sums."""
        table = Table(title=f"{len(self.tasks)} tasks on one backbone", title_justify="left")
        for column in ("", "layers", "adapter", "classifier", "bytes", "of the backbone"):
            table.add_column(column, justify="left" if not column else "right")
        for task in self.tasks:
            table.add_row(
                task.name,
                f"{task.kept_layers} of {self.layers}",
                human(task.adapter_params),
                human(task.head_params),
                human(task.bytes),
                f"{task.bytes / self.backbone.bytes:.2%}",
            )
        table.add_section()
        adapters = sum(task.adapter_params for task in self.tasks), sum(task.head_params for task in self.tasks)
        table.add_row("backbone, once", "", human(self.backbone.params), "", human(self.backbone.bytes), "100%")
        table.add_row(
            f"backbone + {len(self.tasks)} adapters + {len(self.tasks)} integers",
            "",
            human(self.backbone.params + adapters[0]),
            human(adapters[1]),
            human(self.bytes),
            f"{self.bytes / self.backbone.bytes:.1%}",
        )
        table.add_row(
            f"{len(self.models)} models",
            "",
            human(self.models_params),
            "",
            human(self.models_bytes),
            f"{self.models_bytes / self.backbone.bytes:.1%}",
        )
        return table


def storage_report(
    backbone: Any, adapters: Mapping[str, Any] | Iterable[Any], models: Mapping[str, Any] | Iterable[Any] = ()
) -> StorageReport:
    """What T tasks take: a shared backbone, T adapters and T integers, against T models.

    Args:
        backbone: the dense model, or the folder it was saved to.
        adapters: of the tasks, by name: folders from ``save_pretrained``, or PeftModels. A list of folders is named
            after them.
        models: the alternative, by name: pruned models of full size each, as models or folders. A copy of the
            backbone a task by default (fine-tuning).

    Raises:
        AdapterError: an adapter belongs to another backbone.
        InvalidDataError: a folder holds no adapter or no model.
    """
    config = unwrap(backbone).config if not isinstance(backbone, (str, Path)) else _config(Path(backbone))
    dense = Architecture.dense(config)
    whole = _model("backbone", backbone)
    tasks = tuple(_task(name, adapter, dense) for name, adapter in _named(adapters))
    others = tuple(_model(name, model) for name, model in _named(models))
    return StorageReport(whole, len(dense.layers), tasks, others or (whole,) * len(tasks))


def _named(things: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(things, Mapping):
        return list(things.items())
    return [(Path(t).name if isinstance(t, (str, Path)) else f"task {i}", t) for i, t in enumerate(things, 1)]


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InvalidDataError(f"{folder} holds no model: there is no config.json")
    return AutoConfig.from_pretrained(folder)


def _model(name: str, model: Any) -> ModelStorage:
    if isinstance(model, (str, Path)):
        folder = Path(model) / BASE_FOLDER if (Path(model) / BASE_FOLDER).is_dir() else Path(model)
        tensors = list(_tensors_in(folder, "*.safetensors"))
        return ModelStorage(name, sum(n for _, n, _ in tensors), _bytes_of(folder))
    tensors = list(_tensors_of(unwrap(model).state_dict()))
    return ModelStorage(name, sum(n for _, n, _ in tensors), sum(size for *_, size in tensors))


def _task(name: str, adapter: Any, dense: Architecture) -> TaskStorage:
    if isinstance(adapter, (str, Path)):
        folder = Path(adapter)
        file = folder / "adapter_config.json"
        if not file.is_file():
            raise InvalidDataError(f"{folder} holds no adapter: there is no adapter_config.json")
        config = json.loads(file.read_text())
        kind, record = config["peft_type"], config.get("pruning")
        tensors = list(_tensors_in(folder, "adapter_model*.safetensors"))
        size = _bytes_of(folder) - _bytes_of(folder / BASE_FOLDER)
    elif is_peft(adapter):
        active = adapter.active_adapter
        kind, record = (
            adapter.peft_config[active].peft_type.value,
            getattr(adapter.peft_config[active], "pruning", None),
        )
        tensors = list(_tensors_of(get_peft_model_state_dict(adapter, adapter_name=active)))
        size = sum(count for *_, count in tensors)
    else:
        raise InvalidDataError(
            f"{name} is a {type(adapter).__name__}: expected a folder of an adapter, or a PeftModel"
        )
    kept = _kept(name, record, dense)
    prefix = "." + PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(kind)]
    own = sum(count for key, count, _ in tensors if prefix in key)
    return TaskStorage(name, kept, own, sum(count for _, count, _ in tensors) - own, size)


def _kept(name: str, record: dict[str, Any] | None, dense: Architecture) -> int:
    """How many layers an adapter keeps; all where it is no adapter of a truncated model."""
    if record is None:
        return len(dense.layers)
    if record["model_type"] != dense.model_type or record["source"] != seal(dense):
        raise AdapterError(
            f"the adapter of {name} belongs to another backbone: a {record['model_type']} whose sizes are not those "
            f"of this {dense.model_type} of {len(dense.layers)} layers and width {dense.hidden_size}"
        )
    if record["kept_layers"] is None:
        raise AdapterError(
            f"the adapter of {name} belongs to a model whose layers were narrowed; it cannot share the backbone, so "
            "count it among `models`"
        )
    return len(record["kept_layers"])


def _tensors_of(state: Mapping[str, torch.Tensor]) -> Iterator[_Tensor]:
    for name, tensor in state.items():
        yield name, tensor.numel(), tensor.numel() * tensor.element_size()


def _tensors_in(folder: Path, pattern: str) -> Iterator[_Tensor]:
    """From the headers of the files; no weights are read."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise InvalidDataError(f"{folder} holds no weights ({pattern})")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                yield name, math.prod(tensors.get_slice(name).get_shape()), 0


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

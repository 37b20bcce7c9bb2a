"""What many tasks take on disk: one backbone with an adapter a task, against a model of its own for every task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType
from rich.table import Table
from safetensors import safe_open
from transformers import AutoConfig

from ..errors import AdapterError, InvalidDataError
from ..modeling.folder import BASE_FOLDER
from ..modeling.peft_twin import is_peft
from ..peft.record import seal
from ..publish.report import human
from ..spec.architecture import Architecture, unwrap


@dataclass(frozen=True)
class TaskStorage:
    """One task's adapter: its elements, those of what it trains as a whole (the classifier), and bytes of its folder.

    ``kept_layers``: how many layers of the backbone it runs, the one integer that is stored for the pruning.
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
    """A whole model: elements of its tensors, and bytes (of the folder, where it is one)."""

    name: str
    params: int
    bytes: int


@dataclass(frozen=True)
class StorageReport:
    """The accounting of :func:`storage_report`: a backbone of so many layers with tasks, and models of their own."""

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
        sums = {name: getattr(self, name) for name in ("params", "bytes", "models_params", "models_bytes")}
        return {**asdict(self), **sums}

    def table(self) -> Table:
        """For a terminal: a row a task, and the sums."""
        table = Table(title=f"{len(self.tasks)} tasks on one backbone", title_justify="left")
        for column in ("", "layers", "adapter", "classifier", "bytes", "of the backbone"):
            table.add_column(column, justify="left" if not column else "right")

        def row(name: str, layers: str, adapter: int, head: int | None, size: int, digits: int) -> None:
            share = f"{size / self.backbone.bytes:.{digits}%}"
            table.add_row(name, layers, human(adapter), "" if head is None else human(head), human(size), share)

        for task in self.tasks:
            layers = f"{task.kept_layers} of {self.layers}"
            row(task.name, layers, task.adapter_params, task.head_params, task.bytes, 2)
        table.add_section()
        count, heads = len(self.tasks), sum(task.head_params for task in self.tasks)
        row("backbone, once", "", self.backbone.params, None, self.backbone.bytes, 0)
        row(f"backbone + {count} adapters + {count} integers", "", self.params - heads, heads, self.bytes, 1)
        row(f"{len(self.models)} models", "", self.models_params, None, self.models_bytes, 1)
        return table


def storage_report(
    backbone: Any, adapters: Mapping[str, Any] | Iterable[Any], models: Mapping[str, Any] | Iterable[Any] = ()
) -> StorageReport:
    """What T tasks take: a shared backbone, T adapters and T integers, against T models.

    Args:
        backbone: the dense model, or the folder it was saved to.
        adapters: of the tasks, by name, or a list: folders from ``save_pretrained``, or PeftModels.
        models: the alternative, by name: models or folders; by default a copy of the backbone a task (fine-tuning).

    Raises:
        AdapterError: an adapter belongs to another backbone.
        InvalidDataError: a folder holds no adapter or no model.
    """
    if not isinstance(backbone, (str, Path)):
        config = unwrap(backbone).config
    elif (Path(backbone) / "config.json").is_file():
        config = AutoConfig.from_pretrained(backbone)
    else:
        raise InvalidDataError(f"{backbone} holds no model: there is no config.json")
    dense = Architecture.dense(config)
    whole = _model("backbone", backbone)
    tasks = tuple(_task(name, adapter, dense) for name, adapter in _named(adapters))
    others = tuple(_model(name, model) for name, model in _named(models))
    return StorageReport(whole, len(dense.layers), tasks, others or (whole,) * len(tasks))


def _named(things: Mapping[str, Any] | Iterable[Any]) -> list[tuple[str, Any]]:
    if isinstance(things, Mapping):
        return list(things.items())
    return [(Path(t).name if isinstance(t, (str, Path)) else f"task {i}", t) for i, t in enumerate(things, 1)]


def _model(name: str, model: Any) -> ModelStorage:
    if isinstance(model, (str, Path)):
        folder = Path(model) / BASE_FOLDER if (Path(model) / BASE_FOLDER).is_dir() else Path(model)
        return ModelStorage(name, sum(_saved(folder, "*.safetensors").values()), _bytes_of(folder))
    tensors = unwrap(model).state_dict().values()
    return ModelStorage(name, sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors))


def _task(name: str, adapter: Any, dense: Architecture) -> TaskStorage:
    if isinstance(adapter, (str, Path)):
        folder = Path(adapter)
        file = folder / "adapter_config.json"
        if not file.is_file():
            raise InvalidDataError(f"{folder} holds no adapter: there is no adapter_config.json")
        config = json.loads(file.read_text())
        kind, record = PeftType(config["peft_type"]), config.get("pruning")
        params = _saved(folder, "adapter_model*.safetensors")
        size = _bytes_of(folder) - _bytes_of(folder / BASE_FOLDER)
    elif is_peft(adapter):
        active = adapter.active_adapter
        kind, record = adapter.peft_config[active].peft_type, getattr(adapter.peft_config[active], "pruning", None)
        state = get_peft_model_state_dict(adapter, adapter_name=active)
        params = {key: tensor.numel() for key, tensor in state.items()}
        size = sum(tensor.nbytes for tensor in state.values())
    else:
        raise InvalidDataError(
            f"{name} is a {type(adapter).__name__}: expected a folder of an adapter, or a PeftModel"
        )
    kept = _kept(name, record, dense)
    prefix = "." + PEFT_TYPE_TO_PREFIX_MAPPING[kind]
    own = sum(count for key, count in params.items() if prefix in key)
    return TaskStorage(name, kept, own, sum(params.values()) - own, size)


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


def _saved(folder: Path, pattern: str) -> dict[str, int]:
    """Name -> elements of every saved tensor, from the headers of the files; no weights are read."""
    params = {}
    for file in folder.glob(pattern):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                params[name] = math.prod(tensors.get_slice(name).get_shape())
    if not params:
        raise InvalidDataError(f"{folder} holds no weights ({pattern})")
    return params


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

"""UnitScores: what every criterion gives, and a plan can be made from; and the batches to score with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import InvalidDataError, ScoresError, VitPruneError
from ..families import LayerPaths
from ..modeling.peft_twin import plain_part
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.units import Axis, unit_sets, unit_table
from ..utils.batches import Form, ImageBatches

FORMAT_VERSION = 1
#: key of the record in the metadata of a file
_RECORD = "hf_vitprune_unit_scores"


class UnitScores(Mapping[str, torch.Tensor]):
    """A score for every unit of a model: set -> (units,), where higher is more important.

    The sets are ``layer 0 qk``, ``layer 0 v``, ``layer 0 heads``, ``layer 0 mlp`` and so on, ``embedding`` and
    ``layers``; q/k and v channels are the same in every head. Sets that nobody wants to prune may be missing.

    Args:
        architecture: of the model that was scored.
        scores: set -> (units,), of any criterion. They are copied to the CPU.
        criterion: its name; JSON only, as ``settings``, and noted in plans.
        settings: of the criterion.

    Raises:
        ScoresError: a set that the model does not have, another number of units, or a score that is not finite.
    """

    def __init__(
        self,
        architecture: Architecture,
        scores: Mapping[str, torch.Tensor],
        criterion: str = "own",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.architecture = architecture
        self.criterion = criterion
        self.settings = dict(settings or {})
        sets = unit_sets(architecture)
        self._scores: dict[str, torch.Tensor] = {}
        for name, values in scores.items():
            if name not in sets:
                raise ScoresError(f"the model has no set {name!r}; its sets are {', '.join(sets)}")
            tensor = torch.as_tensor(values).detach().cpu()
            if tensor.shape != (sets[name].size,):
                raise ScoresError(f"{name}: {sets[name].size} units, and scores of shape {tuple(tensor.shape)}")
            if not tensor.isfinite().all():
                raise ScoresError(
                    f"{name}: {int((~tensor.isfinite()).sum())} scores are not finite: look for weights or images "
                    "that are not, or score in float32"
                )
            self._scores[name] = tensor
        self._scores = {name: self._scores[name] for name in sets if name in self._scores}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"UnitScores({self.criterion}, {len(self)} sets of a {self.architecture.model_type})"

    # ------------------------------------------------------------------ files
    def _record(self) -> dict[str, Any]:
        names = {"criterion": self.criterion, "settings": self.settings}
        return {"version": FORMAT_VERSION, **names, "architecture": self.architecture.to_dict()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**self._record(), "scores": {name: values.tolist() for name, values in self.items()}}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> UnitScores:
        """Inverse of :meth:`to_dict`; scores become double precision, a ScoresError where something is damaged."""
        try:
            if record["version"] != FORMAT_VERSION:
                raise ScoresError(f"scores of version {record['version']!r}; this library reads {FORMAT_VERSION}")
            scores = {
                name: v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=torch.float64)
                for name, v in record["scores"].items()
            }
            return cls(Architecture.from_dict(record["architecture"]), scores, record["criterion"], record["settings"])
        except VitPruneError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ScoresError(f"damaged scores: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        write_scores(path, self, _RECORD, self._record())

    @classmethod
    def load(cls, path: str | Path) -> UnitScores:
        """Read what :meth:`save` wrote.

        Raises:
            ScoresError: the file is damaged, or something else.
            OSError: there is no such file.
        """
        try:
            record, scores = read_scores(path, _RECORD)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ScoresError(f"{path} is no file of unit scores: {error!r}") from error
        return cls.from_dict({**record, "scores": scores})


def write_scores(path: str | Path, tensors: Mapping[str, torch.Tensor], key: str, record: dict[str, Any]) -> None:
    """A safetensors file, with a record as JSON in its metadata."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {key: json.dumps(record)})


def read_scores(path: str | Path, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record and the tensors of such a file; a SafetensorError, KeyError or ValueError where it is another."""
    with safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {})[key])
        return record, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


def model_to_score(model: Any, part: str | None = None) -> tuple[nn.Module, Architecture, list[LayerPaths]]:
    """(the transformers model, active adapters merged; its architecture; the paths of its layers)."""
    base, architecture = plain_part(model, part)
    return base, architecture, layer_paths(base, architecture)


class UnitSums:
    """Adds up values of weights to those of the units that they belong to."""

    def __init__(self, architecture: Architecture, paths: list[LayerPaths], names: Iterable[str]) -> None:
        sets = unit_sets(architecture)
        self.sums = {name: torch.zeros(one.size, dtype=torch.float64) for name, one in sets.items()}
        self._prefixes = [f"{path.layer}." for path in paths]
        self._axes: dict[str, list[tuple[str, Axis]]] = {}
        for name, axes in unit_table(architecture, paths, set(names)).items():
            for axis in axes:
                self._axes.setdefault(axis.tensor, []).append((name, axis))

    def layer_of(self, tensor: str) -> int | None:
        """The layer that a tensor is in."""
        return next((i for i, prefix in enumerate(self._prefixes) if tensor.startswith(prefix)), None)

    def add(self, tensor: str, values: torch.Tensor) -> None:
        """Add the values of a tensor, of its shape."""
        for name, axis in self._axes.get(tensor, ()):
            self.sums[name] += axis.sums(values).to("cpu", torch.float64)
        layer = self.layer_of(tensor)
        if layer is not None:
            self.sums["layers"][layer] += values.sum().to("cpu", torch.float64)


def batches_of(data: Any, form: Form | None = None) -> Iterator[dict[str, Any]]:
    """One pass over the batches; an InvalidDataError where there are none, or they cannot be read.

    ``data``: an iterable of batches: mappings with ``pixel_values`` (batch, channels, height, width) and ``labels``
    where there are any, or pairs of both; a DataLoader (its size of batches, in the order of the data unless it
    streams); or anything that ``ImageBatches`` takes, 64 images a batch; ``form`` as there.
    """
    streams = isinstance(data, DataLoader) and isinstance(data.dataset, IterableDataset)
    batched = isinstance(data, (list, tuple)) and len(data) > 0 and _is_batch(data[0], form)
    batches: Iterable[dict[str, Any]]
    if streams or batched or isinstance(data, Iterator):
        batches = _each(data, form)
    elif isinstance(data, ImageBatches) and form in (None, data.form):
        batches = data
    else:
        batches = ImageBatches(data, getattr(data, "batch_size", None) or 64, form=form)
    batch = None
    for batch in batches:
        yield batch
    if batch is None:
        raise InvalidDataError("there are no images to score with")


def _is_batch(item: Any, form: Form | None) -> bool:
    pixels = item.get("pixel_values") if isinstance(item, Mapping) else item[0] if isinstance(item, tuple) else None
    if not isinstance(pixels, torch.Tensor):
        return False
    words = item.get("input_ids") if isinstance(item, Mapping) else None
    if words is not None:  # an example may hold several images
        return torch.as_tensor(words).ndim == 2
    return pixels.ndim >= (4 if form is None else form.axes)


def _each(batches: Iterable[Any], form: Form | None) -> Iterator[dict[str, Any]]:
    seen = 0
    for batch in batches:
        if not isinstance(batch, (Mapping, list, tuple)):
            raise InvalidDataError(f"a batch is a mapping, or a pair of images and labels, not {type(batch).__name__}")
        if not isinstance(batch, Mapping):
            batch = dict(zip(("pixel_values", "labels"), batch, strict=False))
        images = len(batch["pixel_values"]) if "pixel_values" in batch else 1
        checked = ImageBatches(batch, images, form=form, offset=seen)
        seen += checked.images
        yield from checked

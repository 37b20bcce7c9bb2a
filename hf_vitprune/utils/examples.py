"""What people hand over as images -> a data set of examples ``{"pixel_values": (channels, height, width), ...}``."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset
from transformers import AutoImageProcessor, default_data_collator

from ..errors import InvalidDataError
from .images import reading_errors, upright
from .sources import IMAGE_COLUMNS, LABEL_COLUMNS

_CURE = (
    "Put the images through the model's image processor first: [processor(image, return_tensors='pt') for image in "
    "images] (hf_vitprune.utils.data.ProcessedImages does it for a data set)"
)


def examples_of(data: Any, axes: tuple[int, ...]) -> Any:
    """The data (see ``ImageBatches``), as something with examples and a length; what nobody knows, as it is.

    ``axes``: of ``pixel_values``, in a batch.

    Raises:
        InvalidDataError: tensors of other axes, or of several shapes; columns of other lengths.
    """
    if isinstance(data, Mapping):
        return Rows([data], axes)
    data = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, (torch.Tensor, np.ndarray)) for item in data):
        data = _stacked([torch.as_tensor(item) for item in data], axes)
    if isinstance(data, torch.Tensor):
        if data.ndim not in axes:
            raise InvalidDataError(
                f"a tensor of images is (images, channels, height, width), not of shape {tuple(data.shape)}"
            )
        return TensorDataset(data)
    if isinstance(data, (list, tuple)) and data and _are_batches(data, axes):
        return Rows(data, axes)
    return data


def _stacked(items: list[torch.Tensor], axes: tuple[int, ...]) -> torch.Tensor:
    """One tensor of all images, of tensors with one image each or with several."""
    shapes = {tuple(item.shape[-3:]) for item in items}
    if len(shapes) > 1:
        different = next(i for i, item in enumerate(items) if item.shape[-3:] != items[0].shape[-3:])
        raise InvalidDataError(
            f"images are of one size, and the first is {tuple(items[0].shape)} and number {different} "
            f"{tuple(items[different].shape)}. {_CURE}"
        )
    several = all(item.ndim == axes[0] for item in items)
    return torch.cat(items) if several else torch.stack(items)


def _are_batches(items: Sequence[Any], axes: tuple[int, ...]) -> bool:
    """Whether mappings are of several images each (or of one, with an axis for the batch), as processors make them.

    Where the crops of an image may come as its ``pixel_values``, batches are what has a label for each, or nothing but
    images, of other numbers.
    """
    if not all(isinstance(item, Mapping) for item in items):
        return False
    pixels = [item.get("pixel_values") for item in items]
    if not all(isinstance(some, (torch.Tensor, np.ndarray)) and some.ndim == axes[0] for some in pixels):
        return False
    labels = items[0].get("labels")
    labelled = getattr(labels, "ndim", 0) == 1 and len(labels) == len(pixels[0])
    alone = all(item.keys() <= {"pixel_values", "labels"} for item in items)
    return len(axes) == 1 or labelled or (alone and len({len(some) for some in pixels}) > 1)


class Rows(Dataset):
    """Columns of images, or several such batches, row by row; what holds for all images goes into every batch."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], axes: tuple[int, ...]) -> None:
        self.columns: list[dict[str, Any]] = []
        self.constant: dict[str, Any] = {}
        for batch in batches:
            pixels = _pixels_of(batch, axes)
            self.columns.append({})
            for name, value in {**batch, "pixel_values": pixels}.items():
                single = isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0
                if single and self.constant.setdefault(name, value) != value:
                    raise InvalidDataError(f"{name} is {self.constant[name]} and {value}: pass such images apart")
                if not single and len(value) != len(pixels):
                    raise InvalidDataError(f"{name} has {len(value)} rows, and there are {len(pixels)} images")
                if not single:
                    self.columns[-1][name] = value
        self.places = [(i, j) for i, one in enumerate(self.columns) for j in range(len(one["pixel_values"]))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        i, j = self.places[index]
        return {name: column[j] for name, column in self.columns[i].items()}

    def collate(self, examples: list[Any]) -> dict[str, Any]:
        return {**collate(examples), **self.constant}


def _pixels_of(columns: Mapping[str, Any], axes: tuple[int, ...]) -> torch.Tensor:
    pixels = columns.get("pixel_values")
    if isinstance(pixels, (list, tuple)) and pixels and isinstance(pixels[0], (torch.Tensor, np.ndarray)):
        pixels = _stacked([torch.as_tensor(item) for item in pixels], axes)
    pixels = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
    if not isinstance(pixels, torch.Tensor) or pixels.ndim not in axes:
        raise InvalidDataError(
            "a mapping of columns needs pixel_values, a tensor (images, channels, height, width); it has "
            f"{', '.join(map(str, columns))} (of several splits of a data set, pass one)"
        )
    return pixels


def collate(examples: list[Any]) -> dict[str, Any]:
    """As transformers' collator; switches (``interpolate_pos_encoding``) of all examples stay True or False."""
    shared = {}
    if all(isinstance(example, Mapping) for example in examples):
        switches = {name for name, value in examples[0].items() if isinstance(value, bool) and "label" not in name}
        shared = {n: examples[0][n] for n in switches if all(one.get(n) is examples[0][n] for one in examples)}
        examples = [{name: value for name, value in one.items() if name not in shared} for one in examples]
    return {**default_data_collator(examples), **shared}


# ---------------------------------------------------------------------- images as they were taken
@contextlib.contextmanager
def fixed_randomness(seed: int = 0) -> Iterator[None]:
    """The same random numbers every time, for data sets that augment their images; the caller's are left alone."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class Processed(Dataset):
    """Images as they were taken (PIL), put through an image processor one by one; with their classes, if any.

    Args:
        dataset: images, pairs of image and class, or rows with a ``column`` of images and one of ``labels``.

    Attributes:
        augment: is applied to each PIL image before the processor; None: nothing.
    """

    def __init__(
        self, dataset: Any, processor: Any, column: str | None, labels: Sequence[str] = LABEL_COLUMNS
    ) -> None:
        self.dataset, self.processor, self.column, self.label_columns = dataset, processor, column, labels
        self.augment: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = self.dataset[index]
            pair = row if isinstance(row, (tuple, list)) else (row if self.column is None else row[self.column],)
            image = upright(pair[0])
        except reading_errors() as error:
            raise InvalidDataError(f"{self._name(index)} cannot be read as an image: {error}") from error
        image = image if self.augment is None else self.augment(image)
        made = self.processor(images=image, return_tensors="pt")
        label = pair[1] if len(pair) > 1 else None
        if self.column is not None:
            label = next((row[name] for name in self.label_columns if row.get(name) is not None), None)
        return {**{name: value[0] for name, value in made.items()}, **({} if label is None else {"labels": label})}

    def _name(self, index: int) -> str:
        """The path of an image, where it has one."""
        from datasets import Dataset as Table
        from datasets import Image

        raw: Any = {}
        if isinstance(self.dataset, Table):
            raw = self.dataset.cast_column(self.column, Image(decode=False))[index][self.column]
        return str(raw.get("path") or f"image {index} (from 0)")


def processed(data: Any, model: Any) -> Any:
    """Images as they were taken, through the image processor that lies beside the model; all else as it is.

    Args:
        data: a list of PIL images, of pairs of image and class, or of rows with an image; a ``datasets.Dataset``.
        model: was loaded from a folder or repository with an image processor.

    Raises:
        InvalidDataError: there is no such processor.
    """
    if isinstance(data, (str, bytes, Mapping)) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return data
    if not len(data) or isinstance(data, (torch.Tensor, np.ndarray, TensorDataset)):
        return data
    with fixed_randomness():
        first = data[0]
    image = first[0] if isinstance(first, (tuple, list)) and first else first
    column = None
    if isinstance(first, Mapping):
        column = next((name for name in IMAGE_COLUMNS if _is_picture(first.get(name))), None)
        image = None if column is None else first[column]
    if not _is_picture(image):
        return data
    return Processed(data, _processor_of(model), column)


def _is_picture(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "PIL"


def _processor_of(model: Any) -> Any:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        if name:
            return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise InvalidDataError(f"no image processor is beside the model in {name} ({reason}). {_CURE}") from error
    raise InvalidDataError(
        f"these are images as they were taken, and the model was not loaded from where its processor is. {_CURE}"
    )

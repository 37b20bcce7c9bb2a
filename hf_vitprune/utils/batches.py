"""Images in batches, in one fixed order, and a model run on them: for scores and for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, SubsetRandomSampler

from ..errors import CheckpointMismatchError, InvalidDataError
from .examples import Rows, collate, examples_of
from .examples import fixed_randomness as fixed_randomness
from .finite import first_not_finite


@dataclass(frozen=True)
class Form:
    """What a kind of model takes.

    Attributes:
        axes: of ``pixel_values``: 4 of images, 5 of videos (frames), 3 of packed patches.
        split: (batch) -> the batches that its layers can be run on one by one, without a mask.
    """

    axes: int
    split: Callable[[dict[str, Any]], list[dict[str, Any]]]


class ImageBatches:
    """Batches ``{"pixel_values": (batch, channels, height, width), "labels": (batch,) where there are any}``.

    Whatever else a collated batch has (``interpolate_pos_encoding``, ``bool_masked_pos``, ...) stays in it. Every pass
    gives the same batches in the order of the data, whatever shuffling a loader does.

    Args:
        data: a tensor or array of images (images, channels, height, width), or a list of such, of one image each or of
            several; a mapping of columns, such as what processors make, or ``{"pixel_values": <such a tensor>,
            "interpolate_pos_encoding": True}``, or a list of these; a map-style dataset or list whose examples are
            mappings with ``pixel_values`` (or pairs of image and label); a DataLoader over one; or ImageBatches.
        batch_size: images a batch.
        limit: use only this many images, evenly spaced over the data (which may be sorted by class); None: all.
        collate_fn: makes a batch of a list of examples; by default the loader's own, or transformers' collator.
        shard: (rank, processes): every ``processes``-th batch only, from the rank's on.
        form: what the model takes, where it may be something else than images. Examples that hold several images each
            (the crops of LLaVA-NeXT) are then taken apart; what is zero all over is padding and left out.
        offset: number of the first image, in errors that name one.
        as_trained: the model was trained on these: they are as bright as they should be.

    Raises:
        InvalidDataError: there are no images, or they cannot be read in a fixed order.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int = 64,
        limit: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shard: tuple[int, int] = (0, 1),
        form: Form | None = None,
        offset: int = 0,
        as_trained: bool = False,
    ) -> None:
        if isinstance(data, (ImageBatches, DataLoader)):
            own: Any = data
            data, collate_fn = own.dataset, collate_fn or own.collate_fn
            sampler = getattr(getattr(own, "batch_sampler", None), "sampler", getattr(own, "sampler", None))
            if isinstance(sampler, SubsetRandomSampler):  # what it leaves out may be held out
                data = Subset(data, sorted(sampler.indices))
            form = form or getattr(own, "form", None)
            as_trained = as_trained or getattr(own, "as_trained", False)
        self.form, self.as_trained = form, as_trained
        data = examples_of(data, _axes(form))
        self.collate_fn = collate_fn or (data.collate if isinstance(data, Rows) else collate)
        if (
            isinstance(data, (IterableDataset, str, bytes))
            or not hasattr(data, "__getitem__")
            or not hasattr(data, "__len__")
        ):
            raise InvalidDataError(
                f"images are read several times and in order: pass a tensor, a list or a dataset with a length, not "
                f"{type(data).__name__}"
            )
        if len(data) == 0:
            raise InvalidDataError("there are no images: the data set is empty")
        if limit is not None and limit < 1:
            raise InvalidDataError(f"limit is a number of images of at least 1, not {limit}")
        if limit is not None and limit < len(data):
            data = Subset(data, [i * len(data) // limit for i in range(limit)])
        self.dataset: Any = data
        self.batch_size, self.shard, self.offset = batch_size, shard, offset

    @property
    def images(self) -> int:
        """Number of images, over all shards."""
        return len(self.dataset)

    def example(self, index: int) -> dict[str, Any]:
        """One image of the data, by its place, as a mapping; not collated."""
        return dict(_as_mapping(self.dataset[index]))

    def __len__(self) -> int:
        rank, processes = self.shard
        return len(range(rank * self.batch_size, self.images, processes * self.batch_size))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, processes = self.shard
        for start in range(rank * self.batch_size, self.images, processes * self.batch_size):
            examples = [self.dataset[i] for i in range(start, min(start + self.batch_size, self.images))]
            batch = _checked(self._collated(examples), _axes(self.form), self._place(start), self.as_trained)
            if self.form is None:
                yield batch
                continue
            if batch["pixel_values"].ndim > self.form.axes:
                batch = _taken_apart(batch)
            yield from self.form.split(batch)

    def _collated(self, examples: list[Any]) -> Any:
        try:
            return self.collate_fn([_as_mapping(example) for example in examples])
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            strange = [type(e).__name__ for e in examples if not isinstance(e, (Mapping, tuple, list))]
            if strange:
                raise InvalidDataError(
                    f"an example is a mapping with pixel_values, not {strange[0]}: put the images through the model's "
                    "image processor"
                ) from error
            raise InvalidDataError(
                f"the images cannot be put into one batch ({str(error).strip().splitlines()[0]}): they are of one "
                "size, each a tensor pixel_values (channels, height, width), and what goes with them is numbers. Put "
                "them through the model's image processor"
            ) from error

    def _place(self, start: int) -> Callable[[int], int]:
        """Place in a batch -> place in the data."""
        chosen = self.dataset.indices if isinstance(self.dataset, Subset) else None
        return lambda i: self.offset + (start + i if chosen is None else chosen[start + i])


def _as_mapping(example: Any) -> Any:
    if isinstance(example, (tuple, list)):
        image, *label = example
        return {"pixel_values": image, **({"labels": label[0]} if label else {})}
    return example


def _axes(form: Form | None) -> tuple[int, ...]:
    return (4,) if form is None else (form.axes, form.axes + 1)


def _taken_apart(batch: dict[str, Any]) -> dict[str, Any]:
    """Examples of several images each, as one batch of them; what is not of the images, or padding, is left out."""
    pixels = batch["pixel_values"]
    kept = (pixels != 0).flatten(2).any(2).flatten()
    if not kept.any():
        raise InvalidDataError("all pixel values are zero")
    every = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.ndim > 1}
    own = {name: value for name, value in every.items() if value.shape[:2] == pixels.shape[:2] and "ids" not in name}
    constant = {name: value for name, value in batch.items() if not isinstance(value, torch.Tensor)}
    return {**constant, **{name: value.flatten(0, 1)[kept] for name, value in own.items()}}


def _checked(batch: Any, axes: tuple[int, ...], place: Callable[[int], int], bright: bool) -> dict[str, Any]:
    if not isinstance(batch, Mapping) or not isinstance(batch.get("pixel_values"), torch.Tensor):
        given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidDataError(
            f"a batch needs pixel_values of shape (batch, channels, height, width), got {given}. Put the images "
            "through the model's image processor first (hf_vitprune.utils.data.ProcessedImages does)"
        )
    pixels = batch["pixel_values"]
    if pixels.ndim not in axes:
        wanted = "(batch, channels, height, width)" if 4 in axes else f"of {axes[0]} axes"
        raise InvalidDataError(f"pixel_values are {wanted}, got {tuple(pixels.shape)}")
    check_values(pixels, place, bright)
    return {name: value for name, value in batch.items() if value is not None}


#: over this, values that are never negative are those of image files, not what processors make of them
_BRIGHT = 20.0


def check_values(pixels: torch.Tensor, place: Callable[[int], int], bright: bool = False) -> None:
    """Refuse what no processor makes of images; ``place`` in the batch -> number; ``bright``: they may go to 255."""
    files = "as in image files: the model's image processor makes what the model takes of them"
    if not pixels.is_floating_point():
        raise InvalidDataError(f"pixel values are {str(pixels.dtype).removeprefix('torch.')}, {files}")
    wrong = first_not_finite(pixels)
    if wrong is not None:
        raise InvalidDataError(f"there are pixel values that are not finite numbers, in image {place(wrong)} (from 0)")
    if pixels.ndim == 4 and pixels.shape[1] not in (1, 3, 4) and pixels.shape[-1] in (1, 3, 4):
        raise InvalidDataError(
            f"images are (channels, height, width), and these are {tuple(pixels.shape[1:])}, their channels last: "
            "permute(0, 3, 1, 2)"
        )
    if not bright and pixels.numel() and float(pixels.min()) >= 0 and float(pixels.max()) > _BRIGHT:
        raise InvalidDataError(f"pixel values go from {float(pixels.min()):g} to {float(pixels.max()):g}, {files}")


# ---------------------------------------------------------------------- running a model
def run_images(model: Any, batch: Mapping[str, Any]) -> Any:
    """The model's output for a batch of :class:`ImageBatches`, by whatever of the batch its forward takes.

    Labels stay out: nothing here wants a loss. Images go to the model's device and dtype.

    Raises:
        InvalidDataError: the model does not run on them; names what is missing for another resolution.
    """
    first = next(model.parameters())
    images = batch["pixel_values"].to(first.device, first.dtype)
    others = {name: value for name, value in batch.items() if name not in ("pixel_values", "labels")}
    taken = _arguments(model) if others else set()
    kwargs = {
        name: value.to(first.device) if isinstance(value, torch.Tensor) else value
        for name, value in others.items()
        if name in taken
    }
    try:
        return model(pixel_values=images, **kwargs)
    except (torch.OutOfMemoryError, CheckpointMismatchError):
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).rstrip(".") + _cure(model, kwargs)
        raise InvalidDataError(
            f"the model does not take images of shape {tuple(images.shape[1:])}: {reason}"
        ) from error


def accepted(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a model's forward has; all of them where it takes any keyword."""
    own, open_ended = _parameters(type(model))
    return {name: value for name, value in arguments.items() if open_ended or name in own}


def _cure(model: nn.Module, given: Mapping[str, Any]) -> str:
    name = "interpolate_pos_encoding"
    if given.get(name) is True or name not in _arguments(model):
        return ""
    return (
        f'. For a resolution that is not the config\'s, give {{"pixel_values": <images>, "{name}": True}}, or a '
        "DataLoader whose collate_fn puts that into its batches"
    )


def _arguments(model: nn.Module) -> set[str]:
    """Names that the forward takes: its own, and where it hands keywords on, those of what reads the images inside."""
    own, open_ended = _parameters(type(model))
    if not open_ended:
        return own
    inside = (_parameters(type(module))[0] for module in model.modules())
    return own.union(*(names for names in inside if "pixel_values" in names))


def _parameters(kind: type) -> tuple[set[str], bool]:
    """Parameters of a class's forward and, while keywords are handed on, of its parents'; whether they still are."""
    names: set[str] = set()
    for parent in kind.__mro__:
        if parent is not nn.Module and "forward" in vars(parent):
            parameters = inspect.signature(vars(parent)["forward"]).parameters
            names |= {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return names, False
    return names, True

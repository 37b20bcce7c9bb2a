"""Numbers that are none: weights that have become so are neither exported nor saved, and images are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from ..errors import NotFiniteError
from .sharding import is_sharded

_CURE = (
    "a training diverged, or an image of it was not finite. Go back to an earlier checkpoint, and look for such "
    "images, or lower the learning rate"
)


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    real = real.half() if real.dtype.itemsize < 2 else real
    lowest, highest = real.aminmax()  # isfinite would take the memory of two more tensors of the size
    return bool(lowest.isfinite() and highest.isfinite())


def _broken(named: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of the tensors with a value that is infinite or no number; what is not present is passed over."""
    return [name for name, t in named if isinstance(t, torch.Tensor) and t.device.type != "meta" and not _finite(t)]


def check_finite(model: nn.Module, what: str, state: Mapping[str, Any] | None = None) -> None:
    """Refuse a model with weights (or a ``state``) that are no numbers, so that it is not ``what`` ("saved", say).

    One that is spread over processes is not looked at.

    Raises:
        NotFiniteError: naming the first tensor.
    """
    if state is None and is_sharded(model.parameters()):
        return
    broken = _broken(model.named_parameters() if state is None else state.items())
    if broken:
        raise NotFiniteError(
            f"{len(broken)} tensors of the {type(model).__name__} are not finite ({broken[0]}, ...), so it is not "
            f"{what}: {_CURE}"
        )


def check_images(inputs: Mapping[str, Any], step: int) -> None:
    """Refuse a batch with images that are no numbers, the first of them by name: all weights would become such."""
    pixels = inputs.get("pixel_values")
    image = first_not_finite(pixels) if isinstance(pixels, torch.Tensor) and pixels.is_floating_point() else None
    if image is not None:
        raise NotFiniteError(
            f"after {step} steps comes a batch whose image {image} (from 0) has pixel values that are not finite, "
            "which would make all weights so: look for damaged images, or for a transform that divides by zero"
        )


def check_loss(loss: torch.Tensor, step: int) -> None:
    """Refuse to train on a loss, of finite images, that is no number."""
    if not bool(loss.detach().isfinite().all()):
        raise NotFiniteError(
            f"the loss is {float(loss.detach().mean())} after {step} steps, of images that are finite: lower the "
            "learning rate, or warm it up"
        )


def check_gradients(model: nn.Module, step: int) -> None:
    """Refuse to step along gradients that are no numbers; those of a model that is spread are not looked at."""
    _check_tensors(model, ((name, p.grad) for name, p in model.named_parameters()), "gradients", step)


def check_step(model: nn.Module, step: int) -> None:
    """Refuse to train on with weights that an optimizer's step has made infinite, or no numbers."""
    _check_tensors(model, model.named_parameters(), "weights", step)


def _check_tensors(model: nn.Module, named: Iterable[tuple[str, Any]], what: str, step: int) -> None:
    present = [(name, tensor) for name, tensor in named if tensor is not None]
    tensors = [tensor for _, tensor in present]
    if is_sharded(model.parameters()) or is_sharded(tensors) or all_finite_fast(tensors):
        return
    broken = _broken(present)
    raise NotFiniteError(
        f"{len(broken)} {what} of the {type(model).__name__} are not finite after {step} steps ({broken[0]}, ...): "
        "the training diverges. Look for images that are not finite, or lower the learning rate"
    )


@torch.no_grad()
def all_finite_fast(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all of many tensors are finite, with one wait for a device.

    By their lengths, in one pass (largest magnitudes take six times as long on CPUs). One that overflows says nothing:
    then all values are looked at.
    """
    present = [tensor.detach() for tensor in tensors if tensor is not None and tensor.numel()]
    return not present or bool(get_total_norm(present).isfinite()) or all(map(_finite, present))


def first_not_finite(images: torch.Tensor) -> int | None:
    """Place of the first image of a batch that holds a value that is no number; None where there is none."""
    wrong = (~torch.isfinite(images)).flatten(1).any(1)
    return int(wrong.int().argmax()) if bool(wrong.any()) else None

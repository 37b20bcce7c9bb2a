"""Numbers that are none: weights that have become so are neither exported nor saved, and images are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import NotFiniteError
from .sharding import is_sharded

_CURE = (
    "a training diverged, or an image of it was not finite. Go back to an earlier checkpoint, and look for such "
    "images, or lower the learning rate"
)


def not_finite(named: Iterable[tuple[str, Any]]) -> list[str]:
    """Names of the tensors with a value that is infinite or no number; what is not present is passed over."""
    return [name for name, t in named if isinstance(t, torch.Tensor) and t.device.type != "meta" and not _finite(t)]


def _finite(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.detach().isfinite().all())


def check_finite(model: nn.Module, what: str, state: Mapping[str, Any] | None = None) -> None:
    """Refuse a model with weights that are no numbers.

    Args:
        model: one that is spread over processes is not looked at.
        what: is not done with it: "saved", say.
        state: what is looked at in the place of its parameters.

    Raises:
        NotFiniteError: naming the first tensor.
    """
    if state is None and is_sharded(model.parameters()):
        return
    broken = not_finite(model.named_parameters() if state is None else state.items())
    if broken:
        raise NotFiniteError(
            f"{len(broken)} tensors of the {type(model).__name__} are not finite ({broken[0]}, ...), so it is not "
            f"{what}: {_CURE}"
        )


@torch.no_grad()
def all_finite_fast(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all of many tensors are finite, with one wait for a device."""
    present = [tensor.detach() for tensor in tensors if tensor is not None and tensor.numel()]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in present:
        by_device.setdefault(tensor.device, []).append(tensor)
    return all(
        bool(torch.stack([norm.float() for norm in torch._foreach_norm(held, float("inf"))]).isfinite().all())
        for held in by_device.values()
    )


def first_not_finite(images: torch.Tensor) -> int | None:
    """Place of the first image of a batch that holds a value that is no number; None where there is none."""
    wrong = (~torch.isfinite(images)).flatten(1).any(1)
    return int(wrong.int().argmax()) if bool(wrong.any()) else None

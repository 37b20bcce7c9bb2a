"""The residual stream: norms over it or over some of its channels, and what follows its width outside the layers.

What follows it is found by comparing two skeletons of the stock class on the meta device, of two widths: an axis whose
length differs carries the stream. Modules that the stock class has not got (custom heads) are cut where they are plain
readers of the stream, and refused by name elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import UnsupportedUnitError
from ..utils.mixing import InPlaceMixin, mix_into, stock_type
from ..utils.modules import get, named_tensors, resize_tensor, unwrapped

#: names under which RMSNorms keep the number that is added to the mean square
_EPSILONS = ("eps", "variance_epsilon")


def norm_kind(module: nn.Module) -> str | None:
    """``"layer"`` for a LayerNorm, ``"rms"`` for torch's RMSNorm or one of transformers'; None for all else."""
    if stock_type(module) is nn.LayerNorm:
        return "layer"
    if isinstance(module, nn.RMSNorm) or (
        stock_type(module).__name__.endswith("RMSNorm")
        and set(module._parameters) == {"weight"}
        and any(hasattr(module, name) for name in _EPSILONS)
    ):
        return "rms"
    return None


def norm_width(module: Any) -> int | None:
    """Channels that a norm runs over; None for what is no norm."""
    if norm_kind(module) is None:
        return None
    weight = module._parameters.get("weight")
    return module.normalized_shape[-1] if weight is None else len(weight)


def norm_over(norm: Any, input: torch.Tensor, kept: torch.Tensor, count: int) -> torch.Tensor:
    """What a norm gives whose statistics run over the kept channels only; the removed ones come out as zero.

    Kept channels around their mean, and zeros elsewhere, have mean zero over all channels and ``count / channels`` of
    the variance over the kept ones: the fused kernel then does the rest. Picking channels by index is far slower.

    Args:
        norm: LayerNorm or RMSNorm over all channels.
        input: (..., channels); the result is in float32 or wider.
        kept: (channels,) ones and zeros, ``count`` of them ones.
    """
    _check_known(norm)
    dtype = torch.promote_types(input.dtype, torch.float32)
    kept = kept.to(dtype)
    share = count / len(kept)
    scale = kept * share**0.5 if norm.weight is None else norm.weight.to(dtype) * kept * share**0.5
    inputs = input.to(dtype) * kept
    if norm_kind(norm) == "rms":
        values = [getattr(norm, name) for name in _EPSILONS if getattr(norm, name, None) is not None]
        epsilon = values[0] if values else torch.finfo(input.dtype).eps  # torch's default
        return F.rms_norm(inputs, (len(kept),), scale, epsilon * share)
    centred = torch.addcmul(inputs, inputs.sum(-1, keepdim=True) / count, kept, value=-1)
    shift = None if norm.bias is None else norm.bias.to(dtype) * kept
    return F.layer_norm(centred, (len(kept),), scale, shift, norm.eps * share)


def _check_known(norm: nn.Module) -> None:
    if norm_kind(norm) is None:
        raise UnsupportedUnitError(
            f"the residual stream passes a {type(norm).__name__}, whose statistics over some channels are not known: "
            "leave the unit 'embedding' out (units=...)"
        )


class MaskedNormMixin(InPlaceMixin):
    """A norm over the kept channels: a full-size model computes with it what the narrow one computes."""

    kept: torch.Tensor
    kept_count: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        normed = norm_over(self, input, self.kept, self.kept_count)
        return normed if torch.is_autocast_enabled(input.device.type) else normed.to(input.dtype)


def mask_norm(norm: nn.Module, kept: torch.Tensor) -> None:
    """Turn a norm, in place, into one over the channels ``kept`` (ascending indices); unknown kinds are refused."""
    _check_known(norm)
    zeros = torch.zeros(norm_width(norm) or 0, device=kept.device)
    mix_into(norm, MaskedNormMixin)
    masked: Any = norm
    masked.kept_count = len(kept)
    norm.register_buffer("kept", zeros.index_fill(0, kept, 1.0), persistent=False)


Shape = tuple[int, ...]


@dataclass
class Outer:
    """Tensors and norms outside the layers that carry the residual stream."""

    #: name of a tensor -> the axes that carry the stream (some of them several times side by side)
    axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    #: paths of norms of a custom head that run over the stream, with weights or without
    norms: list[str] = field(default_factory=list)


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}


def find_outer(
    model: nn.Module,
    wide: nn.Module,
    narrow: nn.Module,
    layers: tuple[str, ...],
    width: int,
    narrowed: int,
    whole: bool = True,
) -> Outer:
    """Which axes outside the layers follow the residual width; what reads it in another way is refused by name.

    Args:
        model: the live one.
        wide, narrow: skeletons of the stock class behind it, of residual width ``width`` and ``narrowed``.
        layers: prefixes of the layers, which are not looked at.
        whole: all of the model belongs to the tower: what the stock class has not got may read the stream. False: a
            bigger model, where only what follows the width is looked at.
    """
    before, after = shapes_of(wide), shapes_of(narrow)
    others = (name for name in before.keys() ^ after.keys() if not name.startswith(layers))
    different = sorted(name for name in others if not name.endswith("input_index"))
    if different:
        raise UnsupportedUnitError(
            f"a {type(model).__name__} has other modules at another width (first: {different[0]}): leave the unit "
            "'embedding' out (units=...)"
        )
    found, custom = Outer(), set()
    for name, tensor in named_tensors(model):
        if name.startswith(layers):
            continue
        expected = before.get(name)
        lengths = zip(before.get(name, ()), after.get(name, ()), strict=True)
        axes = tuple(axis for axis, (one, other) in enumerate(lengths) if one != other)
        if expected is None or len(expected) != tensor.ndim or any(tensor.shape[a] != expected[a] for a in axes):
            if whole or axes:
                custom.add(custom_root(model, wide, name))
        elif any(after[name][a] * width != expected[a] * narrowed for a in axes):
            raise UnsupportedUnitError(
                f"{name} reads the residual stream of {width} channels beside something else: leave the unit "
                "'embedding' out (units=...)"
            )
        elif axes and whole:
            found.axes[name] = axes
        elif axes:
            _add_reader(found, model, name, axes)
    if whole:
        known = dict(wide.named_modules())
        custom |= {  # norms without weights
            path
            for path, module in model.named_modules()
            if getattr(module, "weight", 0) is None and norm_width(module) == width
            if not path.startswith(layers) and path not in known
        }
    for root in sorted(custom):
        if not any(root.startswith(f"{other}.") for other in custom):
            _add_readers(found, model, root, width)
    return found


#: kind of module -> the axis of its weight that its inputs are on
_INPUTS = {nn.Linear: (1,), nn.Conv2d: (1,), nn.ConvTranspose2d: (0,)}


def _add_reader(found: Outer, model: nn.Module, name: str, axes: tuple[int, ...]) -> None:
    """A tensor of a bigger model that follows the width of its tower: of what reads the stream, or of a norm on it."""
    path, _, leaf = name.rpartition(".")
    module = get(model, path)
    if norm_kind(module) is not None:
        if path not in found.norms:
            found.norms.append(path)
    elif leaf != "weight" or axes != _INPUTS.get(type(module)):
        raise UnsupportedUnitError(
            f"{path} follows the width of the tower in another way than by reading it ({type(module).__name__}."
            f"{leaf}): leave the unit 'embedding' out (units=...)"
        )
    found.axes[name] = axes


def custom_root(model: nn.Module, stock: nn.Module, name: str) -> str:
    """The topmost module on the way to a tensor that is not the stock class's own; the tensor's module if all are."""
    parts = name.split(".")[:-1]
    there = dict(stock.named_modules())
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in there or stock_type(get(model, path)) is not stock_type(there[path]):
            return path
    return ".".join(parts)


def _add_readers(found: Outer, model: nn.Module, root: str, width: int) -> None:
    """Take in a custom module that reads the stream: a Linear or norm on it, or a Sequential that begins with them."""
    steps = [(root, unwrapped(get(model, root)))]
    while steps:
        path, module = steps.pop(0)
        if isinstance(module, nn.Sequential):
            steps = [(f"{path}.{name}", unwrapped(child)) for name, child in module.named_children()] + steps
        elif isinstance(module, nn.Linear) and module.in_features % width == 0:
            found.axes[f"{path}.weight"] = (1,)
            return  # what comes behind reads its outputs
        elif norm_width(module) == width:
            found.norms.append(path)
            found.axes.update(
                {f"{path}.{name}": (0,) for name in module._parameters if module._parameters[name] is not None}
            )
        elif isinstance(module, nn.BatchNorm1d) and module.num_features == width:
            found.axes.update({f"{path}.{name}": (0,) for name, t in module.state_dict().items() if t.ndim})
        elif next(named_tensors(module), None) is not None:
            raise UnsupportedUnitError(
                f"{path} is a {type(module).__name__} that the stock class has not got, and it may read the residual "
                f"stream of {width} channels in a way that is not known here: leave the unit 'embedding' out "
                "(units=...), or put a Linear or a LayerNorm on the stream in its place"
            )


def narrow_outer(model: nn.Module, outer: Outer, width: int, kept: int) -> None:
    """Give the axes that follow the residual width their new length, in place; new tensors are empty."""
    shapes = shapes_of(model)
    for name, axes in outer.axes.items():
        shape = list(shapes[name])
        for axis in axes:
            shape[axis] = shape[axis] // width * kept
        resize_tensor(model, name, tuple(shape))
    for path in outer.norms:
        norm = get(model, path)
        if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
            norm.normalized_shape = (kept,)

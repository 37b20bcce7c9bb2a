"""What lies outside the layers and follows the residual width: found by comparing two skeletons, never listed by hand.

The same stock class is built on the meta device at two widths; an axis whose length differs carries the residual
stream. Modules that the stock class has not got (custom heads) are cut where they are plain readers of the stream,
and refused by name elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from ..errors import UnsupportedUnitError
from ..utils.mixing import stock_type
from ..utils.modules import get, named_tensors, resize_tensor, unwrapped
from .norms import norm_kind, norm_width

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
    """Which axes outside the layers follow the residual width.

    Args:
        model: the live one.
        wide, narrow: skeletons of the stock class behind it, of residual width ``width`` and ``narrowed``.
        layers: prefixes of the layers, which are not looked at.
        whole: all of the model belongs to the tower: what the stock class has not got may read the stream. False: a
            bigger model, where only what follows the width is looked at.

    Raises:
        UnsupportedUnitError: names a module that reads the stream, and is no plain Linear or norm on it.
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
        custom |= {path for path in _bare_norms(model, width) if not path.startswith(layers) and path not in known}
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


def _bare_norms(model: nn.Module, width: int) -> Iterator[str]:
    for path, module in model.named_modules():
        if getattr(module, "weight", 0) is None and norm_width(module) == width:
            yield path


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
        elif any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
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

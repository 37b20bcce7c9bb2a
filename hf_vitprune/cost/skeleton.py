"""What no size of a layer tells: the model around the layers, and biases and norms inside of them.

Both are read from models that are built on the meta device, one layer a stage: no family lists them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from ..families import LayerPaths
from ..modeling import class_for_task, config_for
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from ..utils.modes import on_meta

#: answers that are kept, one a config, class, width and image size
REMEMBERED = 4096


class Part(NamedTuple):
    """Cost of one part of a model for one image: elements of weight matrices, other parameters, multiply-adds."""

    name: str
    weights: int
    others: int
    macs: int


class LayerTensors(NamedTuple):
    """The small tensors of a layer: first, how many of its Linears have a bias (several may feed the neurons)."""

    q: int
    k: int
    v: int
    o: int
    fc1: int
    fc2: int
    #: vectors of the residual width around the mixer (2 for a LayerNorm, 1 for LayerScale), and around the MLP
    mixer: int
    mlp: int
    #: parameters that every head has besides (a position table), and those of the mixer that follow no size of it
    head: int
    rest: int


def layer_tensors(architecture: Architecture) -> list[LayerTensors]:
    """The small tensors of the dense layers of every kind; those of one stage have the same."""

    def read() -> list[LayerTensors]:
        dense = architecture.unpruned
        model, layers = _skeleton(dense, dense.hidden_size, empty=False)
        return [_read_layer(model, paths) for paths in layers[: max(dense.stages) + 1]]

    found = _remember(("layers", _digest(architecture.config), architecture.task), read)
    return found if architecture.depths is not None else found * (1 + max(architecture.kinds))


def outside(architecture: Architecture, hidden_size: int, size: tuple[int, int] | None) -> Part:
    """Everything outside the layers, at a residual width (of the first stage), for an image of ``size`` pixels."""
    key = ("outside", _digest(architecture.config), architecture.task, hidden_size, size)
    return _remember(key, lambda: _count_outside(architecture.unpruned, hidden_size, size))


# ---------------------------------------------------------------------- memory
_known: OrderedDict[Any, Any] = OrderedDict()


def _remember(key: Any, make: Callable[[], Any]) -> Any:
    if key not in _known:
        _known[key] = make()
        if len(_known) > REMEMBERED:
            _known.popitem(last=False)
    return _known[key]


def _digest(config: PreTrainedConfig) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


# ---------------------------------------------------------------------- skeletons
def _skeleton(dense: Architecture, hidden_size: int, empty: bool) -> tuple[Any, list[LayerPaths]]:
    """A model of the dense one's class with the first layer of every stage, or an empty one in its place."""
    neck = dense.family.has_neck(dense.config, dense.task)  # which reads all layers
    stages = sorted(set(dense.stages))
    first = list(dense.layers) if neck else [dense.layers[dense.stages.index(stage)] for stage in stages]
    if empty:
        first = [LayerShape("none", shifted=shape.shifted) for shape in first]
    depths = None
    if dense.depths is not None:  # the last stages may be empty
        depths = (*[1] * len(first), *[0] * (len(dense.depths) - len(first)))
    small = replace(dense, layers=tuple(first), hidden_size=hidden_size, depths=depths)
    config = config_for(small)
    config._attn_implementation = "eager"  # fused kernels cannot be counted
    with on_meta():
        model: Any = class_for_task(dense.family, dense.task)(config)
    return model.eval(), layer_paths(model, small)


def _read_layer(model: nn.Module, paths: LayerPaths) -> LayerTensors:
    shapes = {n: p.shape for n, p in model.named_parameters() if n.startswith(f"{paths.layer}.")}
    linears = (paths.q, paths.k, paths.v, paths.o, *paths.fc1, paths.fc2)
    for path in linears:
        shapes.pop(f"{path}.weight")
    q, k, v, o, *fc1, fc2 = (int(shapes.pop(f"{path}.bias", None) is not None) for path in linears)

    def vectors(*modules: str | None) -> int:
        names = [n for n in shapes for m in modules if m is not None and (n == m or n.startswith(f"{m}."))]
        return sum(shapes.pop(name).numel() // width for name in names)

    width = len(model.get_parameter(f"{paths.fc2}.weight"))
    mixer, mlp = vectors(paths.norm1, paths.scale1), vectors(paths.norm2, paths.scale2)
    head = sum((shape := shapes.pop(name)).numel() // shape[axis] for name, axis in paths.per_head)
    return LayerTensors(q, k, v, o, sum(fc1), fc2, mixer, mlp, head, sum(s.numel() for s in shapes.values()))


#: modules with a weight matrix, which no bias, norm, token or position is
_HAVE_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.MultiheadAttention)


def _count_outside(dense: Architecture, hidden_size: int, size: tuple[int, int] | None) -> Part:
    model, _ = _skeleton(dense, hidden_size, empty=True)
    matrices = [
        module._parameters.get("in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight")
        for module in model.modules()
        if isinstance(module, _HAVE_MATRICES)
    ]
    weights = sum(matrix.numel() for matrix in matrices if matrix is not None)
    others = sum(p.numel() for p in model.parameters()) - weights
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**dense.family.inputs(dense.config, size, "meta", dense.task))
    return Part("outside the layers", weights, others, counter.get_total_flops() // 2)

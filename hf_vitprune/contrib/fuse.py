"""BatchNorm of convolution mixers folded into the convolution, for inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import InvalidPlanError
from ..modeling.conv_mixer import ConvMixer
from ..modeling.peft_twin import is_peft
from ..modeling.structure import get, layer_paths
from ..plan.lineage import lineage_of
from ..plan.plan import PruningPlan
from ..pruning import prune
from ..spec.architecture import Architecture, unwrap

#: parts of a record's info that hold for one shape only; a new plan writes them itself
_OF_THE_SHAPE = ("plan", "kept_layers")


def fuse_bn(model: Any) -> Any:
    """A new model without BatchNorm in its convolution mixers: same outputs in eval mode, a little faster.

    The convolutions get a bias and the config records it (``batch_norm`` false), so the model saves and loads as any
    other. It is for inference: trained further, it has nothing that normalises.

    Args:
        model: a pruned model with convolution mixers.

    Raises:
        InvalidPlanError: no layer has a BatchNorm to fold, or the model has adapters.
    """
    if is_peft(model):
        raise InvalidPlanError("the model has adapters; merge them first (merge_and_unload), then fold its BatchNorm")
    model = unwrap(model)
    source = Architecture.of(model)
    if not any(shape.batch_norm for shape in source.layers):
        raise InvalidPlanError("the model has no convolution mixer with a BatchNorm to fold")
    plan = PruningPlan.dense(source)
    weights: dict[str, torch.Tensor] = {}
    for paths, shape in zip(layer_paths(model, source), source.layers, strict=True):
        if shape.batch_norm:
            weights |= {f"{paths.attention}.{k}": v for k, v in _folded(get(model, paths.attention)).items()}
    layers = (replace(e, batch_norm=False) if e.batch_norm else e for e in plan.layers)
    info = {k: v for k, v in lineage_of(model.config).items() if k not in _OF_THE_SHAPE}
    return prune(model, replace(plan.with_layers(layers), weights=weights, info=info)).eval()


def _folded(mixer: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the mixer without BatchNorm: folded in double precision, kept in the mixer's own."""
    assert isinstance(mixer, ConvMixer) and isinstance(mixer.norm, nn.BatchNorm2d)
    state = {name: tensor.detach() for name, tensor in mixer.state_dict().items()}
    weight = state["conv.weight"]
    factor = state["norm.weight"].double() / (state["norm.running_var"].double() + mixer.norm.eps).sqrt()
    bias = state["norm.bias"].double() - state["norm.running_mean"].double() * factor
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    new = (weight.double() * factor[:, None, None, None]).to(weight.dtype)
    return {**kept, "conv.weight": new, "conv.bias": bias.to(weight.dtype)}

"""BatchNorm of convolution mixers folded into the convolution, for inference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import InvalidPlanError
from ..modeling.conv_mixer import ConvMixer
from ..modeling.peft_twin import is_peft
from ..plan.lineage import lineage_of
from ..plan.plan import PruningPlan
from ..pruning import prune
from ..spec.architecture import Architecture, unwrap
from ..utils.modules import get
from .own_layers import own_layers

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
        UnsupportedModelError: it is a bigger model with towers in it.
    """
    if is_peft(model):
        raise InvalidPlanError("the model has adapters; merge them first (merge_and_unload), then fold its BatchNorm")
    model = unwrap(model)
    mixers = [paths.attention for paths, shape in own_layers(model) if shape.batch_norm]
    if not mixers:
        raise InvalidPlanError("the model has no convolution mixer with a BatchNorm to fold")
    plan = PruningPlan.dense(Architecture.of(model))
    weights = {f"{path}.{k}": v for path in mixers for k, v in _folded(get(model, path)).items()}
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

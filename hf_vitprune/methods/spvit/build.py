"""What a search makes of each layer of a model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...families import LayerPaths
from ...modeling.conv_mixer import ConvMixer
from ...modeling.structure import get
from ...spec.architecture import Architecture
from ...spec.layer_shape import KERNELS
from .branches import Attention, Branches, OwnBranches, SharedBranches
from .config import SPViTConfig
from .cost import mixer_shape
from .gates import Annealing, MixerGates
from .hooks import MixerSearch

#: temperature of the mixing table, by family; others as ViT
MIXING_TEMPERATURES = {"swin": 100.0}
MIXING_TEMPERATURE = 0.01


def mixer_search(
    model: PreTrainedModel,
    architecture: Architecture,
    i: int,
    paths: LayerPaths,
    config: SPViTConfig,
    annealing: Annealing,
) -> MixerSearch:
    """What layer ``i`` of ``model``, one of attention, may mix its tokens with."""
    attention = attention_of(model, architecture, i, paths)
    device = next(model.parameters()).device
    special = architecture.family.extra_tokens_of(architecture.config)
    gates = MixerGates(config.initial_score, annealing, device)
    return MixerSearch(gates, _branches(architecture, i, config, device), attention, special)


def attention_of(model: PreTrainedModel, architecture: Architecture, i: int, paths: LayerPaths) -> Attention:
    """The attention of layer ``i``."""
    v, o = checked_linear(model, paths.v), checked_linear(model, paths.o)
    return Attention(get(model, paths.attention), v, o, architecture.family.o, architecture.width(i))


def _branches(architecture: Architecture, i: int, config: SPViTConfig, device: torch.device) -> Branches:
    shape, family = architecture.layers[i], architecture.family
    if config.single_path:
        tau = config.mixing_temperature
        tau = MIXING_TEMPERATURES.get(family.model_type, MIXING_TEMPERATURE) if tau is None else tau
        return SharedBranches(shape.heads, shape.v_dim, tau, device)
    width = architecture.width(i)
    # they see patches only
    return OwnBranches({kind: ConvMixer(mixer_shape(shape, kind), width, 0, family.o).to(device) for kind in KERNELS})


def checked_linear(model: PreTrainedModel, path: str) -> nn.Linear:
    """A Linear whose weights can be multiplied by gates.

    Raises:
        UnsupportedModelError: it is something else, or quantised.
    """
    module = get(model, path)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise UnsupportedModelError(
            f"SPViT makes convolutions of the weights of {path}, a {type(module).__name__}: load the model in "
            "floating point, without quantisation or adapters"
        )
    return module

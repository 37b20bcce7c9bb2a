"""What a search makes of each layer of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import InvalidConfigError, UnsupportedModelError
from ...families import LayerPaths
from ...modeling.structure import conv_mixer, get
from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture
from ...spec.layer_shape import KERNELS
from .branches import Attention, Branches, OwnBranches, SharedBranches
from .config import SPViTConfig
from .cost import mixer_shape
from .gates import Annealing, MixerGates
from .mixing import MixerSearch

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
    like = next(model.parameters())
    special = architecture.family.extra_tokens_of(architecture.config)
    gates = MixerGates(config.initial_score, annealing, like.device)
    return MixerSearch(gates, _branches(architecture, i, config, like), attention, special, config.gate_gradients)


def attention_of(model: PreTrainedModel, architecture: Architecture, i: int, paths: LayerPaths) -> Attention:
    """The attention of layer ``i``."""
    v, o = checked_linear(model, paths.v), checked_linear(model, paths.o)
    return Attention(get(model, paths.attention), v, o, architecture.family.o, architecture.width(i))


def _branches(architecture: Architecture, i: int, config: SPViTConfig, like: torch.Tensor) -> Branches:
    if config.single_path:
        return shared_branches(architecture, i, config.mixing_temperature, like)
    shape, family, width = architecture.layers[i], architecture.family, architecture.width(i)
    # they see patches only
    mixers = {kind: conv_mixer(mixer_shape(shape, kind), width, 0, family.o) for kind in KERNELS}
    return OwnBranches(mixers).to(like.device, like.dtype)


def shared_branches(
    architecture: Architecture, i: int, temperature: float | None, like: torch.Tensor, kinds: Iterable[str] = KERNELS
) -> SharedBranches:
    """Convolutions of layer ``i`` made of its attention's weights: a table of ones, and fresh BatchNorms.

    Args:
        architecture: of the model.
        i: the layer, one of attention.
        temperature: of the table; None: that of the family.
        like: a weight of the model: the new tensors are on its device, and as precise, at least float32.
        kinds: of convolutions that there are.
    """
    shape, family = architecture.layers[i], architecture.family
    if temperature is None:
        temperature = MIXING_TEMPERATURES.get(family.model_type, MIXING_TEMPERATURE)
    branches = SharedBranches(shape.heads, shape.v_dim, temperature, like.device, kinds)
    return branches.to(torch.promote_types(like.dtype, torch.float32))


@torch.no_grad()
def convolution_weights(
    plan: PruningPlan, branches: Mapping[int, Branches], attentions: Mapping[int, Attention], paths: list[LayerPaths]
) -> dict[str, torch.Tensor]:
    """The weights of the convolutions that a plan has, by their names in the small model, which keeps every layer.

    Args:
        plan: says the mixer of every layer.
        branches: by number of the layer.
        attentions: whose weights they are made of, by number of the layer.
        paths: of all layers.
    """
    weights: dict[str, torch.Tensor] = {}
    for entry in plan.layers:
        if entry.index in branches and entry.mixer in KERNELS:
            made = branches[entry.index].weights(entry.mixer, attentions[entry.index])
            weights |= {f"{paths[entry.index].attention}.{name}": tensor for name, tensor in made.items()}
    return weights


def refuse_zero(how: str) -> None:
    """Raises:
    InvalidConfigError: the model is trained under DeepSpeed.
    """
    if how != "fsdp2":
        raise InvalidConfigError(
            "SPViT uses weights outside of their Linears, and other branches on every process, which DeepSpeed does "
            "not follow: use FSDP2 or DDP"
        )


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

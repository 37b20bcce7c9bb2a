"""From a stock skeleton to the sizes of an architecture: replaces what differs, on the device it finds."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import Family, LayerPaths
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from ..utils.mixing import mix_into
from .blocks import PrunedAttentionMixin, PrunedMlpMixin, RemovedAttention, RemovedMlp
from .conv_mixer import ConvMixer, IdentityMixer, follow_grid


def get(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def get_wrapped(model: nn.Module, path: str) -> nn.Module:
    """The module of that name before PEFT wrapped the parts it is in; itself with its wrapper, if it has one."""
    module = model
    for name in path.split("."):
        while name not in module._modules and "base_layer" in module._modules:
            module = get(module, "base_layer")
        module = get(module, name)
    return module


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def resize_linear(model: nn.Module, path: str, inputs: int, outputs: int) -> None:
    """Give a Linear other sizes, in place: its weights are new and empty."""
    linear = get(model, path)
    assert isinstance(linear, nn.Linear)
    if (linear.in_features, linear.out_features) != (inputs, outputs):
        linear.in_features, linear.out_features = inputs, outputs
        linear.weight = nn.Parameter(linear.weight.new_empty(outputs, inputs))
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.new_empty(outputs))


def layer_paths(model: PreTrainedModel, architecture: Architecture) -> list[LayerPaths]:
    """Paths of the parts of every layer of ``model``."""
    family = architecture.family
    prefix = family.encoder_path(model)
    return [family.layer_paths(prefix, name, architecture.config) for name in architecture.layer_names()]


def apply_architecture(model: PreTrainedModel, architecture: Architecture) -> None:
    """Give every layer of a skeleton (right depth and residual width) the sizes of ``architecture``, in place."""
    family = architecture.family
    for i, (paths, shape) in enumerate(zip(layer_paths(model, architecture), architecture.layers, strict=True)):
        family.configure_layer(get(model, paths.layer), architecture.config, shape.shifted)
        if shape.mixer == "attention":
            _apply_attention(model, family, paths, shape, architecture.width(i), architecture.scaling(i))
        else:
            replace_mixer(model, family, architecture.config, paths, shape, architecture.width(i))
            if shape.mixer == "none":
                _drop(model, paths.norm1, paths.scale1)
        _apply_mlp(model, paths, shape, architecture.width(i))
    finish_mixers(model, family)


def _apply_attention(
    model: PreTrainedModel, family: Family, paths: LayerPaths, shape: LayerShape, width: int, scaling: float
) -> None:
    inputs = width if shape.attention_in is None else shape.attention_in
    for path in (paths.q, paths.k):
        resize_linear(model, path, inputs, shape.heads * shape.qk_dim)
    resize_linear(model, paths.v, inputs, shape.heads * shape.v_dim)
    resize_linear(model, paths.o, shape.heads * shape.v_dim, width)
    if paths.bias_table:
        path = paths.bias_table.rpartition(".")[0]
        old = get(model, path)
        put(model, path, type(old)(shape.heads, old.window_size))
    attention = get(model, paths.attention)
    mix_into(attention, PrunedAttentionMixin)
    attention.set_shape(shape, scaling, family)  # type: ignore[operator]
    _register_inputs(attention, shape.attention_in, width)


def replace_mixer(
    model: nn.Module, family: Family, config: PreTrainedConfig, paths: LayerPaths, shape: LayerShape, width: int
) -> None:
    """Put another mixer in the place of a layer's attention; :func:`finish_mixers` must follow.

    Args:
        model: stock or pruned.
        family: of the model.
        config: of the family's dense model.
        paths: of the layer.
        shape: says the mixer, which is not attention.
        width: of the residual stream.
    """
    if shape.mixer == "none":
        put(model, paths.attention, RemovedAttention())
        return
    if shape.mixer == "identity":
        mixer: nn.Module = IdentityMixer()
    else:
        mixer = ConvMixer(shape, width, family.extra_tokens_of(config), family.o)
    put(model, paths.attention, mixer)
    if family.grid_layer is not None:
        mix_into(get(model, paths.layer), family.grid_layer)


def finish_mixers(model: nn.Module, family: Family) -> None:
    """Let a model with convolution mixers tell them the grid of patches."""
    if family.grid_layer is None:
        follow_grid(get(model, family.encoder_path(model).rstrip(".")))


def _apply_mlp(model: PreTrainedModel, paths: LayerPaths, shape: LayerShape, width: int) -> None:
    if shape.mlp == 0:
        put(model, paths.mlp, RemovedMlp())
        _drop(model, paths.norm2, paths.scale2)
        return
    for path in paths.fc1:
        resize_linear(model, path, width if shape.mlp_in is None else shape.mlp_in, shape.mlp)
    resize_linear(model, paths.fc2, shape.mlp, width)
    if shape.mlp_in is not None:
        mlp = get(model, paths.mlp)
        mix_into(mlp, PrunedMlpMixin)
        _register_inputs(mlp, shape.mlp_in, width)


def _register_inputs(module: nn.Module, count: int | None, width: int) -> None:
    if count is not None:
        device = next(module.parameters()).device
        module.register_buffer("input_index", torch.arange(count, device=device))


def _drop(model: nn.Module, norm: str, scale: str | None) -> None:
    """The norm and LayerScale of a removed branch have nothing left to do."""
    put(model, norm, nn.Identity())
    if scale is not None:
        put(model, scale, nn.Identity())


def materialize(model: PreTrainedModel, device: torch.device) -> None:
    """Give a meta skeleton real, initialised weights on ``device``."""
    model.to_empty(device=device)
    for module in model.modules():
        index = getattr(module, "input_index", None)
        if isinstance(index, torch.Tensor):
            module.input_index = torch.arange(len(index), device=device)  # any choice: there are no weights yet
    model.initialize_weights()

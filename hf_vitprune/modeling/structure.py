"""New sizes for the layers of a live model, in place: the only code that changes shapes of layers.

Surgery runs it on a copy of the user's model, loading on the skeleton that the config makes. Modules keep their
identity wherever they can, so that hooks, subclasses and swapped activations stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import UnsupportedModelError
from ..families import Family, LayerPaths
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from ..utils.mixing import InPlaceMixin, mix_into, stock_type, unmix
from ..utils.modules import get, owner, put, resize_tensor
from .blocks import PrunedAttentionMixin, PrunedInputsMixin, RemovedAttention, RemovedMlp, set_attention_sizes
from .conv_mixer import ConvMixer, IdentityMixer, follow_grid


def layer_paths(model: PreTrainedModel, architecture: Architecture) -> list[LayerPaths]:
    """Paths of the parts of every layer of ``model``."""
    family = architecture.family
    prefix = family.encoder_path(model)
    return [family.layer_paths(prefix, name, architecture.config) for name in architecture.layer_names()]


def resize_(model: PreTrainedModel, architecture: Architecture, kept: Sequence[int] | None = None) -> None:
    """Give every layer of ``model`` the sizes of ``architecture``, in place; new tensors are empty.

    The residual width outside the layers is not touched (see ``outer.py``).

    Args:
        model: stock or pruned, of the architecture's family, with at least its layers.
        kept: positions of the layers that stay, ascending; the first ones of every stage by default.
    """
    family = architecture.family
    _drop_layers(model, architecture, kept)
    own = any(shape.kernel for shape in architecture.layers)  # those tell every layer the grid of patches
    for i, (paths, shape) in enumerate(zip(layer_paths(model, architecture), architecture.layers, strict=True)):
        width = architecture.width(i)
        layer = get(model, paths.layer)
        family.configure_layer(layer, architecture.config, shape.shifted)
        if shape.mixer == "attention":
            _resize_attention(model, architecture, i, paths, own)
        else:
            family.without_attention(layer)
            _resize_mixer(model, family, architecture.config, paths, shape, width)
        _resize_around(model, paths.norm1, paths.scale1, 0 if shape.mixer == "none" else width)
        _resize_mlp(model, paths, shape, width)
    finish_mixers(model, family)


def _drop_layers(model: PreTrainedModel, architecture: Architecture, kept: Sequence[int] | None) -> None:
    family = architecture.family
    prefix = family.encoder_path(model)
    start = 0
    for path, count in architecture.layer_lists().items():
        layers: Any = get(model, prefix + path)
        there = len(layers)
        stay = set(range(count)) if kept is None else {k - start for k in kept if start <= k < start + there}
        for i in reversed(range(there)):
            if i not in stay:
                del layers[i]
        start += there


def resize_linear(model: nn.Module, path: str, inputs: int, outputs: int) -> None:
    """Give a Linear other sizes, in place: its new weights are empty."""
    linear = get(model, path)
    resize_tensor(model, f"{path}.weight", (outputs, inputs))
    if linear._parameters.get("bias") is not None:
        resize_tensor(model, f"{path}.bias", (outputs,))


def _resize_around(model: nn.Module, norm: str, scale: str | None, width: int) -> None:
    """Norm and LayerScale of a branch, over the residual stream; 0: the branch is gone, and they go with it."""
    if not width:
        put(model, norm, nn.Identity())
    for name in list(get(model, norm)._parameters):
        resize_tensor(model, f"{norm}.{name}", (width,))
    if scale is not None and width:
        resize_tensor(model, scale, (width,))
    elif scale is not None:
        module, name = owner(model, scale)
        delattr(module, name)
        setattr(module, name, torch.tensor(1.0, device="cpu"))  # stock code initialises what is there


def _resize_attention(
    model: PreTrainedModel, architecture: Architecture, i: int, paths: LayerPaths, own: bool
) -> None:
    family, shape, width = architecture.family, architecture.layers[i], architecture.width(i)
    scaling = architecture.scaling(i)
    inputs = width if shape.attention_in is None else shape.attention_in
    for path in (paths.q, paths.k):
        resize_linear(model, path, inputs, shape.heads * shape.qk_dim)
    resize_linear(model, paths.v, inputs, shape.heads * shape.v_dim)
    resize_linear(model, paths.o, shape.heads * shape.v_dim, width)
    for name, axis in paths.per_head:
        sizes = list(model.get_parameter(name).shape)
        sizes[axis] = shape.heads
        resize_tensor(model, name, tuple(sizes))
    attention: Any = get(model, paths.attention)
    foreign = family.fixed_head_dim and shape.qk_dim != architecture.head_dim(i)
    narrow = shape.attention_in is not None
    if own or foreign or shape.qk_dim != shape.v_dim or (narrow and family.own_attention):
        _check_stock(attention, paths.attention, family)
        mix_into(attention, PrunedAttentionMixin)
        shape_attention(attention, shape, scaling, family)
        if narrow:
            _read(attention, PrunedAttentionMixin, shape.attention_in)
        if family.rotate is not None:
            attention.register_channels(architecture.head_dim(i))
    else:
        unmix(attention, PrunedAttentionMixin)  # the stock forward computes the right thing with new sizes
        attention._buffers.pop("qk_index", None)
        _read(attention, PrunedInputsMixin, shape.attention_in)
        set_attention_sizes(attention, shape, scaling)


def shape_attention(attention: Any, shape: LayerShape, scaling: float, family: Family) -> None:
    """Tell an attention of ours (:class:`PrunedAttentionMixin`) its sizes, and what its family does in between."""
    attention.pruned_heads = shape.heads
    attention.qk_dim, attention.v_dim = shape.qk_dim, shape.v_dim
    attention.pruned_scaling = scaling
    attention.projections = family.q, family.k, family.v
    attention.qk_norms = family.qk_norms
    attention.output_name = family.output_name
    attention.bias_function, attention.rotate = family.attention_bias, family.rotate
    #: what some layers hand their attention by position, behind the hidden states
    attention.by_position = tuple(inspect.signature(attention.stock_class.forward).parameters)[2:]
    set_attention_sizes(attention, shape, scaling)


#: parameters of attentions that ours serves, too
_UNDERSTOOD = {"self", "hidden_states", "attention_mask", "kwargs"}


def _check_stock(attention: nn.Module, path: str, family: Family) -> None:
    """Our forward would replace one that somebody wrote."""
    stock: Any = stock_type(attention)
    written_in = stock.__module__
    known = written_in.startswith("transformers.") or written_in == CONFIG_MAPPING[family.model_type].__module__
    reason = "" if known else f" of {written_in}"
    if not reason:
        unknown = set(inspect.signature(stock.forward).parameters) - _UNDERSTOOD
        unknown -= {*family.ignored_inputs, *family.attention_inputs}
        reason = f", which takes {sorted(unknown)[0]!r}" if unknown else ""
    if reason:
        raise UnsupportedModelError(
            f"{path} is a {stock.__name__}{reason}: q/k and v of different widths, or over some channels only, need "
            "an attention of ours in its place. Cut both alike (as many channels of q/k as of v, or heads)"
        )


def _resize_mixer(
    model: nn.Module, family: Family, config: PreTrainedConfig, paths: LayerPaths, shape: LayerShape, width: int
) -> None:
    """Something else in the place of attention; a convolution that is there already gets the new width."""
    there = get(model, paths.attention)
    known = {"none": RemovedAttention, "identity": IdentityMixer}.get(shape.mixer)
    if known is not None and isinstance(there, known):
        return
    if isinstance(there, ConvMixer) and there.shape == (shape.kernel, shape.conv_channels, shape.batch_norm):
        convolution = f"{paths.attention}.conv.weight"
        resize_tensor(model, convolution, (there.conv.out_channels, width, *there.conv.kernel_size))
        resize_linear(model, paths.o, there.conv.out_channels, width)
        return
    replace_mixer(model, family, config, paths, shape, width)


def replace_mixer(
    model: nn.Module, family: Family, config: PreTrainedConfig, paths: LayerPaths, shape: LayerShape, width: int
) -> None:
    """Put the mixer that ``shape`` says in the place of a layer's attention; :func:`finish_mixers` must follow.

    ``config``: of the dense model; ``width``: of the residual stream.
    """
    if shape.mixer == "none":
        put_mixer(model, paths, RemovedAttention())
        return
    if shape.mixer == "identity":
        mixer: nn.Module = IdentityMixer()
    else:
        mixer = conv_mixer(shape, width, family.extra_tokens_of(config), family.o)
    put_mixer(model, paths, mixer)
    if family.grid_layer is not None:
        mix_into(get(model, paths.layer), family.grid_layer)


def conv_mixer(shape: LayerShape, width: int, special_tokens: int, output_name: str) -> ConvMixer:
    """A convolution of these sizes, in a residual stream of ``width`` channels."""
    assert shape.conv_channels is not None and shape.kernel is not None
    return ConvMixer(shape.kernel, shape.conv_channels, bool(shape.batch_norm), width, special_tokens, output_name)


def put_mixer(model: nn.Module, paths: LayerPaths, mixer: nn.Module) -> None:
    """Put another mixer in the place of a layer's attention; an output projection beside it has nothing left to do."""
    put(model, paths.attention, mixer)
    if not paths.o.startswith(f"{paths.attention}."):
        put(model, paths.o, nn.Identity())


def finish_mixers(model: nn.Module, family: Family) -> None:
    """Let a model with convolution mixers tell them the grid of patches."""
    if family.grid_layer is None:
        follow_grid(get(model, family.encoder_path(model).rstrip(".")))


def _resize_mlp(model: PreTrainedModel, paths: LayerPaths, shape: LayerShape, width: int) -> None:
    if shape.mlp == 0:
        if not isinstance(get(model, paths.mlp), RemovedMlp):
            put(model, paths.mlp, RemovedMlp())
            if not paths.fc2.startswith(f"{paths.mlp}."):  # the halves of the MLP are modules side by side
                put(model, paths.fc2, nn.Identity())
        _resize_around(model, paths.norm2, paths.scale2, 0)
        return
    for path in paths.fc1:
        resize_linear(model, path, width if shape.mlp_in is None else shape.mlp_in, shape.mlp)
    resize_linear(model, paths.fc2, shape.mlp, width)
    _resize_around(model, paths.norm2, paths.scale2, width)
    _read(get(model, paths.mlp), PrunedInputsMixin, shape.mlp_in)


def _read(part: nn.Module, mixin: type[InPlaceMixin], count: int | None) -> None:
    """Let a part, with a mixin in front, read so many channels of the stream; None: all, without the mixin."""
    if count is None:
        unmix(part, mixin)
        part._buffers.pop("input_index", None)
    else:
        mix_into(part, mixin)
        part.register_buffer("input_index", torch.arange(count, device=next(part.parameters()).device))

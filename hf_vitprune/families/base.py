"""What the engine must know of one kind of transformers model: where its parts are, and how large they are.

A family is data, not code that changes models: module paths, sizes read from a config, and which units can be
removed. Everything that slices, builds or counts works from these facts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import InvalidConfigError
from ..utils.batches import Form
from ..utils.mixing import InPlaceMixin
from .features import ReadsFeatures

#: Every kind of unit that a plan can remove, from the finest to the coarsest.
UNITS = ("qk", "v", "mlp", "heads", "embedding", "layers")


class LayerSizes(NamedTuple):
    """Sizes of one dense layer: residual width, attention heads, channels a head, hidden neurons of the MLP."""

    embedding: int
    heads: int
    head_dim: int
    mlp: int


class LayerPaths(NamedTuple):
    """Dotted paths, from the task model, of a layer's parts.

    ``scale1`` and ``scale2`` (factors of LayerScale) and ``bias_table`` are names of parameters; None: there is none.
    """

    layer: str
    norm1: str
    attention: str
    q: str
    k: str
    v: str
    o: str
    norm2: str
    mlp: str
    fc1: tuple[str, ...]
    fc2: str
    scale1: str | None
    scale2: str | None
    bias_table: str | None
    #: names of further parameters with one value, row or column a head, and the axis of the heads
    of_heads: tuple[tuple[str, int], ...] = ()

    @property
    def per_head(self) -> tuple[tuple[str, int], ...]:
        """All of them: name and axis."""
        return self.of_heads if self.bias_table is None else ((self.bias_table, 1), *self.of_heads)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a config field that holds an int or a pair (of symbols, while a model is being traced)."""
    if isinstance(size, (list, tuple)):
        return size[0], size[1]
    return int(size), int(size)


def patch_grid(config: Any, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Patches (down, across) for an image size, the config's own by default."""
    height, width = pair(config.image_size if image_size is None else image_size)
    patch_h, patch_w = pair(config.patch_size)
    return height // patch_h, width // patch_w


@dataclass(frozen=True)
class Family(ReadsFeatures):
    """One kind of model, found by ``config.model_type``. Paths are relative to the layer unless said otherwise."""

    model_type: str
    #: what the encoder is in a model that has several: it looks at images ("vision") or reads "text"
    part: str = field(default="vision", kw_only=True)
    #: attribute under which the task models hold the encoder ("" cannot be used: base models are detected by it)
    root: str
    #: path of the list of layers below the encoder
    layers: str = "layers"
    #: path of the convolution that makes patches into tokens, below the encoder
    patch: str = "embeddings.patch_embeddings.projection"
    #: axis of its weight that is the residual stream
    stem_axis: int = 0
    norm1: str = "layernorm_before"
    norm2: str = "layernorm_after"
    attention: str = "attention"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    mlp: str = "mlp"
    fc1: tuple[str, ...] = ("fc1",)
    fc2: str = "fc2"
    scale1: str | None = None
    scale2: str | None = None
    bias_table: str | None = None
    #: parameters of its attention that ours has no use for, and that are None in every call that it stands for
    ignored_inputs: tuple[str, ...] = ()
    #: norms over the residual stream outside the layers, below the encoder
    norms: tuple[str, ...] = ("layernorm",)
    units: frozenset[str] = frozenset(UNITS)
    #: tokens that are not patches
    extra_tokens: int = 1
    #: attribute of the config that holds the sizes ("vision_config" in two-tower configs)
    sub_config: str | None = None
    #: task classes that transformers does not load as it saved them: their small models stay Pruned ones
    not_stock: tuple[str, ...] = ()
    #: what the models read; what runs them on images refuses the rest
    reads: str = "images"
    #: axes of ``pixel_values``: 4 of images, 5 of videos (frames), 3 of packed patches
    pixel_axes: int = 4
    #: queries and keys meet as their Linears give them: no rotary embedding and no norm in between
    plain_qk: bool = True
    #: norms over the queries, and the keys, of all heads together, below the attention (Identity: there is none)
    qk_norms: tuple[str, ...] = ()
    #: field of the config that states the residual width
    width_field: str = "hidden_size"
    #: (module, query, key, keyword arguments) -> query and key as they meet, where something turns them in between; it
    #: takes those arguments out that are its own
    rotate: Callable[..., Any] | None = None
    #: parameters of its attention that ``rotate`` and ``attention_bias`` take
    attention_inputs: tuple[str, ...] = ()
    #: stock attention is right with the head dimension of the dense model only (angles or a scale follow from it)
    fixed_head_dim: bool = False
    #: whether ours can stand in its place: where not, q/k and v channels cannot be removed
    own_attention: bool = True
    #: norms are behind the branches, and over what these add, not in front
    post_norm: bool = False
    #: q/k channels i and i + qk_dim / 2 of a head are turned together, and go together
    qk_pairs: bool = False
    #: True where the config honours ``head_dim``, so that stock classes can hold uniformly pruned heads
    config_head_dim: bool = False
    #: whether the tokens that are not special form the grid of patches, so that convolutions can mix them; layers
    #: must then pass keyword arguments of the model on to their attention
    convolutions: bool = False
    #: mixin for layers that cut the grid into windows: hands the whole grid to convolution mixers
    grid_layer: type[InPlaceMixin] | None = None
    #: (layer, tokens of the grid (B, rows * columns, C), (rows, columns)) -> the same in the windows that the layer's
    #: attention sees, for families that cut the grid
    windows: Callable[[Any, Any, tuple[int, int]], Any] | None = None
    #: (module, attention_mask, input_shape, keyword arguments) -> additive mask, for families whose attention has a
    #: learned position bias; it takes those arguments out that are its own
    attention_bias: Callable[..., Any] | None = None
    #: models take images of other sizes only when told to (``interpolate_pos_encoding=True``)
    interpolates: bool = True
    #: fields of a small config, for the tests that a family has to pass; sizes common to most by default
    tiny: Mapping[str, Any] = field(default_factory=dict, hash=False)
    #: attributes of the pruned twin of a class, by the class's name
    twin_attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    #: model classes with more than one encoder or a wrapped one, that this family does not take
    refused_classes: tuple[str, ...] = ()

    # ------------------------------------------------------------------ sizes
    def sizes_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config that holds the encoder's sizes: the config itself, or its vision part."""
        return getattr(config, self.sub_config) if self.sub_config else config

    def dense_layers(self, config: PreTrainedConfig) -> list[LayerSizes]:
        """Sizes of every layer of the dense model that ``config`` describes."""
        c = self.sizes_config(config)
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        sizes = LayerSizes(c.hidden_size, c.num_attention_heads, head_dim, self.mlp_size(c))
        return [sizes] * c.num_hidden_layers

    def mlp_size(self, c: PreTrainedConfig) -> int:
        return c.intermediate_size

    def fc1_names(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Linears that feed the hidden neurons: one, or gate and up."""
        return self.fc1

    def fc2_name(self, config: PreTrainedConfig) -> str:
        return self.fc2

    def depths(self, config: PreTrainedConfig) -> tuple[int, ...] | None:
        """Layers a stage for hierarchical families, else None."""
        return None

    def width_factor(self, stage: int) -> int:
        """Residual width of a stage as a multiple of the first one's."""
        return 1

    # ------------------------------------------------------------------ what cannot be cut
    def units_of(self, config: PreTrainedConfig) -> frozenset[str]:
        """Units that models of this config have."""
        return self.units - self.refused_units(config).keys()

    def refused_units(self, config: PreTrainedConfig) -> dict[str, str]:
        """Units that models of this config cannot lose -> why not, in half a sentence."""
        return {}

    def has_plain_qk(self, config: PreTrainedConfig) -> bool:
        """Whether queries and keys of models of this config meet as their Linears give them."""
        return self.plain_qk

    def refused_sizes(self, config: PreTrainedConfig, layers: Sequence[Any]) -> str | None:
        """Why no model can have layers of these shapes (``LayerShape``), naming the layer; None where it can."""
        if self.qk_pairs:
            dense = self.dense_layers(config)[0].head_dim
            for i, shape in enumerate(layers):
                if shape.mixer == "attention" and (shape.qk_dim % 2 or shape.qk_dim > dense):
                    return f"layer {i}: q/k channels are turned in pairs, and a head has {dense}; got {shape.qk_dim}"
        return None

    # ------------------------------------------------------------------ configs of other shapes
    def resize_config(
        self, config: PreTrainedConfig, hidden_size: int, num_layers: int, depths: tuple[int, ...] | None
    ) -> None:
        """Set residual width and depth in place (what stock code outside the layers reads)."""
        c = self.sizes_config(config)
        c.hidden_size = hidden_size
        c.num_hidden_layers = num_layers

    def skeleton_heads(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Config overrides under which stock constructors accept any residual width (heads are replaced after)."""
        return {"num_attention_heads": 1}

    def uniform_config(
        self, config: PreTrainedConfig, heads: int, head_dim: int, mlp: int, hidden_size: int
    ) -> dict[str, Any]:
        """Stock config fields for a model whose layers all have these sizes; ``config`` is the dense one.

        Raises:
            ValueError: the stock config cannot express them; the message says which field.
        """
        fields: dict[str, Any] = {"num_attention_heads": heads, "intermediate_size": mlp}
        if heads * head_dim != hidden_size or self.config_head_dim:
            if not self.config_head_dim:
                raise ValueError(
                    f"stock {self.model_type} models have head_dim = hidden_size / heads, here "
                    f"{heads} heads of {head_dim} at width {hidden_size}"
                )
            fields["head_dim"] = head_dim
        return fields

    # ------------------------------------------------------------------ inputs
    def batches(self, config: PreTrainedConfig, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """A batch as those that layers can be run on one by one: without a mask, the same in every run."""
        return [batch]

    def form(self, config: PreTrainedConfig) -> Form:
        """What ``ImageBatches`` has to give to a model of this config."""
        return Form(self.pixel_axes, partial(self.batches, config))

    # ------------------------------------------------------------------ paths
    def encoder_path(self, model: nn.Module) -> str:
        """Prefix of the encoder inside ``model``: ``"vit."`` for task models, ``""`` for base models and backbones."""
        return f"{self.root}." if hasattr(model, self.root) else ""

    def patch_path(self, model: nn.Module) -> str:
        """Path of the patch projection inside ``model``."""
        return self.encoder_path(model) + self.patch

    def layer_names(self, num_layers: int, depths: tuple[int, ...] | None) -> list[str]:
        """Paths of all layers below the encoder."""
        return [f"{self.layers}.{i}" for i in range(num_layers)]

    def output_names(self, num_layers: int, depths: tuple[int, ...] | None) -> list[str]:
        """Paths below the encoder of the modules whose outputs are the features after each layer."""
        return self.layer_names(num_layers, depths)

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        base = prefix + layer

        def at(*names: str) -> str:
            return ".".join((base, *names))

        return LayerPaths(
            layer=base,
            norm1=at(self.norm1),
            attention=at(self.attention),
            q=at(self.attention, self.q),
            k=at(self.attention, self.k),
            v=at(self.attention, self.v),
            o=at(self.attention, self.o),
            norm2=at(self.norm2),
            mlp=at(self.mlp),
            fc1=tuple(at(self.mlp, n) for n in self.fc1_names(config)),
            fc2=at(self.mlp, self.fc2_name(config)),
            scale1=at(self.scale1) if self.scale1 else None,
            scale2=at(self.scale2) if self.scale2 else None,
            bias_table=at(self.attention, self.bias_table) if self.bias_table else None,
        )

    @property
    def output_name(self) -> str | None:
        """Path of the output projection below the attention; None where it lies beside it."""
        return self.o

    def stream_norms(self, model: nn.Module) -> list[str]:
        """Paths of the norms over the residual stream outside the layers of ``model``, those that it has."""
        names = [self.encoder_path(model) + name for name in self.norms]
        there = {name for name, module in model.named_modules() if not isinstance(module, nn.Identity)}
        return [name for name in names if name in there]

    def head_norm(self, task: str) -> str | None:
        """Path below the encoder of the norm whose output classifiers and poolers read; None: the stream itself."""
        return self.norms[-1] if self.norms else None

    # ------------------------------------------------------------------ structure beyond the layers
    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        """Adjust what lies outside the layers after the skeleton has its new width (nothing, for most)."""

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        """Adjust what reads a narrowed residual stream in another way than by the width of its tensors."""

    def drop_scale(self, module: nn.Module, name: str) -> None:
        """Take away the factors of LayerScale behind a branch that is gone."""
        delattr(module, name)
        setattr(module, name, torch.tensor(1.0, device="cpu"))  # stock code initialises what is there

    def without_attention(self, layer: nn.Module) -> None:
        """Take out of a layer that has another mixer, or none, what served its attention from outside of it."""

    def configure_layer(self, layer: nn.Module, config: PreTrainedConfig, shifted: bool | None) -> None:
        """Set attributes of a layer that depend on its place in the dense model (window shift)."""

    # ------------------------------------------------------------------ cost
    def kinds(self, config: PreTrainedConfig, stages: list[int]) -> list[int]:
        """Kind of every layer, by what its attention costs: its stage, where layers of a stage are alike."""
        return stages

    def grid(self, config: PreTrainedConfig, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Patches (down, across) for an image size, the config's own by default."""
        return patch_grid(self.sizes_config(config), image_size)

    def attention_tokens(self, config: PreTrainedConfig, grid: tuple[int, int], kind: int) -> tuple[int, int, int]:
        """(tokens through the MLP, tokens through q/k/v/o, sum of squared attention lengths) for one image."""
        n = grid[0] * grid[1] + self.extra_tokens_of(config)
        return n, n, n * n

    def other_attention_macs(self, config: PreTrainedConfig, heads: int, stage: int) -> int:
        """Multiply-adds of an attention for one image besides its projections and its two products."""
        return 0

    def sequences(self, config: PreTrainedConfig) -> int:
        """Sequences of tokens that layers get for one image: 1, or one a window."""
        return 1

    def grid_tokens(self, grid: tuple[int, int], stage: int) -> int:
        """Patches that a convolution mixes, for one image."""
        return grid[0] * grid[1]

    def extra_tokens_of(self, config: PreTrainedConfig) -> int:
        return self.extra_tokens

    def fixed_size(self, config: PreTrainedConfig, task: str) -> bool:
        """Whether images must have the size of the config."""
        return False

    def inputs(
        self,
        config: PreTrainedConfig,
        size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        task: str = "Model",
    ) -> dict[str, Any]:
        """What a model takes for one image: random values, without labels.

        Args:
            config: of the model.
            size: (height, width) in pixels; None: the config's.
            device: where the values are; ``meta`` for their shapes alone.
            task: class name without its family prefix.

        Raises:
            InvalidConfigError: another size than the model can take.
        """
        return self._inputs(config, size, device, task)

    def _inputs(self, config: Any, size: tuple[int, int] | None, device: Any, task: str) -> dict[str, Any]:
        c = self.sizes_config(config)
        own = pair(c.image_size)
        if size is not None and size != own and self.fixed_size(config, task):
            raise InvalidConfigError(
                f"{self.model_type} takes images of {own[0]} x {own[1]} only: leave image_size out"
            )
        pixels = torch.randn(1, c.num_channels, *(size or own), device=device)
        resized = size is not None and size != own and self.interpolates
        return {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if resized else {})}

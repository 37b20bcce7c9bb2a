"""What the engine must know of one kind of transformers model: where its parts are, and how large they are.

A family is data, not code that changes models: module paths, sizes read from a config, and which units can be
removed. Everything that slices, builds or counts works from these facts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InvalidConfigError
from ..utils.batches import Form
from ..utils.mixing import InPlaceMixin
from .parts import UNITS, Depths, Grid, LayerPaths, LayerSizes


def pair(size: Any) -> Grid:
    """(height, width) of a config field that holds an int or a pair (of symbols, while a model is being traced)."""
    if isinstance(size, (list, tuple)):
        return size[0], size[1]
    return int(size), int(size)


def patch_grid(config: Any, image_size: int | Grid | None) -> Grid:
    """Patches (down, across) for an image size, the config's own by default."""
    height, width = pair(config.image_size if image_size is None else image_size)
    patch_h, patch_w = pair(config.patch_size)
    return height // patch_h, width // patch_w


@dataclass(frozen=True)
class Family:
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
    #: output projection and last Linear of the MLP, below the layer, where they lie beside attention and MLP
    outer_o: str | None = None
    outer_fc2: str | None = None
    scale1: str | None = None
    scale2: str | None = None
    bias_table: str | None = None
    #: parameters of its attention that ours has no use for, and that are None in every call that it stands for
    ignored_inputs: tuple[str, ...] = ()
    #: norms over the residual stream outside the layers, below the encoder
    norms: tuple[str, ...] = ("layernorm",)
    #: the same of models around the encoder, those that have them
    outer_norms: tuple[str, ...] = ()
    units: frozenset[str] = frozenset(UNITS)
    #: tokens that are not patches, and fields of the config that give the numbers of more of them
    extra_tokens: int = 1
    extra_token_fields: tuple[str, ...] = ()
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
    def sizes_config(self, config: Any) -> Any:
        """The config that holds the encoder's sizes: the config itself, or its vision part."""
        return getattr(config, self.sub_config) if self.sub_config else config

    def dense_layers(self, config: Any) -> list[LayerSizes]:
        """Sizes of every layer of the dense model that ``config`` describes."""
        c = self.sizes_config(config)
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        sizes = LayerSizes(c.hidden_size, c.num_attention_heads, head_dim, self.mlp_size(c))
        return [sizes] * c.num_hidden_layers

    def mlp_size(self, c: Any) -> int:
        return c.intermediate_size

    def fc1_names(self, config: Any) -> tuple[str, ...]:
        """Linears that feed the hidden neurons: one, or gate and up."""
        return self.fc1

    def fc2_name(self, config: Any) -> str:
        return self.fc2

    def depths(self, config: Any) -> Depths:
        """Layers a stage for hierarchical families, else None."""
        return None

    def width_factor(self, stage: int) -> int:
        """Residual width of a stage as a multiple of the first one's."""
        return 1

    # ------------------------------------------------------------------ what cannot be cut
    def units_of(self, config: Any) -> frozenset[str]:
        """Units that models of this config have."""
        return self.units - self.refused_units(config).keys()

    def refused_units(self, config: Any) -> dict[str, str]:
        """Units that models of this config cannot lose -> why not, in half a sentence."""
        return {}

    def has_plain_qk(self, config: Any) -> bool:
        """Whether queries and keys of models of this config meet as their Linears give them."""
        return self.plain_qk

    def refused_sizes(self, config: Any, layers: Sequence[Any]) -> str | None:
        """Why no model can have layers of these shapes (``LayerShape``), naming the layer; None where it can."""
        for i, shape in enumerate(layers):
            why = self.refused_attention(config, shape) if shape.mixer == "attention" else None
            if why is not None:
                return f"layer {i}: {why}"
        return None

    def refused_attention(self, config: Any, shape: Any) -> str | None:
        """Why no attention can have the sizes of a ``LayerShape``; None where it can."""
        if not self.qk_pairs:
            return None
        dense = self.dense_layers(config)[0].head_dim
        pairs = shape.qk_dim % 2 == 0 and shape.qk_dim <= dense
        return None if pairs else f"q/k channels are turned in pairs, and a head has {dense}; got {shape.qk_dim}"

    # ------------------------------------------------------------------ configs of other shapes
    def resize_config(self, config: Any, width: int, num_layers: int, depths: Depths) -> None:
        """Set residual width and depth in place (what stock code outside the layers reads)."""
        c = self.sizes_config(config)
        c.hidden_size = width
        c.num_hidden_layers = num_layers
        if hasattr(c, "stage_names"):  # a backbone's config lists its stages, one a layer
            c.stage_names = ["stem"] + [f"stage{i}" for i in range(1, num_layers + 1)]
            kept = [name for name in c.out_features if name in c.stage_names]
            c.set_output_features_output_indices(out_features=kept or c.stage_names[-1:], out_indices=None)

    def skeleton_heads(self, config: Any) -> dict[str, Any]:
        """Config overrides under which stock constructors accept any residual width (heads are replaced after)."""
        return {"num_attention_heads": 1}

    def uniform_config(self, config: Any, heads: int, head_dim: int, mlp: int, width: int) -> dict[str, Any]:
        """Stock config fields for a model whose layers all have these sizes; ``config`` is the dense one.

        Raises:
            ValueError: the stock config cannot express them; the message says which field.
        """
        fields: dict[str, Any] = {"num_attention_heads": heads, **self.mlp_fields(config, mlp, width)}
        if self.config_head_dim:
            fields["head_dim"] = head_dim
        elif heads * head_dim != width:
            raise ValueError(
                f"stock {self.model_type} models have head_dim = hidden_size / heads, here "
                f"{heads} heads of {head_dim} at width {width}"
            )
        return fields

    def mlp_fields(self, config: Any, mlp: int, width: int) -> dict[str, Any]:
        """Those that give MLPs so many neurons; errors as :meth:`uniform_config`."""
        return {"intermediate_size": mlp}

    # ------------------------------------------------------------------ features that are read by their numbers
    def read_states(self, config: Any, task: str, layers: int) -> list[int]:
        """Hidden states (0: of the embedding) that a model reads by their numbers; none, where it reads the last.

        Args:
            config: of the model.
            task: class name without its family prefix.
            layers: how many it has.
        """
        if task != "Backbone" or self.depths(config) is not None:
            return []
        return [index % (layers + 1) for index in config.out_indices]

    def name_states(self, config: Any, task: str, states: Sequence[int]) -> None:
        """Set these in a config whose depth is set, in place.

        Raises:
            ValueError: it cannot name one of them; says why.
        """
        names = ["stem" if state == 0 else f"stage{state}" for state in states]
        config.set_output_features_output_indices(out_features=names, out_indices=None)

    def fewest_layers(self, config: Any, task: str, layers: int) -> int:
        """How many of the bottom layers a model needs for what it reads of them."""
        return max(1, *self.read_states(config, task, layers), 0)

    def has_neck(self, config: Any, task: str) -> bool:
        """Whether features of several layers run through modules of the dense width, which no stock config holds."""
        return False

    def neck(self, model: nn.Module) -> list[str]:
        """Paths of the modules that the features of several layers (B, channels, height, width) enter by."""
        return []

    # ------------------------------------------------------------------ inputs
    def batches(self, config: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """A batch as those that layers can be run on one by one: without a mask, the same in every run."""
        return [batch]

    def form(self, config: Any) -> Form:
        """What ``ImageBatches`` has to give to a model of this config."""
        return Form(self.pixel_axes, partial(self.batches, config))

    # ------------------------------------------------------------------ paths
    def encoder_path(self, model: nn.Module) -> str:
        """Prefix of the encoder inside ``model``: ``"vit."`` for task models, ``""`` for base models and backbones."""
        return f"{self.root}." if hasattr(model, self.root) else ""

    def encoder(self, model: nn.Module) -> Any:
        return getattr(model, self.root, model)

    def patch_path(self, model: nn.Module) -> str:
        """Path of the patch projection inside ``model``."""
        return self.encoder_path(model) + self.patch

    def layer_names(self, num_layers: int, depths: Depths) -> list[str]:
        """Paths of all layers below the encoder."""
        return [f"{self.layers}.{i}" for i in range(num_layers)]

    def output_names(self, num_layers: int, depths: Depths) -> list[str]:
        """Paths below the encoder of the modules whose outputs are the features after each layer."""
        return self.layer_names(num_layers, depths)

    def layer_paths(self, prefix: str, layer: str, config: Any) -> LayerPaths:
        base = prefix + layer
        attention, mlp = f"{base}.{self.attention}", f"{base}.{self.mlp}"
        return LayerPaths(
            layer=base,
            norm1=f"{base}.{self.norm1}",
            attention=attention,
            q=f"{attention}.{self.q}",
            k=f"{attention}.{self.k}",
            v=f"{attention}.{self.v}",
            o=f"{base}.{self.outer_o}" if self.outer_o else f"{attention}.{self.o}",
            norm2=f"{base}.{self.norm2}",
            mlp=mlp,
            fc1=tuple(f"{mlp}.{name}" for name in self.fc1_names(config)),
            fc2=f"{base}.{self.outer_fc2}" if self.outer_fc2 else f"{mlp}.{self.fc2_name(config)}",
            scale1=f"{base}.{self.scale1}" if self.scale1 else None,
            scale2=f"{base}.{self.scale2}" if self.scale2 else None,
            bias_table=f"{attention}.{self.bias_table}" if self.bias_table else None,
        )

    @property
    def output_name(self) -> str | None:
        """Path of the output projection below the attention; None where it lies beside it."""
        return None if self.outer_o else self.o

    def stream_norms(self, model: nn.Module) -> list[str]:
        """Paths of the norms over the residual stream outside the layers of ``model``, those that it has."""
        prefix = self.encoder_path(model)
        names = [prefix + name for name in self.norms] + list(self.outer_norms if prefix else ())
        there = {name for name, module in model.named_modules() if not isinstance(module, nn.Identity)}
        return [name for name in names if name in there]

    def head_norm(self, task: str) -> str | None:
        """Path below the encoder of the norm whose output classifiers and poolers read; None: the stream itself."""
        return self.norms[-1] if self.norms else None

    # ------------------------------------------------------------------ structure beyond the layers
    def finish_structure(self, model: nn.Module, config: Any, dense_width: int) -> None:
        """Adjust what lies outside the layers after the skeleton has its new width."""
        self.narrow_stream(model, dense_width, self.sizes_config(config).hidden_size)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        """Adjust what reads a narrowed residual stream in another way than by the width of its tensors."""

    def without_attention(self, layer: nn.Module) -> None:
        """Take out of a layer that has another mixer, or none, what served its attention from outside of it."""

    def configure_layer(self, layer: nn.Module, config: Any, shifted: bool | None) -> None:
        """Set attributes of a layer that depend on its place in the dense model (window shift)."""

    # ------------------------------------------------------------------ cost
    def kinds(self, config: Any, stages: list[int]) -> list[int]:
        """Kind of every layer, by what its attention costs: its stage, where layers of a stage are alike."""
        return stages

    def grid(self, config: Any, image_size: int | Grid | None) -> Grid:
        """Patches (down, across) for an image size, the config's own by default."""
        return patch_grid(self.sizes_config(config), image_size)

    def attention_tokens(self, config: Any, grid: Grid, kind: int) -> tuple[int, int, int]:
        """(tokens through the MLP, tokens through q/k/v/o, sum of squared attention lengths) for one image."""
        n = grid[0] * grid[1] + self.extra_tokens_of(config)
        return n, n, n * n

    def other_attention_macs(self, config: Any, heads: int, stage: int) -> int:
        """Multiply-adds of an attention for one image besides its projections and its two products."""
        return 0

    def sequences(self, config: Any) -> int:
        """Sequences of tokens that layers get for one image: 1, or one a window."""
        return 1

    def grid_tokens(self, grid: Grid, stage: int) -> int:
        """Patches that a convolution mixes, for one image."""
        return grid[0] * grid[1]

    def extra_tokens_of(self, config: Any) -> int:
        return self.extra_tokens + sum(getattr(config, name) for name in self.extra_token_fields)

    def fixed_size(self, config: Any, task: str) -> bool:
        """Whether images must have the size of the config."""
        return False

    def inputs(
        self, config: Any, size: Grid | None = None, device: torch.device | str = "cpu", task: str = "Model"
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
        c = self.sizes_config(config)
        own = pair(c.image_size)
        other = size is not None and size != own
        if other and self.fixed_size(config, task):
            raise InvalidConfigError(
                f"{self.model_type} takes images of {own[0]} x {own[1]} only: leave image_size out"
            )
        pixels = torch.randn(1, c.num_channels, *(size or own), device=device)
        return {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if other and self.interpolates else {})}

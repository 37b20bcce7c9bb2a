"""Checkpoints of SPViT's authors (DeiT and Swin, fine-tuned) as pruned models of this library."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import CheckpointMismatchError, InvalidArchitectureError, InvalidConfigError, UnsupportedModelError
from ..families import LayerPaths
from ..modeling import class_for_task, config_for
from ..modeling.conv_mixer import CENTRE, POSITIONS, FoldedConvolution, fold_heads, mixer_state, mixing_probabilities
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.configs import stock_config
from ..spec.layer_shape import KERNELS
from ..utils.settings import check_positive

logger = logging.get_logger(__name__)

#: temperature of the mixing table, by family, as in the released code
TEMPERATURES = {"vit": 0.01, "deit": 0.01, "swin": 100.0}
#: LayerNorm epsilon of the released DeiT code; configs on the Hub say otherwise
DEIT_EPSILON = 1e-6
#: other words for mixers
ALIASES = {"msa": "attention", "skip": "identity"}
#: what tells the mixers of a fine-tuned checkpoint apart
_MIXER_KEYS = (("attention", "qk.weight"), ("conv3x3", "bn_3x3.weight"), ("conv1x1", "bn_1x1.weight"))
#: module of a convolution block where the authors' tool has folded the mixing: convolution, BatchNorm, ReLU, 1 x 1
_FOLDED = "bconv"
#: buffers that transformers computes itself
_COMPUTED = ("attn.relative_position_index", "attn_mask")
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "absolute_pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}

State = Mapping[str, torch.Tensor]


def convert_spvit_checkpoint(
    state_dict: State,
    base_config: PreTrainedConfig,
    mixers: Sequence[Any],
    mlp_hidden: Sequence[Any],
    *,
    temperature: float | None = None,
    centre_column: int | None = None,
) -> PreTrainedModel:
    """A fine-tuned checkpoint of the SPViT authors as a pruned model, in eval mode; same logits.

    The value and output weights of convolution blocks are folded into real convolutions.

    Args:
        state_dict: tensors under DeiT or Swin names: ``blocks.{i}.attn.{qk,v,proj}``, ``attn.head_probs``,
            ``attn.bn_1x1``, ``attn.bn_3x3``, ``mlp.{fc1,fc2}``; Swin ``layers.{s}.blocks.{i}...``. Convolution
            blocks may be folded already, by the authors' tool (``attn.bconv.{0,1,3}``).
        base_config: stock config of the dense model (ViT for DeiT without a distillation token, DeiT, or Swin).
        mixers: of every layer (Swin: a list a stage): ``attention`` (or ``msa``), ``conv3x3``, ``conv1x1``,
            ``identity`` (or ``skip``: in these checkpoints a skipped block adds its normalised input).
        mlp_hidden: hidden neurons of every layer, in the same form.
        temperature: of the mixing table; by default 0.01 for DeiT and 100 for Swin.
        centre_column: column of the mixing table that belongs to the kernel's centre. 4: columns are in the order of
            the positions. 0: the centre comes first, as in the released Swin code. By default what the 1 x 1 blocks of
            a Swin checkpoint show (no other column of theirs is ever trained), and 4 where they show nothing.

    Raises:
        UnsupportedModelError: the config is of another family.
        InvalidArchitectureError: the lists do not fit the config.
        CheckpointMismatchError: they do not fit the checkpoint, or tensors are missing, left over or of other sizes.
        InvalidConfigError: an impossible ``temperature`` or ``centre_column``.
    """
    stock = stock_config(base_config)
    if stock.model_type not in TEMPERATURES:
        raise UnsupportedModelError(
            f"SPViT checkpoints are of DeiT or Swin, the config is of {stock.model_type!r}; known: "
            f"{', '.join(TEMPERATURES)}"
        )
    config = copy.deepcopy(stock)
    if stock.model_type != "swin":
        config.layer_norm_eps = DEIT_EPSILON
    architecture = _architecture(config, mixers, mlp_hidden, "head_dist.weight" in state_dict)
    names = _layer_names(architecture)
    _check_layers(state_dict, architecture, names)
    if stock.model_type == "swin" and any(f".{_FOLDED}." in key for key in state_dict):
        logger.warning(
            "the convolutions of this Swin checkpoint are folded already. The authors' tool folds them at the "
            "temperature of DeiT, which changes what they compute: convert the checkpoint from before it, if that is "
            "where they come from"
        )
    if centre_column is None:
        centre_column = _centre_column(state_dict, architecture, names)
    temperature = TEMPERATURES[stock.model_type] if temperature is None else temperature
    if centre_column not in (0, CENTRE):
        raise InvalidConfigError(f"centre_column is 0 or {CENTRE}, got {centre_column!r}")
    check_positive("temperature", temperature)
    info: dict[str, Any] = {"method": "SPViT"}
    base = getattr(base_config, "_name_or_path", "")
    if base and not Path(base).exists():
        info["base_model"] = base
    with torch.device("meta"):
        skeleton = class_for_task(architecture.family, architecture.task)(config_for(architecture, config, info))
    translation = _Translation(state_dict, temperature, centre_column)
    translation.outside(architecture)
    for name, paths, shape in zip(names, layer_paths(skeleton, architecture), architecture.layers, strict=True):
        translation.layer(name, paths, shape.mixer, architecture.family.o)
    made = translation.checked(skeleton)
    model = type(skeleton)(skeleton.config)
    model.load_state_dict(made, strict=True, assign=True)
    return model.eval()


# ---------------------------------------------------------------------- the lists against what they are for
def _architecture(
    config: PreTrainedConfig, mixers: Sequence[Any], mlp_hidden: Sequence[Any], two_heads: bool
) -> Architecture:
    def rows(mixer: Any, hidden: Any, where: str) -> Any:
        if not isinstance(mixer, str) and isinstance(mixer, Sequence):
            if isinstance(hidden, (str, int)) or len(mixer) != len(hidden):
                raise InvalidArchitectureError(f"{where}: {len(mixer)} mixers, and mlp_hidden is {hidden!r}")
            return [rows(m, h, f"{where} {i}") for i, (m, h) in enumerate(zip(mixer, hidden, strict=True))]
        return {"mixer": ALIASES.get(mixer, mixer) if isinstance(mixer, str) else mixer, "mlp": hidden}

    layers = rows(list(mixers), list(mlp_hidden), "layer" if config.model_type != "swin" else "stage")
    dense = Architecture.dense(config)
    given = [len(layer) for layer in layers] if dense.depths else len(layers)
    if given != (list(dense.depths) if dense.depths else len(dense.layers)):
        raise InvalidArchitectureError(
            f"the lists are for {given} layers, the config has {dense.depths or len(dense.layers)}"
        )
    architecture = Architecture.from_layers(config, layers)
    return architecture.replace(task="ForImageClassificationWithTeacher") if two_heads else architecture


def _layer_names(architecture: Architecture) -> list[str]:
    if architecture.depths is None:
        return [f"blocks.{i}" for i in range(len(architecture.layers))]
    return [f"layers.{s}.blocks.{b}" for s, depth in enumerate(architecture.depths) for b in range(depth)]


def _check_layers(state: State, architecture: Architecture, names: list[str]) -> None:
    """Refuse lists that say other mixers or MLPs than the checkpoint has."""
    for i, (name, shape) in enumerate(zip(names, architecture.layers, strict=True)):
        where = f"layer {i} ({name})"
        held = [mixer for mixer, key in _MIXER_KEYS if f"{name}.attn.{key}" in state]
        folded = state.get(f"{name}.attn.{_FOLDED}.0.weight")
        if folded is not None and folded.ndim == 4:
            held += [mixer for mixer, kernel in KERNELS.items() if kernel == folded.shape[-1]]
        if len(held) > 1:
            raise CheckpointMismatchError(
                f"{where} holds the weights of several mixers ({', '.join(held)}): the checkpoint is of a search, not "
                "of a fine-tuned model"
            )
        mixer = held[0] if held else "identity"
        if mixer != shape.mixer:
            raise CheckpointMismatchError(f"{where} is {mixer} in the checkpoint, and {shape.mixer} in the list")
        fc1 = state.get(f"{name}.mlp.fc1.weight")
        if fc1 is not None and len(fc1) != shape.mlp:
            raise CheckpointMismatchError(
                f"{where} has {len(fc1)} hidden neurons in the checkpoint, and {shape.mlp} in mlp_hidden"
            )


def _centre_column(state: State, architecture: Architecture, names: list[str]) -> int:
    """Which column of the mixing table the 1 x 1 blocks were trained with: the others still weigh all heads alike."""
    tables = [
        state[f"{name}.attn.head_probs"].flatten(1)
        for name, shape in zip(names, architecture.layers, strict=True)
        if shape.mixer == "conv1x1" and f"{name}.attn.head_probs" in state and architecture.depths is not None
    ]
    trained = {j for table in tables for j in range(table.shape[1]) if bool((table[:, j] != table[0, j]).any())}
    return 0 if trained == {0} else CENTRE


# ---------------------------------------------------------------------- names and weights
class _Translation:
    """Tensors under the names of transformers, taken out of a checkpoint one after the other."""

    def __init__(self, state: State, temperature: float, centre_column: int) -> None:
        self.state = state
        self.temperature = temperature
        self.first = centre_column == 0
        self.used: set[str] = set()
        self.made: dict[str, torch.Tensor] = {}

    def take(self, name: str) -> torch.Tensor:
        if name not in self.state:
            raise CheckpointMismatchError(f"the checkpoint lacks {name}")
        self.used.add(name)
        return self.state[name]

    def move(self, old: str, new: str) -> None:
        """A tensor, or the weight and bias of a module (as far as they exist), under another name."""
        for suffix in ("", ".weight", ".bias"):
            if old + suffix in self.state:
                self.made[new + suffix] = self.take(old + suffix)

    def outside(self, architecture: Architecture) -> None:
        root = architecture.family.root
        for old, new in _OUTSIDE.items():
            self.move(old, f"{root}.{new}")
        for stage in range(len(architecture.depths or ()) - 1):
            for part in ("norm", "reduction"):
                self.move(f"layers.{stage}.downsample.{part}", f"{root}.encoder.layers.{stage}.downsample.{part}")
        two_heads = architecture.task == "ForImageClassificationWithTeacher"
        self.move("head", "cls_classifier" if two_heads else "classifier")
        if two_heads:
            self.move("head_dist", "distillation_classifier")

    def layer(self, name: str, paths: LayerPaths, mixer: str, output_name: str) -> None:
        for old, new in (("norm1", paths.norm1), ("norm2", paths.norm2), ("mlp.fc2", paths.fc2)):
            self.move(f"{name}.{old}", new)
        self.move(f"{name}.mlp.fc1", paths.fc1[0])
        attn = f"{name}.attn"
        if mixer == "attention":
            for suffix in ("weight", "bias"):
                if f"{attn}.qk.{suffix}" in self.state:
                    q, k = self.take(f"{attn}.qk.{suffix}").chunk(2)
                    self.made |= {f"{paths.q}.{suffix}": q.clone(), f"{paths.k}.{suffix}": k.clone()}
            self.move(f"{attn}.v", paths.v)
            self.move(f"{attn}.proj", paths.o)
            if paths.bias_table:
                self.move(f"{attn}.relative_position_bias_table", paths.bias_table)
        elif mixer in KERNELS:
            state = self.convolution(attn, KERNELS[mixer], output_name)
            self.made |= {f"{paths.attention}.{key}": tensor for key, tensor in state.items()}

    def convolution(self, attn: str, kernel: int, output_name: str) -> dict[str, torch.Tensor]:
        """Weights of a convolution mixer: folded here in double precision, or before by the authors' tool."""
        first = f"{attn}.{_FOLDED}.0."
        if f"{first}weight" in self.state:
            norm, output = f"{attn}.{_FOLDED}.1.", f"{attn}.{_FOLDED}.3"
            weight = self.take(f"{first}weight")
            bias = self.take(f"{first}bias") if f"{first}bias" in self.state else weight.new_zeros(len(weight))
            mixed = FoldedConvolution(weight, bias, self.take(f"{output}.weight").flatten(1))
        else:
            norm, output = f"{attn}.bn_{kernel}x{kernel}.", f"{attn}.proj"
            weight = self.take(f"{attn}.v.weight")
            mixed = self.mixed(attn, weight, self.take(f"{output}.weight"), kernel)
        statistics = {key: self.take(norm + key) for key in nn.BatchNorm2d(1).state_dict()}
        state = mixer_state(mixed, statistics, self.take(f"{output}.bias"), output_name)
        return {k: t.to(weight.dtype) if t.is_floating_point() else t for k, t in state.items()}

    def mixed(self, attn: str, v: torch.Tensor, o: torch.Tensor, kernel: int) -> FoldedConvolution:
        """The heads of a block mixed into one convolution by its table."""
        v_bias = self.take(f"{attn}.v.bias").double() if f"{attn}.v.bias" in self.state else None
        table = self.take(f"{attn}.head_probs")
        if table.ndim < 2 or table.flatten(1).shape[1] != POSITIONS or v.shape[0] % len(table):
            raise CheckpointMismatchError(
                f"{attn}.head_probs is {tuple(table.shape)}, expected (heads, {POSITIONS}) with heads that divide "
                f"{v.shape[0]}"
            )
        order = [*range(1, CENTRE + 1), 0, *range(CENTRE + 1, POSITIONS)] if self.first else list(range(POSITIONS))
        shares = mixing_probabilities(table.flatten(1).double()[:, order], self.temperature)
        return fold_heads(v.double(), v_bias, o.double(), shares, kernel)

    def checked(self, skeleton: PreTrainedModel) -> dict[str, torch.Tensor]:
        """All tensors, when they are just those of the skeleton and nothing of the checkpoint is left over."""
        expected = skeleton.state_dict()
        left = sorted(key for key in self.state.keys() - self.used if not key.endswith(_COMPUTED))
        for what, names in (
            ("lacks the weights of", sorted(expected.keys() - self.made.keys())),
            ("also holds", left),
            ("gives more than the config has:", sorted(self.made.keys() - expected.keys())),
        ):
            if names:
                raise CheckpointMismatchError(f"the checkpoint {what} {len(names)} tensors (first: {names[0]})")
        for name, tensor in self.made.items():
            if tensor.shape != expected[name].shape:
                raise CheckpointMismatchError(
                    f"{name} is {tuple(tensor.shape)} in the checkpoint, and {tuple(expected[name].shape)} by the "
                    "config (labels, image, patch and window size come from it)"
                )
        return self.made

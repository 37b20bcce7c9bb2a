"""Convpass: a convolution over the patch grid in parallel to attention and to the MLP (arXiv 2207.07039)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from ...errors import AdapterError, InvalidConfigError
from ...spec.architecture import Architecture
from ...surgery.windows import LayerGrid, Windows
from ...utils.settings import check_one_of
from .branch import Branch, BranchConfig, BranchKind, BranchLayer, BranchTuner
from .kind import add_peft_method

NOT_MERGEABLE = (
    "a Convpass bypass is not linear and mixes patches, so no weights of the model can take it in: it cannot be "
    "merged; keep the adapter, which truncate() and save_pretrained() carry along"
)
#: first weights of the convolution
INITIAL = ("identity", "xavier")


@dataclass
class ConvpassConfig(BranchConfig):
    """Convpass adapters: ``branch(x) + scale * up(act(conv(act(down(x)))))``.

    Attributes:
        activation: between the parts, by its name in transformers.
        initial: how the convolution starts: as the ``identity``, or drawn as ``xavier`` has it.

    Raises:
        InvalidConfigError: a setting has an impossible value.
    """

    activation: str = "gelu"
    initial: str = "identity"

    method_name = "CONVPASS"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACT2FN:
            raise InvalidConfigError(
                f"activation is a name that transformers knows (gelu, ...), not {self.activation!r}"
            )
        check_one_of(self, "initial", INITIAL)


class ConvpassLayer(BranchLayer):
    """A branch with bypasses. A new bypass gives zeros, so the model starts as it was."""

    adapter_layer_names = ("convpass_down", "convpass_conv", "convpass_up")
    convpass_down: Any
    convpass_conv: Any
    convpass_up: Any

    def __init__(self, base_layer: nn.Module, branch: Branch, architecture: Architecture) -> None:
        super().__init__(base_layer, branch, architecture)
        self.activation: dict[str, Any] = {}
        family, config = architecture.family, architecture.config
        self.extra_tokens = family.extra_tokens_of(config)
        self.grid = family.grid(config, None)
        self.place: LayerGrid | None = None
        self.handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module, windows: Windows) -> None:
        """In a layer of windows: find the whole grid, for as long as the adapter is there."""
        norm = None if self.branch.norm is None else model.get_submodule(self.branch.norm)
        self.place = LayerGrid(windows)
        self.handles = self.place.attach(model.get_submodule(self.branch.layer), norm)

    def make_adapter(self, name: str, config: Any) -> None:
        down, up = nn.Linear(self.width, config.r), nn.Linear(config.r, self.width)
        conv = nn.Conv2d(config.r, config.r, 3, padding=1)
        nn.init.xavier_uniform_(down.weight)
        for tensor in (down.bias, conv.bias, conv.weight, up.weight, up.bias):
            nn.init.zeros_(tensor)  # type: ignore[arg-type]
        if config.initial == "xavier":
            nn.init.xavier_uniform_(conv.weight)
        elif not conv.weight.is_meta:
            with torch.no_grad():
                conv.weight[:, :, 1, 1] = torch.eye(config.r)
        self.convpass_down[name], self.convpass_conv[name], self.convpass_up[name] = down, conv, up
        self.activation[name] = ACT2FN[config.activation]

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the branch's; ``hidden_states`` (images, tokens, width), or windows of them in front of an attention."""
        output = self.base_layer(hidden_states, *args, **kwargs)
        place = self.place if self.branch.norm is not None else None
        tokens = hidden_states if place is None else place.take()
        if self.disable_adapters:
            return output
        features = output[0] if isinstance(output, tuple) else output
        for name in self.active():
            added = self.bypass(name, tokens)
            features = features + (added if place is None else place.cut(added)).to(features.dtype)
        return (features, *output[1:]) if isinstance(output, tuple) else features

    def bypass(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, width) -> the same. Tokens that are no patches pass alone, through the kernel's centre."""
        down, conv, up = (part[name] for part in (self.convpass_down, self.convpass_conv, self.convpass_up))
        activate = self.activation[name]
        hidden = activate(down(hidden_states.to(down.weight.dtype)))
        extra, patches = hidden[:, : self.extra_tokens], hidden[:, self.extra_tokens :]
        grid = patch_grid(patches.shape[1], self.grid) if self.place is None else self.place.grid
        patches = conv(patches.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        extra = F.linear(extra, conv.weight[:, :, 1, 1], conv.bias)
        hidden = activate(torch.cat([extra, patches], dim=1))
        return self.scale[name] * up(F.dropout(hidden, self.dropout[name], self.training))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises:
        AdapterError: always.
        """
        raise AdapterError(NOT_MERGEABLE)


def patch_grid(patches: int, own: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of that many patches: images of another size than the config's have its aspect ratio.

    Raises:
        AdapterError: no such grid.
    """
    rows = math.isqrt(patches * own[0] // own[1])
    if rows and patches % rows == 0 and rows * own[1] == patches // rows * own[0]:
        return rows, patches // rows
    raise AdapterError(
        f"{patches} patches are no grid of the aspect ratio {own[0]}:{own[1]} of the model's images; Convpass needs "
        "images of that ratio"
    )


class ConvpassModel(BranchTuner):
    """The tuner of CONVPASS."""

    prefix = "convpass_"
    tuner_layer_cls = layer_class = ConvpassLayer

    def check_model(self, architecture: Architecture) -> None:
        family, config = architecture.family, architecture.config
        why = None
        if family.part != "vision" or family.pixel_axes != 4:
            why = f"reads {family.reads}"
        elif architecture.depths is not None and family.windows is None:
            why = "has attention that sees windows of it"
        elif architecture.depths is None:
            grid = family.grid(config, None)
            if family.attention_tokens(config, grid, 0)[0] != math.prod(grid) + family.extra_tokens_of(config):
                why = "shows its layers other tokens"
            elif family.outer_o or family.outer_fc2:
                why = "has projections beside its attention and MLP modules, where the bypass would have to be"
        if why is not None:
            raise AdapterError(
                f"Convpass convolves over the grid of patches beside attention and MLP, and {architecture.model_type} "
                f"{why}; use RepAdapter or LoRA there"
            )

    def placed(self, layer: ConvpassLayer) -> None:
        windows = self.architecture.family.windows
        if windows is not None:
            layer.watch(self.model, windows)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        for handle in getattr(child, "handles", ()):  # of an adapter that is taken off
            handle.remove()
        super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        raise AdapterError(NOT_MERGEABLE)


class ConvpassKind(BranchKind):
    name = "CONVPASS"
    cannot_be_merged = NOT_MERGEABLE


add_peft_method("CONVPASS", ConvpassConfig, ConvpassModel, ConvpassModel.prefix)

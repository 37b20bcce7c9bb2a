"""Mixers in a running model: hooks on the attention that put them in its place, and gated MLP columns.

Nothing of the model is replaced: removing the handles gives back what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...families import Family, LayerPaths
from ...modeling.conv_mixer import GRID, give_grid
from ...spec.architecture import Architecture
from ...surgery.windows import LayerGrid, NormOutput
from ...utils.hooks import ForwardOverride, GateHook
from ...utils.modules import get
from .branches import Grid
from .gates import NeuronGates
from .mixing import Mixing


# ---------------------------------------------------------------------- hooks of models without windows
class _Attend(ForwardOverride):
    """In the place of an attention: runs it as far as it is read."""

    def __init__(self, mixing: Mixing) -> None:
        super().__init__(mixing.attention.module)
        self.mixing = mixing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            return type(self.module).forward(self.module, *args, **kwargs)

        tokens = args[0] if args else kwargs["hidden_states"]
        others = [value for name, value in kwargs.items() if name != "hidden_states"]
        return self.mixing.attend(run, tokens, [*args[1:], *others])


class _TellGrid(GateHook):
    """In front of the encoder: hands the grid of patches down, as models with convolution mixers do."""

    def __call__(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return give_grid(encoder, args, kwargs)


class _TakeGrid(GateHook):
    """In front of an attention, which does not know the word."""

    def __init__(self) -> None:
        self.grid: Grid | None = None

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.grid = kwargs.get(GRID)
        return args, {name: value for name, value in kwargs.items() if name != GRID}


class _Mix(GateHook):
    """Behind an attention."""

    def __init__(self, search: Mixing, taken: _TakeGrid) -> None:
        self.search, self.taken = search, taken

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        tokens = args[0] if args else kwargs["hidden_states"]
        grid, self.taken.grid = self.taken.grid, None
        return (self.search.mix(output[0], tokens, grid), *output[1:])  # type: ignore[arg-type]  # checked there


# ---------------------------------------------------------------------- hooks of models with windows
class _SearchGrid(LayerGrid, GateHook):
    def norm_hook(self) -> NormOutput:
        return _SearchNorm(self)


class _SearchNorm(NormOutput, GateHook):
    pass


class _MixWindows(GateHook):
    """Behind an attention in windows: the convolutions run on the whole grid, and are cut into windows after."""

    def __init__(self, search: Mixing, place: LayerGrid) -> None:
        self.search, self.place = search, place

    def __call__(self, attention: Any, args: tuple[Any, ...], output: Any) -> Any:
        place = self.place
        return (self.search.mix(output[0], place.take(), place.grid, place.cut), *output[1:])


def attach_mixers(
    model: PreTrainedModel, architecture: Architecture, searches: Mapping[int, Mixing], paths: list[LayerPaths]
) -> list[RemovableHandle]:
    """Hook the searches into ``model``, by number of the layer."""
    family: Family = architecture.family
    handles: list[Any] = []
    for i, search in searches.items():
        attention = search.attention.module
        if "forward" not in vars(attention):  # somebody else's
            handles.append(_Attend(search).attach())
        if family.windows is not None:
            place = _SearchGrid(family.windows)
            handles += place.attach(get(model, paths[i].layer), get(model, paths[i].norm1))
            handles.append(attention.register_forward_hook(_MixWindows(search, place)))
        else:
            taken = _TakeGrid()
            handles += [
                attention.register_forward_pre_hook(taken, with_kwargs=True),
                attention.register_forward_hook(_Mix(search, taken), with_kwargs=True),
            ]
    if searches and family.windows is None:
        encoder = get(model, family.encoder_path(model).rstrip("."))
        handles.append(encoder.register_forward_pre_hook(_TellGrid(), with_kwargs=True))
    return handles


# ---------------------------------------------------------------------- MLP
class GatedColumns(ForwardOverride):
    """The second Linear of an MLP, its columns multiplied by the neurons' gates.

    That is the activation multiplied by them, and costs no tensor of an activation's size. An MLP without a neuron
    contributes nothing: its bias is gone too.
    """

    def __init__(self, linear: nn.Linear, gates: NeuronGates) -> None:
        super().__init__(linear)
        self.gates = gates

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        linear, gates = self.module, self.gates
        weight, bias = linear.weight, linear.bias
        if gates.training and not gates.decided:
            return F.linear(input, weight * gates.sample().to(weight.dtype), bias)
        on = gates.on()
        bias = None if bias is None else bias * on.any().to(bias.dtype)
        return F.linear(input, weight * on.to(weight.dtype), bias)

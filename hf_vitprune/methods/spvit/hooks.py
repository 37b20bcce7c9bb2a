"""The search in a running model: hooks on the attention that mix in the convolutions, and gated MLP columns.

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
from ...modeling.conv_mixer import GRID, give_grid, split_tokens
from ...modeling.structure import get
from ...spec.architecture import Architecture
from ...surgery.windows import LayerGrid, NormOutput
from ...utils.hooks import ForwardOverride, GateHook
from ...utils.processes import distributed
from .branches import Attention, Branches, Grid
from .gates import LEVELS, MixerGates, NeuronGates, nested


class Mixing:
    """What a layer may mix its tokens with, computed from its attention's input.

    Attributes:
        branches: its convolutions.
        attention: its attention.
        special: tokens in front of the grid.
    """

    def __init__(self, branches: Branches, attention: Attention, special: int) -> None:
        self.branches, self.attention, self.special = branches, attention, special

    def mix(self, attended: torch.Tensor, tokens: torch.Tensor, grid: Grid, as_attended: Any = None) -> torch.Tensor:
        """What the layer mixes its tokens to.

        Args:
            attended: what the attention gave.
            tokens: (B, special + rows * columns, C), the layer's normalised input.
            grid: (rows, columns).
            as_attended: brings (B, rows * columns, C) into the order of ``attended``; None: it is the same.
        """
        raise NotImplementedError

    def mix_by(self, kind: str, attended: torch.Tensor, tokens: torch.Tensor, grid: Grid, as_attended: Any) -> Any:
        """Output of the mixer ``kind`` alone; arguments as of :meth:`mix`."""
        if kind == "attention":
            return attended
        if kind == "none":
            return torch.zeros_like(attended)
        return self._brought(self._convolved({kind: 1.0}, tokens, grid), attended, as_attended)

    def _convolved(
        self, shares: dict[str, Any], tokens: torch.Tensor, grid: Grid, taken: str | None = None
    ) -> torch.Tensor:
        """Weighted sum of convolution branches; special tokens pass them as they are.

        Args:
            shares: kind -> its factor.
            tokens: as of :meth:`mix`.
            grid: (rows, columns).
            taken: the only kind whose factor is not zero; None: any may be. (Processes that share weights have to go
                through the same backward passes, whatever each has drawn.)
        """
        special, patches = split_tokens(tokens, self.special, grid)
        parts = []
        for kind, share in shares.items():
            learns = torch.is_grad_enabled() and (taken in (None, kind) or distributed())
            with torch.set_grad_enabled(learns):
                part = self.branches.convolve(kind, patches, grid, self.attention)
            if not learns and torch.is_grad_enabled():  # gradients of zero, as they are times zero
                share = share + 0.0 * sum(parameter.sum() for parameter in self.branches.own(kind))
            parts.append(share * part)
        mixed = sum(parts[1:], parts[0])
        if not self.special:
            return mixed
        return torch.cat([sum(shares.values()) * special.to(mixed.dtype), mixed], dim=1)

    def _brought(self, mixed: torch.Tensor, attended: torch.Tensor, as_attended: Any) -> torch.Tensor:
        return (mixed if as_attended is None else as_attended(mixed)).to(attended.dtype)


class FixedMixer(Mixing):
    """One kind, decided.

    Attributes:
        kind: of the mixer.
    """

    def __init__(self, kind: str, branches: Branches, attention: Attention, special: int) -> None:
        super().__init__(branches, attention, special)
        self.kind = kind

    def mix(self, attended: torch.Tensor, tokens: torch.Tensor, grid: Grid, as_attended: Any = None) -> torch.Tensor:
        return self.mix_by(self.kind, attended, tokens, grid, as_attended)


class MixerSearch(Mixing):
    """All kinds, and how much of each counts now.

    Attributes:
        gates: the layer's.
        gradients: of the gates; see :func:`~hf_vitprune.methods.spvit.gates.nested`.
    """

    def __init__(
        self, gates: MixerGates, branches: Branches, attention: Attention, special: int, gradients: str
    ) -> None:
        super().__init__(branches, attention, special)
        self.gates, self.gradients = gates, gradients

    def mix(self, attended: torch.Tensor, tokens: torch.Tensor, grid: Grid, as_attended: Any = None) -> torch.Tensor:
        """Output of the searched mixer: g3 MSA + g2 (1 - g3) Conv3 + g1 (1 - g2) (1 - g3) Conv1.

        Branches without a part in the output or a gradient are not computed; of those that the gates alone learn
        from, times zero, nothing is remembered for a backward pass.
        """
        if not self.gates.training or self.gates.decided:
            return self.mix_by(LEVELS[self.gates.level()], attended, tokens, grid, as_attended)
        drawn = self.gates.sample()
        simple, middle, attention = nested(drawn, self.gradients)
        shares = {"conv3x3": middle * (1 - attention), "conv1x1": simple * (1 - middle) * (1 - attention)}
        ones = [value > 0.5 for value in drawn.tolist()]
        taken = LEVELS[sum(_prefix(ones))]
        needed = _needed(*ones) if torch.is_grad_enabled() else {taken}
        mixed = attention * attended
        convolutions = {kind: share for kind, share in shares.items() if kind in needed}
        if convolutions:
            mixed = mixed + self._brought(self._convolved(convolutions, tokens, grid, taken), attended, as_attended)
        return mixed


def _prefix(ones: list[bool]) -> list[bool]:
    return [all(ones[: i + 1]) for i in range(len(ones))]


def _needed(simple: bool, middle: bool, attention: bool) -> set[str]:
    """Convolutions whose output counts, or enters the gradient of a gate that gets one, at this draw."""
    needed = set()
    if not (simple and middle and attention):
        needed.add("conv1x1")
    if simple or middle:
        needed.add("conv3x3")
    return needed


# ---------------------------------------------------------------------- hooks of models without windows
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
    handles: list[RemovableHandle] = []
    for i, search in searches.items():
        attention = search.attention.module
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

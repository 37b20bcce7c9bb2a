"""Scores of units: first-order Taylor sums, how they are averaged over time, and those that need no gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ... import criteria
from ...errors import MissingGradientsError
from ...modeling.structure import layer_paths
from ...spec.architecture import Architecture
from ...spec.units import Axis, unit_table
from ...utils.hooks import GateHook
from ...utils.modules import get_wrapped
from ...utils.pieces import is_spread, piece_of
from ...utils.processes import mean_over_processes, sum_over_processes
from .groups import GroupedSet


def scored_axes(model: PreTrainedModel, architecture: Architecture, sets: Sequence[GroupedSet]) -> list[list[Axis]]:
    """Axes of every set that it is scored by: of a layer's units what computes them, of q/k the queries alone."""
    paths = layer_paths(model, architecture)
    table = unit_table(architecture, paths)
    scored = []
    for one in sets:
        axes = table[one.name]
        if one.layer is not None:
            path = paths[one.layer]
            modules = {path.q, path.v, *path.fc1} | ({path.k} if one.unit == "heads" else set())
            axes = [axis for axis in axes if axis.module in modules]
        scored.append(axes)
    return scored


class WeightSums:
    """Sums of weight times gradient, over the tensors that NViT attributes to a unit.

    A residual channel's tensors are its row of the patch projection, its columns of q, k, v and fc1 and its rows of
    the output projections; norms, tokens, positions and classifier do not count.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, sets: Sequence[GroupedSet]) -> None:
        self.modules: dict[str, Any] = {}
        #: tensor -> places of the sets that it counts for, and the axis of each
        self.uses: dict[str, list[tuple[int, Axis]]] = {}
        self.sets = sets
        for position, axes in enumerate(scored_axes(model, architecture, sets)):
            for axis in axes:
                try:
                    module: Any = get_wrapped(model, axis.module)
                except AttributeError:  # what a class of the family leaves out: a pooler, a norm at the end
                    continue
                is_linear = hasattr(module, "weight") and len(_shape(module.weight)) > 1
                if is_linear and getattr(module, axis.name, None) is not None:
                    self.modules[axis.module] = module
                    self.uses.setdefault(axis.tensor, []).append((position, axis))

    @property
    def trained(self) -> bool:
        """Whether all scored weights are trained, so that there will be gradients."""
        return all(module.weight.requires_grad for module in self.modules.values())

    def take(self, gradient_scale: float) -> torch.Tensor:
        """(units,) the sums of the update that is about to be made, in single precision at least.

        Of weights that are spread over processes, each sums up its pieces, and what is then summed over the processes
        is no more than this vector. ``gradient_scale`` undoes the clipping.
        """
        sums: list[Any] = [0.0] * len(self.sets)
        for tensor, uses in self.uses.items():
            parameter = getattr(self.modules[uses[0][1].module], uses[0][1].name)
            over = _sums_over(tensor, parameter, {axis.axis for _, axis in uses})
            for position, axis in uses:
                sums[position] = sums[position] + axis.sums(over[axis.axis])
        taken = torch.cat(sums)
        if is_spread(module.weight for module in self.modules.values()):
            taken = sum_over_processes(taken)
        return taken * gradient_scale


def _sums_over(name: str, parameter: Any, axes: set[int]) -> dict[int, torch.Tensor]:
    """Of a parameter times its gradient, as far as this process has it, over rows (0) or columns (1) of the whole."""
    shape, precise, piece = _shape(parameter), torch.promote_types(parameter.dtype, torch.float32), piece_of(parameter)
    if piece is None:
        sizes = {axis: math.prod(shape[1:]) if axis else shape[0] for axis in axes}
        return {axis: torch.zeros(size, dtype=precise, device=parameter.device) for axis, size in sizes.items()}
    if piece.gradient is None:
        raise MissingGradientsError(
            f"{name} has no gradient when the optimizer is about to step, and NViT scores by gradients. "
            "Either the weight was frozen after get_pruning_model (wrap the model again), or the optimizer works "
            "in the backward pass and drops gradients at once: use one that keeps them until its step"
        )
    terms = piece.values.to(precise) * piece.gradient.to(precise)
    if piece.copies > 1:
        terms /= piece.copies
    return {axis: piece.over(axis, terms) for axis in axes}


def _shape(parameter: Any) -> torch.Size:
    """Of the whole parameter, under ZeRO-3 too."""
    return getattr(parameter, "ds_shape", parameter.shape)


class ActivationSums:
    """Sums of activation times gradient: equal to those of weight times gradient, of the weights that really act.

    What a Linear puts out is linear in its row of weights and bias, so ``sum(w * dL/dw)`` over the row is
    ``sum(z * dL/dz)`` over all tokens of that output channel; and over the columns that read a residual channel it is
    that of the channel after the LayerNorm. Adapters need no special case: they are a part of the output.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, sets: Sequence[GroupedSet]) -> None:
        patch = architecture.family.patch_path(model)
        self.axes = [
            [
                axis
                for axis in axes
                if axis.name == "weight" and (axis.module == patch or (axis.axis == 0 and axis.layer is not None))
            ]
            for axes in scored_axes(model, architecture, sets)
        ]
        # the patch projection first: what comes behind it then has gradients even where all weights are frozen
        names = [patch, *(axis.module for axes in self.axes for axis in axes)]
        maps = isinstance(get_wrapped(model, patch), torch.nn.Conv2d)  # channels in front of rows and columns
        self.taps = {name: Tap(channels_first=maps and name == patch) for name in dict.fromkeys(names)}

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hook the taps in, behind all hooks that change activations."""
        return [get_wrapped(model, name).register_forward_hook(tap) for name, tap in self.taps.items()]

    def take(self, gradient_scale: float) -> torch.Tensor:
        """As of :class:`WeightSums`; gradients of activations are never clipped, so the scale does not matter."""
        seen = {name: tap.sums for name, tap in self.taps.items() if tap.sums is not None}
        silent = [name for name in self.taps if name not in seen]
        if silent:
            raise MissingGradientsError(
                f"no gradient came through {silent[0]}, and NViT scores by gradients: the forward pass of this update "
                "ran without gradients, or the module takes no part in the loss"
            )
        sums = torch.cat([torch.stack([axis.sums(seen[axis.module]) for axis in axes]).sum(0) for axes in self.axes])
        for tap in self.taps.values():
            tap.sums = None
        return mean_over_processes(sums)  # as DDP averages gradients


class Tap(GateHook):
    """Adds up what comes out of a module times its gradient, channel by channel, since the last ``take``."""

    def __init__(self, channels_first: bool) -> None:
        self.channels_first = channels_first
        self.sums: torch.Tensor | None = None

    def __call__(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        changed = not output.requires_grad
        if changed:  # nothing in front of it is trained: gradients are wanted all the same
            output = output.detach().requires_grad_()
        values = output.detach()

        def add(gradient: torch.Tensor) -> None:
            precise = torch.promote_types(values.dtype, torch.float32)
            product = (values * gradient).movedim(1, -1) if self.channels_first else values * gradient
            sums = product.flatten(0, -2).sum(0, dtype=precise)
            self.sums = sums if self.sums is None else self.sums + sums

        output.register_hook(add)
        return output if changed else None


#: divisors of the published code; the 12 of heads is twice what its formula says
REFERENCE_DIVISORS = {"embedding": 12.0, "heads": 12.0, "qk": 2.0, "v": 2.0, "mlp": 1.0}


def divisors(architecture: Architecture, sets: Sequence[GroupedSet], reference: bool) -> torch.Tensor:
    """(units,) what a unit's sum is divided by before it is squared: the number of tensors that were summed up.

    ``reference``: of the published code. By default the embedding's is the number of layers, a head's 6, and a
    neuron's the number of Linears that feed it (2 for SwiGLU).
    """
    branches = len(architecture.family.fc1_names(architecture.config))
    own = {**REFERENCE_DIVISORS, "embedding": float(len(architecture.layers)), "heads": 6.0, "mlp": float(branches)}
    table = REFERENCE_DIVISORS if reference else own
    return torch.cat([torch.full((one.size,), table[one.unit]) for one in sets])


class RunningScores(nn.Module):
    """The mean over the updates between two prune steps, and a moving average over prune steps: in buffers.

    Args:
        units: how many are scored.
        momentum: of the moving average.
        reference: the published average, which starts from zero after the first prune step and is not corrected for
            it; by default the average is, so that scores keep their size.
        device: of the buffers.
    """

    window: torch.Tensor
    average: torch.Tensor
    spoiled: torch.Tensor

    def __init__(self, units: int, momentum: float, reference: bool, device: torch.device) -> None:
        super().__init__()
        self.momentum, self.reference = momentum, reference
        self.register_buffer("window", torch.zeros(units, dtype=torch.float32, device=device))
        self.register_buffer("average", torch.zeros(units, dtype=torch.float32, device=device))
        self.register_buffer("spoiled", torch.zeros((), dtype=torch.int64, device=device))
        self.updates = 0  # in the window
        self.prune_steps = 0

    @property
    def empty(self) -> bool:
        return not self.updates and not self.prune_steps

    def add(self, scores: torch.Tensor) -> None:
        """Take in the scores (units,) of one update. Those that are not finite count as 0."""
        finite = torch.isfinite(scores)
        self.spoiled += (~finite).sum()
        self.window += torch.where(finite, scores, 0.0).to(self.window.dtype)
        self.updates += 1

    def current(self) -> torch.Tensor:
        """(units,) the scores to prune by, all updates so far included."""
        average, prune_steps = self._rolled()
        return average if self.reference else average / (1 - self.momentum**prune_steps)

    def roll(self) -> None:
        """Begin a new window, after a prune step."""
        average, self.prune_steps = self._rolled()
        self.average.copy_(average)
        self.window.zero_()
        self.updates = 0

    def _rolled(self) -> tuple[torch.Tensor, int]:
        if not self.updates:
            return self.average, self.prune_steps
        mean = self.window / self.updates
        if self.reference and self.prune_steps == 0:
            return mean, 1
        before = torch.zeros_like(mean) if self.reference and self.prune_steps == 1 else self.average
        return self.momentum * before + (1 - self.momentum) * mean, self.prune_steps + 1

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.updates, self.prune_steps])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.updates, self.prune_steps = map(int, state.tolist())


def magnitudes(model: Any, sets: Sequence[GroupedSet], alive: torch.Tensor) -> torch.Tensor:
    """(units,) L2 norm of every unit's weights, over the mean of its set's ``alive`` units and the size of a group.

    Norms of sets are of different sizes (a head has more weights than a neuron) and cannot be ranked as they are.
    """
    norms = criteria.magnitude(model)
    parts = []
    for one in sets:
        norm = norms[one.name]
        mean = norm[alive[one.places]].mean().clamp(min=torch.finfo(norm.dtype).tiny)
        parts.append(norm / mean / one.group)
    return torch.cat(parts)


def random_scores(sets: Sequence[GroupedSet], seed: int) -> torch.Tensor:
    """(units,) uniform draws, over the size of a group: sets then shrink alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.rand(one.size, generator=generator) / one.group for one in sets])

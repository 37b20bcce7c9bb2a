"""The same Taylor sums from activations and their gradients, for weights that have none of their own (adapters)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...errors import MissingGradientsError
from ...modeling.structure import get_wrapped
from ...spec.architecture import Architecture
from ...spec.units import Axis
from ...utils.hooks import GateHook
from ...utils.processes import mean_over_processes
from .scores import scored_axes
from .units import GroupedSet


class ActivationSums:
    """Sums of activation times gradient: equal to those of weight times gradient, of the weights that really act.

    What a Linear puts out is linear in its row of weights and bias, so ``sum(w * dL/dw)`` over the row is
    ``sum(z * dL/dz)`` over all tokens of that output channel; and over the columns that read a residual channel it is
    that of the channel after the LayerNorm. Adapters need no special case: they are a part of the output.

    Args:
        model: the transformers model, its Linears possibly wrapped by PEFT.
        architecture: of it.
        sets: its prunable sets.
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
        """As ``TaylorSums.take``; gradients of activations are never clipped, so the scale does not matter."""
        silent = [name for name, tap in self.taps.items() if tap.sums is None]
        if silent:
            raise MissingGradientsError(
                f"no gradient came through {silent[0]}, and NViT scores by gradients: the forward pass of this update "
                "ran without gradients, or the module takes no part in the loss"
            )
        sums = torch.cat([torch.stack([self._sums(axis) for axis in axes]).sum(0) for axes in self.axes])
        for tap in self.taps.values():
            tap.sums = None
        return mean_over_processes(sums)  # as DDP averages gradients

    def _sums(self, axis: Axis) -> torch.Tensor:
        sums = self.taps[axis.module].sums
        assert sums is not None
        return axis.sums(sums)


class Tap(GateHook):
    """Adds up what comes out of a module times its gradient, channel by channel.

    Attributes:
        sums: (channels,) since the last :meth:`ActivationSums.take`; None where there were no gradients.
    """

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

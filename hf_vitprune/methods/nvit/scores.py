"""First-order Taylor sums of every unit, from weights and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ...errors import MissingGradientsError
from ...modeling.structure import get_wrapped, layer_paths
from ...spec.architecture import Architecture
from ...spec.units import Axis, unit_table
from ...utils.pieces import is_spread, piece_of
from ...utils.processes import sum_over_processes
from .units import GroupedSet

#: divisors of the published code; the 12 of heads is twice what its formula says
REFERENCE_DIVISORS = {"embedding": 12.0, "heads": 12.0, "qk": 2.0, "v": 2.0, "mlp": 1.0}


class TaylorSums(Protocol):
    """Where the sums come from: :class:`WeightSums`, or ``ActivationSums`` where weights are frozen."""

    def take(self, gradient_scale: float) -> torch.Tensor:
        """(units,) the sums of the update that is about to be made.

        Args:
            gradient_scale: factor that undoes the clipping of the weights' gradients.

        Raises:
            MissingGradientsError: there are no gradients.
        """
        ...


def divisors(architecture: Architecture, sets: Sequence[GroupedSet], reference: bool) -> torch.Tensor:
    """(units,) what a unit's sum is divided by before it is squared: the number of tensors that were summed up.

    ``reference``: of the published code. By default the embedding's is the number of layers, a head's 6, and a
    neuron's the number of Linears that feed it (2 for SwiGLU).
    """
    branches = len(architecture.family.fc1_names(architecture.config))
    own = {**REFERENCE_DIVISORS, "embedding": float(len(architecture.layers)), "heads": 6.0, "mlp": float(branches)}
    table = REFERENCE_DIVISORS if reference else own
    return torch.cat([torch.full((one.size,), table[one.unit]) for one in sets])


def scored_axes(model: PreTrainedModel, architecture: Architecture, sets: Sequence[GroupedSet]) -> list[list[Axis]]:
    """Axes of every set that it is scored by: of a layer's units what computes them, of q/k the queries alone.

    Args:
        model: of which they are.
        architecture: of it.
        sets: its prunable sets.
    """
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

    Args:
        model: the transformers model whose weights are trained.
        architecture: of it.
        sets: its prunable sets.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, sets: Sequence[GroupedSet]) -> None:
        self.modules: dict[str, Any] = {}
        #: tensor -> places of the sets that it counts for, and the axis of each
        self.uses: dict[str, list[tuple[int, Axis]]] = {}
        self.sets = sets
        for position, axes in enumerate(scored_axes(model, architecture, sets)):
            for axis in axes:
                module = _module(model, axis.module)
                is_linear = len(_shape(getattr(module, "weight", torch.empty(0)))) > 1
                if is_linear and getattr(module, axis.name, None) is not None:
                    self.modules[axis.module] = module
                    self.uses.setdefault(axis.tensor, []).append((position, axis))

    @property
    def trained(self) -> bool:
        """Whether all scored weights are trained, so that there will be gradients."""
        return all(module.weight.requires_grad for module in self.modules.values())

    def take(self, gradient_scale: float) -> torch.Tensor:
        """As :class:`TaylorSums`. Of weights that are spread over processes, each sums up its pieces, and what is then
        summed over the processes is no more than this vector.
        """
        sums: list[Any] = [0.0] * len(self.sets)
        for uses in self.uses.values():
            terms = self._terms(uses[0][1])
            over = {axis.axis: terms.over(axis.axis) for _, axis in uses}
            for position, axis in uses:
                sums[position] = sums[position] + axis.sums(over[axis.axis])
        taken = torch.cat(sums)
        if is_spread(module.weight for module in self.modules.values()):
            taken = sum_over_processes(taken)
        return taken * gradient_scale

    def _terms(self, axis: Axis) -> _Terms:
        terms = _Terms(getattr(self.modules[axis.module], axis.name))
        if terms.lack_gradients:
            raise MissingGradientsError(
                f"{axis.tensor} has no gradient when the optimizer is about to step, and NViT scores by gradients. "
                "Either the weight was frozen after get_pruning_model (wrap the model again), or the optimizer works "
                "in the backward pass and drops gradients at once: use one that keeps them until its step"
            )
        return terms


def _module(model: PreTrainedModel, path: str) -> Any:
    """None for what a class of the family leaves out: a pooler, a norm at the end."""
    try:
        return get_wrapped(model, path)
    except AttributeError:
        return None


def _shape(parameter: Any) -> torch.Size:
    """Of the whole parameter, under ZeRO-3 too."""
    return getattr(parameter, "ds_shape", parameter.shape)


class _Terms:
    """A parameter times its gradient, as far as this process has it; in single precision at least.

    Attributes:
        lack_gradients: there is a piece of it here, without a gradient.
    """

    def __init__(self, parameter: Any) -> None:
        self._shape = _shape(parameter)
        self._precise = torch.promote_types(parameter.dtype, torch.float32)
        self._device = parameter.device
        self._piece = piece = piece_of(parameter)
        self.lack_gradients = piece is not None and piece.gradient is None
        if piece is not None and piece.gradient is not None:
            self._terms = piece.values.to(self._precise) * piece.gradient.to(self._precise)
            if piece.copies > 1:
                self._terms /= piece.copies

    def over(self, axis: int) -> torch.Tensor:
        """Sums over rows (0) or columns (1) of the whole parameter; zeros where there is nothing here."""
        if self._piece is not None and not self.lack_gradients:
            return self._piece.over(axis, self._terms)
        size = math.prod(self._shape[1:]) if axis else self._shape[0]
        return torch.zeros(size, dtype=self._precise, device=self._device)

"""First-order Taylor sums of every unit, from weights and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from ...errors import MissingGradientsError
from ...families import LayerPaths
from ...modeling.structure import get_wrapped, layer_paths
from ...spec.architecture import Architecture
from ...spec.units import channels_per_unit
from ...utils.pieces import is_spread, piece_of
from ...utils.processes import sum_over_processes
from .units import UnitSet

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


def divisors(architecture: Architecture, sets: Sequence[UnitSet], reference: bool) -> torch.Tensor:
    """(units,) what a unit's sum is divided by before it is squared: the number of tensors that were summed up.

    ``reference``: of the published code. By default the embedding's is the number of layers, a head's 6, and a
    neuron's the number of Linears that feed it (2 for SwiGLU).
    """
    branches = len(architecture.family.fc1_names(architecture.config))
    own = {**REFERENCE_DIVISORS, "embedding": float(len(architecture.layers)), "heads": 6.0, "mlp": float(branches)}
    table = REFERENCE_DIVISORS if reference else own
    return torch.cat([torch.full((one.size,), table[one.kind]) for one in sets])


class LayerSums:
    """The sums of a layer's parts, put together to those of its units.

    ``rows(path)`` is the sum over every output channel of a Linear: weights, and bias, times their gradients;
    ``columns(path)`` over every input channel, without bias.
    """

    def __init__(self, architecture: Architecture, layer: int, paths: LayerPaths) -> None:
        self.shape = architecture.layers[layer]
        self.paths = paths
        self.per_unit = channels_per_unit(architecture, "qk")

    def units(self, kind: str, rows: Any) -> torch.Tensor:
        """(units,) of one kind: heads over q, k and v; q/k channels over q; v channels over v; neurons over fc1."""
        shape, paths = self.shape, self.paths
        if kind == "mlp":
            return torch.stack([rows(path) for path in paths.fc1]).sum(0)
        if kind == "heads":
            q, k, v = (rows(path).view(shape.heads, -1).sum(1) for path in (paths.q, paths.k, paths.v))
            return q + k + v
        channels = rows(paths.q if kind == "qk" else paths.v).view(shape.heads, -1).sum(0)
        return channels.view(self.per_unit if kind == "qk" else 1, -1).sum(0)


class WeightSums:
    """Sums of weight times gradient, over the tensors that NViT attributes to a unit.

    A residual channel's tensors are its row of the patch projection, its columns of q, k, v and fc1 and its rows of
    the output projections; norms, tokens, positions and classifier do not count.

    Args:
        model: the transformers model whose weights are trained.
        architecture: of it.
        sets: its prunable sets.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, sets: Sequence[UnitSet]) -> None:
        self.sets = sets
        self.layers = [LayerSums(architecture, i, paths) for i, paths in enumerate(layer_paths(model, architecture))]
        self.patch, self.stem_axis = architecture.family.patch_path(model), architecture.family.stem_axis
        self.with_embedding = sets[0].layer is None
        names = [path for layer in self.layers for path in _linears(layer)]
        self.modules: dict[str, Any] = {name: get_wrapped(model, name) for name in (*names, self.patch)}

    @property
    def trained(self) -> bool:
        """Whether all scored weights are trained, so that there will be gradients."""
        return all(module.weight.requires_grad for module in self.modules.values())

    def take(self, gradient_scale: float) -> torch.Tensor:
        """As :class:`TaylorSums`. Of weights that are spread over processes, each sums up its pieces, and what is then
        summed over the processes is no more than this vector.
        """
        kinds = {(one.layer, one.kind) for one in self.sets}
        parts: dict[tuple[int | None, str], torch.Tensor] = {}
        embedding = self._rows(self.patch, self._terms(self.patch), self.stem_axis) if self.with_embedding else None
        for i, layer in enumerate(self.layers):
            terms = {path: self._terms(path) for path in self._needed(i, layer)}
            rows = {path: self._rows(path, own) for path, own in terms.items()}
            for kind in ("heads", "qk", "v", "mlp"):
                if (i, kind) in kinds:
                    parts[i, kind] = layer.units(kind, rows.__getitem__)
            if embedding is not None:
                readers, writers = _sides(layer)
                embedding = embedding + sum(terms[path].over(1) for path in readers)
                embedding = embedding + sum(rows[path] for path in writers)
        if embedding is not None:
            parts[None, "embedding"] = embedding
        taken = torch.cat([parts[one.layer, one.kind] for one in self.sets])
        if is_spread(module.weight for module in self.modules.values()):
            taken = sum_over_processes(taken)
        return taken * gradient_scale

    def _needed(self, index: int, layer: LayerSums) -> list[str]:
        """Linears whose gradients the sets of this layer (and the embedding) take."""
        if self.with_embedding:
            return _linears(layer)
        kinds = {one.kind for one in self.sets if one.layer == index}
        paths = layer.paths
        needed = [paths.q] if kinds & {"heads", "qk"} else []
        needed += [paths.k] if "heads" in kinds else []
        needed += [paths.v] if kinds & {"heads", "v"} else []
        return needed + (list(paths.fc1) if "mlp" in kinds else [])

    def _terms(self, path: str) -> _Terms:
        terms = _Terms(self.modules[path].weight)
        if terms.lack_gradients:
            raise MissingGradientsError(
                f"{path}.weight has no gradient when the optimizer is about to step, and NViT scores by gradients. "
                "Either the weight was frozen after get_pruning_model (wrap the model again), or the optimizer works "
                "in the backward pass and drops gradients at once: use one that keeps them until its step"
            )
        return terms

    def _rows(self, path: str, terms: _Terms, axis: int = 0) -> torch.Tensor:
        """(outputs,) of a Linear's weight and bias."""
        bias = getattr(self.modules[path], "bias", None)
        sums = terms.over(axis)
        return sums if bias is None else sums + _Terms(bias).over(0)


class _Terms:
    """A parameter times its gradient, as far as this process has it; in single precision at least.

    Attributes:
        lack_gradients: there is a piece of it here, without a gradient.
    """

    def __init__(self, parameter: Any) -> None:
        self._shape = getattr(parameter, "ds_shape", parameter.shape)
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


def _sides(layer: LayerSums) -> tuple[list[str], list[str]]:
    """Linears that read the residual stream, and those that write to it."""
    paths = layer.paths
    attention = layer.shape.mixer == "attention"
    readers = ([paths.q, paths.k, paths.v] if attention else []) + (list(paths.fc1) if layer.shape.mlp else [])
    writers = ([paths.o] if attention else []) + ([paths.fc2] if layer.shape.mlp else [])
    return readers, writers


def _linears(layer: LayerSums) -> list[str]:
    readers, writers = _sides(layer)
    return readers + writers

"""Activation: how large what a unit puts out is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..families import LayerPaths
from ..spec.architecture import Architecture
from ..spec.units import channels_per_unit, has_embedding_set, set_name
from ..utils.batches import run_images
from ..utils.examples import processed
from ..utils.modes import evaluating
from ..utils.offload import check_weights
from .scores import UnitScores, batches_of, model_to_score


def activation(model: Any, images: Any, part: str | None = None) -> UnitScores:
    """Mean magnitude, over tokens and images, of what every unit puts out; no labels, no gradients.

    After Minitron (Muralidharan et al., arXiv 2407.14679), with the mean as aggregation. A neuron: what the second
    Linear reads. A v channel and a head: what the output projection reads, averaged over the head. A q/k channel: mean
    ``|q|`` times mean ``|k|``. A residual channel: what the norms of all layers put out there. A layer: what it adds
    to the residual stream, relative to the stream.

    Args:
        model: stock or pruned transformers model, or a PeftModel over one (active adapters merged).
        images: an iterable of batches, a DataLoader, or anything that ``ImageBatches`` takes; labels are not looked
        at. part: which tower of a bigger model (see :func:`hf_vitprune.towers`), which runs by itself; its only one by
        default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
        InvalidDataError: there are no images, or they cannot be read.
        ScoresError: an activation is not finite.
    """
    base, architecture, paths = model_to_score(model, part)
    check_weights(model, "scoring")
    architecture.check_looks("the activation criterion", at_images=False)
    count = 0
    meter = _Magnitudes()
    handles = [handle for i, path in enumerate(paths) for handle in _attach(base, architecture, i, path, meter)]
    try:
        with evaluating(base):
            for batch in batches_of(processed(images, model), architecture.family.form(architecture.config)):
                count += len(batch["pixel_values"])
                run_images(base, batch)
    finally:
        for handle in handles:
            handle.remove()
    return UnitScores(architecture, _scores(architecture, meter), "activation", {"images": count})


class _Magnitudes:
    """Mean magnitude of every channel of some activations, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add (..., channels)."""
        flat = values.detach().abs().flatten(0, -2)
        total = flat.sum(0, dtype=torch.promote_types(flat.dtype, torch.float32)).double().cpu()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.tokens[name] = self.tokens.get(name, 0) + len(flat)

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.tokens[name]


def _attach(
    model: nn.Module, architecture: Architecture, i: int, paths: LayerPaths, meter: _Magnitudes
) -> list[torch.utils.hooks.RemovableHandle]:
    shape = architecture.layers[i]
    watched = [(paths.q, "q", False), (paths.k, "k", False), (paths.o, "heads", True)]
    watched = watched if shape.mixer == "attention" else []
    watched += [(paths.norm1, "norm1", False)] if shape.mixer != "none" else []
    watched += [(paths.norm2, "norm2", False), (paths.fc2, "mlp", True)] if shape.mlp else []

    def watch(name: str, reads: bool) -> Any:
        return lambda module, args, output: meter.add(f"{i} {name}", args[0] if reads else output)

    def layer(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        meter.add(f"{i} stream", before)
        meter.add(f"{i} update", after - before)

    handles: list[Any] = [model.get_submodule(paths.layer).register_forward_hook(layer, with_kwargs=True)]
    return handles + [
        model.get_submodule(path).register_forward_hook(watch(name, reads)) for path, name, reads in watched
    ]


def _scores(architecture: Architecture, meter: _Magnitudes) -> dict[str, torch.Tensor]:
    mean: Callable[[str], torch.Tensor] = meter.mean
    layers = range(len(architecture.layers))
    scores = {"layers": torch.stack([mean(f"{i} update").mean() / mean(f"{i} stream").mean() for i in layers])}
    for i, shape in enumerate(architecture.layers):
        if shape.mixer == "attention":
            channels = mean(f"{i} heads").view(shape.heads, shape.v_dim)
            scores[set_name("heads", i)], scores[set_name("v", i)] = channels.mean(1), channels.mean(0)
            channels = (mean(f"{i} q") * mean(f"{i} k")).view(shape.heads, -1).mean(0)
            scores[set_name("qk", i)] = channels.view(channels_per_unit(architecture, "qk"), -1).sum(0)
        if shape.mlp:
            scores[set_name("mlp", i)] = mean(f"{i} mlp")
    if has_embedding_set(architecture):
        names = [name for i in layers for name in (f"{i} norm1", f"{i} norm2") if name in meter.sums]
        scores["embedding"] = torch.stack([mean(name) for name in names]).mean(0)
    return scores

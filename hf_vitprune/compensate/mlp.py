"""MLP: a refitted fc2, on the plan's hidden neurons or on those that serve best."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..utils.processes import from_first
from .algebra import obs
from .fits import Branch
from .layer import Layer
from .moments import Moments, Statistics
from .readers import Inputs, mlp_inputs
from .site import Site

#: bytes of hidden neurons that are kept from when they are measured to when the new fc2 reads them
HELD = 2**29


def compensate_mlp(site: Site) -> None:
    """New weights for the MLP of a layer. Both streams are before it, and past it then."""
    small = site.streams.small
    hidden = _hidden(site)
    if hidden is None:
        small[:] = [site.small.after_mlp(residual) for residual in small]
    else:  # the hidden neurons are not computed again
        small[:] = [site.small.past("fc2", *pair) for pair in zip(small, hidden, strict=True)]


def _hidden(site: Site) -> list[torch.Tensor] | None:
    """Write the new weights.

    Returns:
        What fc2 reads then, where that is known and not too large.
    """
    streams, settings = site.streams, site.settings
    position = 2 * site.entry.index + 1
    streams.advance(position)
    inputs = mlp_inputs(site)
    lost = _loses_neurons(site)
    over = streams.takes_over(position) and "layers" in settings.parts
    site.ledger.lossy |= lost
    streams.advance(streams.next_position(position))
    reselect = lost and settings.reselect and "mlp" in settings.parts
    if not reselect:
        _write_hidden(site, inputs)
    if not (over or (site.ledger.lossy and "mlp" in settings.parts)):
        return None
    site.ledger.lossy = True
    output = site.kept_rows(site.dense.weights("fc2")[0])
    layer = _widened(site, inputs) if reselect else site.small
    stats, hidden = _moments(site, layer, len(output))
    kept = torch.tensor(site.entry.mlp, device=output.device)
    branch = Branch(stats, output if reselect else output[:, kept], site.small.scale("fc2"), together=True)
    if reselect:
        gone, _ = obs(branch.effect, stats.xx, len(kept), ridge=settings.ridge)
        gone = from_first(gone)
        site.entry = replace(site.entry, mlp=tuple(sorted({*range(site.source.mlp)} - {*gone.tolist()})))
        kept = torch.tensor(site.entry.mlp, device=output.device)
        _write_hidden(site, inputs)
        branch = branch.take(kept)
        hidden = hidden and [one[..., kept.to(one.device)] for one in hidden]
    fit = branch.refit(settings.ridge)
    site.write("fc2", fit.weight, fit.bias)
    site.record("mlp", fit)
    return hidden


def _write_hidden(site: Site, inputs: Inputs) -> None:
    """The rows of fc1 (gate and up) of the kept neurons."""
    for part in site.dense.fc1:
        weight, bias = inputs.weights(site, part)
        kept = torch.tensor(site.entry.mlp, device=weight.device)
        site.write(part, weight[kept], bias[kept])


def _widened(site: Site, inputs: Inputs) -> Layer:
    """The kept layer with all hidden neurons; its fc2 is none of its own."""
    wide = site.small.copy()
    for part in site.dense.fc1:
        wide.replace(part, *inputs.weights(site, part))
    return wide


def _moments(site: Site, layer: Layer, targets: int) -> tuple[Statistics, list[torch.Tensor] | None]:
    """Of the hidden neurons and of what they should add; and the neurons themselves, up to ``HELD`` bytes."""
    moments = Moments(len(layer.part("fc1.0").weight), targets, site.device)
    held: list[torch.Tensor] | None = []
    for small, dense in site.streams.pairs():
        hidden = layer.hidden_units(small)
        moments.add(hidden.flatten(0, 1), (dense - small).flatten(0, 1), site.streams.token_weights(small))
        if held is not None:
            held = [*held, hidden] if (len(held) + 1) * hidden.nbytes <= HELD else None
    return moments.total(site.small.part("fc2").bias is not None), held


def _loses_neurons(site: Site) -> bool:
    """Removed neurons that fc2 reads."""
    output = site.dense.weights("fc2")[0]
    gone = torch.ones(output.shape[1], dtype=torch.bool, device=output.device)
    gone[list(site.entry.mlp)] = False
    return bool(output[:, gone].any())

"""MLP: a refitted fc2, on the plan's hidden neurons or on those that serve best."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .algebra import obs
from .fits import refit
from .moments import Moments, Statistics
from .readers import Inputs, mlp_inputs
from .site import Site
from .walk import Layer


def compensate_mlp(site: Site) -> None:
    """New weights for the MLP of a layer. The pruned stream is before it; the dense one is past it then."""
    streams, settings = site.streams, site.settings
    branch = 2 * site.entry.index + 1
    streams.advance(branch)
    inputs = mlp_inputs(site)
    lost = _loses_neurons(site)
    over = streams.takes_over(branch) and "layers" in settings.parts
    site.ledger.lossy |= lost
    streams.advance(streams.next_position(branch))
    reselect = lost and settings.reselect and "mlp" in settings.parts
    if not reselect:
        _write_hidden(site, inputs)
    if not (over or (site.ledger.lossy and "mlp" in settings.parts)):
        return
    site.ledger.lossy = True
    output = site.kept_rows(site.weights(site.dense, "fc2")[0])
    scale = site.scale("scale2")
    layer = _widened(site, inputs) if reselect else site.small
    kept = torch.tensor(site.entry.mlp, device=output.device)
    stats = _hidden_moments(site, layer, len(output))
    if reselect:
        effect = output if scale is None else scale[:, None] * output
        gone, _ = obs(effect, stats.xx, len(kept), ridge=settings.ridge)
        site.entry = replace(site.entry, mlp=tuple(sorted({*range(site.source.mlp)} - {*gone.tolist()})))
        kept = torch.tensor(site.entry.mlp, device=output.device)
        _write_hidden(site, inputs)
    small = stats.take(kept) if layer is not site.small else stats
    fit = refit(small, output[:, kept], scale, settings.ridge)
    site.write("fc2", fit.weight, fit.bias)
    site.record("mlp", fit)


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
        linear = wide.part(part)
        for name, tensor in zip(("weight", "bias"), inputs.weights(site, part), strict=True):
            old = linear._parameters[name]
            if old is not None:
                linear._parameters[name] = nn.Parameter(tensor.to(old), requires_grad=False)
    return wide


def _hidden_moments(site: Site, layer: Layer, targets: int) -> Statistics:
    moments = Moments(len(layer.part("fc1.0").weight), targets, site.device)
    for small, dense in site.streams.pairs():
        hidden = layer.hidden_units(small)
        moments.add(hidden.flatten(0, 1), (dense - small).flatten(0, 1), site.streams.token_weights(small))
    return moments.total(site.small.part("fc2").bias is not None)


def _loses_neurons(site: Site) -> bool:
    """Removed neurons that fc2 reads."""
    output = site.weights(site.dense, "fc2")[0]
    gone = torch.ones(output.shape[1], dtype=torch.bool, device=output.device)
    gone[list(site.entry.mlp)] = False
    return bool(output[:, gone].any())

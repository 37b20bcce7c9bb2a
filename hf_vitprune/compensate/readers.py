"""What attention, MLP and head read: removed inputs and residual channels, predicted from those that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..surgery.cuts import find_cuts
from .fits import fold
from .moments import Moments, precise_device
from .site import Ledger, Site
from .streams import Streams


@dataclass
class Inputs:
    """What the Linears of a branch read in the small model, in terms of the dense one's inputs.

    Attributes:
        map: (dense inputs, kept inputs); None where they are the same.
        constant: (dense inputs,) added to it.
    """

    map: torch.Tensor | None = None
    constant: torch.Tensor | None = None

    def weights(self, site: Site, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of a dense Linear on the kept inputs, all its outputs."""
        weight, bias = site.dense.weights(part)
        if self.map is None or self.constant is None:
            return weight, bias
        return weight @ self.map, bias + weight @ self.constant


def attention_inputs(site: Site) -> Inputs:
    """What q, k and v read; nothing is written yet."""
    return _inputs(site, True, site.entry.attention_in, ["q", "k", "v"])


def mlp_inputs(site: Site) -> Inputs:
    """What fc1 (gate and up) reads; nothing is written yet."""
    return _inputs(site, False, site.entry.mlp_in, site.dense.fc1)


def _inputs(site: Site, attention: bool, kept: tuple[int, ...] | None, readers: list[str]) -> Inputs:
    width = site.dense.part(readers[0]).in_features
    stay = site.streams.kept if kept is None else torch.tensor(kept)
    if stay is None:
        return Inputs()
    at = precise_device(site.device)
    stay = stay.to(at)
    prior = selection(stay, width, at)
    gone = torch.ones(width, dtype=torch.bool, device=at)
    gone[stay] = False
    plain = Inputs(prior, prior.new_zeros(width))
    if kept is not None and not any(bool(site.dense.weights(name)[0][:, gone].any()) for name in readers):
        return plain  # nobody read them
    site.ledger.lossy = True
    part = "embedding" if kept is None else "inputs"
    if part not in site.settings.parts:
        return plain
    moments = Moments(len(stay), width, site.device)
    for small, dense in zip(site.streams.small, site.streams.dense, strict=True):
        if attention:
            x, t = site.small.attention_inputs(small), site.dense.attention_inputs(dense)
        else:
            x, t = site.small.mlp_inputs(small), site.dense.mlp_inputs(dense)
        rows = x.shape[:2]
        weights = site.streams.token_weights(small) if rows == small.shape[:2] else x.new_ones(rows.numel())
        moments.add(x.flatten(0, 1), t.flatten(0, 1), weights)
    centred = all(site.dense.part(name).bias is not None for name in readers)
    return Inputs(*fold(moments.total(centred), prior, site.settings.ridge, together=True))


def selection(kept: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """(size, kept) zeros, and ones that put kept features back into their places."""
    matrix = torch.zeros(size, len(kept), dtype=torch.float64, device=device)
    matrix[kept.to(device), torch.arange(len(kept), device=device)] = 1
    return matrix


# ---------------------------------------------------------------------- behind the last layer
def compensate_head(dense: PreTrainedModel, small: PreTrainedModel, streams: Streams, ledger: Ledger) -> None:
    """Predict the removed channels of the final tokens for the Linears that read them (classifiers, poolers).

    The fit is over all tokens; it holds for what Linears read of them, one token, their mean, or both side by side.
    """
    plan = streams.plan
    if streams.kept is None or "embedding" not in streams.settings.parts:
        return
    streams.advance(2 * len(plan.source.layers))
    readers = _readers(dense, small, streams)
    if not readers:
        ledger.note("embedding: no Linear behind the last layer reads single residual channels; nothing to make up")
        return
    norm = plan.source.family.head_norm(plan.source.task)
    width = plan.source.hidden_size
    moments = Moments(len(streams.kept), width, streams.device)
    for here, there in zip(streams.small, streams.dense, strict=True):
        x, t = streams.small_walk.behind(norm, here), streams.dense_walk.behind(norm, there)
        moments.add(x.flatten(0, 1), t.flatten(0, 1), streams.token_weights(here))
    prior = selection(streams.kept, width, precise_device(streams.device))
    matrix, constant = fold(moments.total(), prior, streams.settings.ridge, together=True)
    for name, old in readers.items():
        weight = old.weight.detach().to(matrix)
        copies = weight.shape[1] // width
        new: Any = small.get_submodule(name)
        new.weight.data.copy_(weight @ torch.block_diag(*[matrix] * copies))
        if new.bias is not None:
            new.bias.data.copy_(old.bias.detach().to(matrix) + weight @ constant.repeat(copies))


def _readers(dense: PreTrainedModel, small: PreTrainedModel, streams: Streams) -> dict[str, Any]:
    """Name in the small model -> dense Linear, for those behind the layers whose inputs are cut."""
    layers = tuple(layer.paths["layer"] + "." for layer in streams.small_walk.layers)
    found = {}
    for name, cut in find_cuts(dense, small, streams.plan).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and 1 in cut.index and not name.startswith(layers):
            old = dense.get_submodule(cut.source.rpartition(".")[0])
            if isinstance(old, nn.Linear):
                found[module] = old
    return found

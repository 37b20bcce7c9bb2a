"""What attention and MLP read: removed inputs, and removed residual channels, predicted from those that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .fits import fold
from .moments import Moments, precise_device
from .site import Site


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
        weight, bias = site.weights(site.dense, part)
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
    if kept is not None and not any(bool(site.weights(site.dense, name)[0][:, gone].any()) for name in readers):
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
    return Inputs(*fold(moments.total(centred), prior, site.settings.ridge))


def selection(kept: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """(size, kept) zeros, and ones that put kept features back into their places."""
    matrix = torch.zeros(size, len(kept), dtype=torch.float64, device=device)
    matrix[kept.to(device), torch.arange(len(kept), device=device)] = 1
    return matrix

"""Local reconstruction: a layer's weights, after their fits, trained to bring the stream to where the dense one is."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..utils.processes import shard, sum_over_processes
from .moments import precise_device
from .streams import Site

#: of Adam, after a linear warm-up over a tenth of the steps, before a linear decay to zero
RATE = 3e-4
#: images (or views) a step
IMAGES = 16


def reconstruct(site: Site, before: list[torch.Tensor]) -> None:
    """Train the Linears of a compensated layer together; what they were stays where training does not help.

    The pruned stream is past the layer; ``before``: it before the layer, a tensor (images, tokens, width) a batch.
    """
    if not site.ledger.lossy or not (site.entry.mlp or site.entry.mixer == "attention"):
        return
    targets = [dense for _, dense in site.streams.pairs()]
    spread, fitted = _spread(site, targets), _lost(site, site.streams.small, targets)
    if not min(spread, fitted) > 0:
        return
    names = [part for part in ("q", "k", "v", "o", *site.dense.fc1, "fc2") if site.small.has(part)]
    weights = [weight for name in names for weight in site.small.part(name).parameters()]
    old = [weight.detach().clone() for weight in weights]
    frozen = [weight.requires_grad_(True) for weight in weights if not weight.requires_grad]
    try:
        with torch.enable_grad():
            _train(site, before, targets, weights)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    after = [site.small.run(hidden) for hidden in before]
    trained = _lost(site, after, targets)
    if trained < fitted:
        site.streams.small[:] = after
    else:
        for weight, kept in zip(weights, old, strict=True):
            weight.data.copy_(kept)
    site.record("local", math.sqrt(fitted / spread), math.sqrt(min(fitted, trained) / spread))


def _train(site: Site, before: list[torch.Tensor], targets: list[torch.Tensor], weights: list[nn.Parameter]) -> None:
    steps, each = site.settings.local_steps, math.ceil(IMAGES / site.settings.batch_size)
    optimizer = torch.optim.Adam(weights, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(site.entry.index)
    (rank, processes), views = shard(), site.settings.views
    numbers = {(b // views * processes + rank) * views + b % views: b for b in range(len(before))}  # over all of them
    total = int(_summed(site, [weights[0].new_tensor(len(before))]))
    for step in range(steps):
        grads = [torch.zeros_like(weight) for weight in weights]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        for drawn in torch.randint(total, (each,), generator=generator).tolist():
            if (b := numbers.get(drawn)) is not None:
                _squares(site, site.small.run(before[b]), targets[b]).backward()
        for grad in grads:
            sum_over_processes(grad)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / max(1.0, 0.1 * steps)) * (1 - step / steps)
        optimizer.step()
    optimizer.zero_grad()


def _squares(site: Site, small: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Weighted sum of squared differences of a batch."""
    return (small - dense).square().sum(-1).flatten() @ site.streams.token_weights(small).to(small.dtype)


def _lost(site: Site, small: list[torch.Tensor], targets: list[torch.Tensor]) -> float:
    """The same, of all images."""
    return float(_summed(site, [_squares(site, *pair) for pair in zip(small, targets, strict=True)]))


def _spread(site: Site, targets: list[torch.Tensor]) -> float:
    """Of the dense stream around its mean."""
    kept = site.streams.kept
    width = site.streams.plan.source.width(site.entry.index) if kept is None else len(kept)
    rows = _summed(site, [dense.new_tensor(dense.shape[:2].numel()) for dense in targets])
    sums = _summed(site, [dense.sum((0, 1)) for dense in targets], width)
    return _lost(site, [(sums / rows).to(dense).expand_as(dense) for dense in targets], targets)


def _summed(site: Site, parts: list[torch.Tensor], *size: int) -> torch.Tensor:
    """In double precision, over the batches of all processes, some of which may have none."""
    total = torch.zeros(size, dtype=torch.float64, device=precise_device(site.device))
    for part in parts:
        total += part.to(total)
    return sum_over_processes(total)

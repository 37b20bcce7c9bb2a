"""Queries and keys: for every head the basis of its channels in which their products lose least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..errors import InvalidDataError
from ..utils.processes import part_of, sum_over_processes
from .algebra import qk_maps
from .fits import Projection
from .streams import Site, real, selection

#: tokens of whole sequences at a time: bounds what their products take
TOKENS = 1024
#: bytes of the products of sequences that are kept from when they are summed to when errors are found from them
HELD = 2**28
#: differences under this share of a head's products are not worth a word
ROUNDING = 1e-4


class Products(NamedTuple):
    """(sequences, heads, channels, channels) products of queries, weighted, and of keys around their mean."""

    queries: torch.Tensor
    keys: torch.Tensor
    weights: float  # sum over the queries
    rows: int  # number of keys


def compensate_queries_and_keys(site: Site, moved: bool) -> None:
    """New weights for q and k of a layer, in any case where heads were ``moved``: others stay than the plan's."""
    size = site.source.qk_dim
    cut = any(row != tuple(range(size)) for row in site.entry.qk)
    if not cut and not moved and site.inputs is None:
        return
    rows = site.head_rows(size)
    query, key = (Projection.of(weight[rows], bias[rows], size) for weight, bias in map(site.weights, ("q", "k")))
    kept = selection(site.entry.qk, size, rows.device)
    loses = cut and site.loses(site.used("q") & site.used("k"), kept, every_head=False)
    site.ledger.lossy |= loses
    maps = kept.expand(2, *kept.shape)
    if loses and "qk" in site.settings.parts and _can_rotate(site):
        maps = _rotated(site, query, key, maps)
    site.write("q", *query.through(maps[0]))
    site.write("k", *key.through(maps[1]))


def _can_rotate(site: Site) -> bool:
    """Whether only the product of q and k matters, as their Linears give them."""
    source = site.streams.plan.source
    plain = source.family.has_plain_qk(source.config)
    if not plain:
        site.ledger.note(
            f"qk: {source.family.model_type} turns or normalises queries and keys, so that they cannot be rotated; "
            "the plan's channels are kept as they are"
        )
    return plain


def _rotated(site: Site, query: Projection, key: Projection, plain: torch.Tensor) -> torch.Tensor:
    """The maps of best low rank, of the moments of all sequences together; ``plain`` for heads in which it loses less.

    Where sequences (windows, above all) differ in their moments, one basis need not serve them.
    """
    (second, around), held = _moments(site, query, key)
    maps = torch.zeros_like(plain)
    for head in part_of(len(site.entry.qk)):
        there = real(site.entry.qk[head])
        maps[:, head] = plain[:, head]
        if 0 < len(there) < site.source.qk_dim:
            maps[0, head, there], maps[1, head, there] = qk_maps(second[head], around[head], len(there))
    maps = sum_over_processes(maps)
    choices = torch.stack([torch.zeros_like(plain), plain, maps])
    everything, sliced, rotated = _errors(_products(site, query, key) if held is None else held, choices)
    worse = rotated > sliced
    noticed = rotated > sliced + ROUNDING * everything
    if bool(noticed.any()):
        heads = ", ".join(str(site.entry.heads[j]) for j in noticed.nonzero().flatten().tolist())
        site.ledger.note(
            f"qk: images or windows differ too much for one basis in layer {site.entry.index}, head {heads}: the "
            "plan's channels are kept as they are"
        )
    total = everything.sum().clamp(min=torch.finfo(everything.dtype).tiny)
    before, after = (float((lost.sum() / total).sqrt()) for lost in (sliced, torch.minimum(sliced, rotated)))
    site.record("qk", before, after)
    return torch.where(worse[:, None, None], plain, maps)


def _products(site: Site, query: Projection, key: Projection) -> Iterator[Products]:
    """Of some sequences at a time."""
    for small in site.streams.small:
        batch = site.small.attention_inputs(small)
        weights = site.streams.token_weights(small, batch).view(*batch.shape[:2], 1, 1)
        at_once = max(1, TOKENS // batch.shape[1])
        for x, weight in zip(batch.split(at_once), weights.split(at_once), strict=True):
            x = x if x.dtype == torch.float64 else x.float()
            q = torch.einsum("stc,hdc->sthd", x, query.weight.to(x)) + query.bias.to(x)
            k = torch.einsum("stc,hdc->sthd", x - x.mean(1, keepdim=True), key.weight.to(x))
            yield Products(
                torch.einsum("sthd,sthe->shde", q * weight, q),
                torch.einsum("sthd,sthe->shde", k, k),
                float(weight.sum()),
                x.shape[:2].numel(),
            )


def _moments(site: Site, query: Projection, key: Projection) -> tuple[torch.Tensor, list[Products] | None]:
    """(2, heads, channels, channels) second moments of queries, and of keys around the mean of their sequence.

    And the products that they are made of, up to ``HELD`` bytes.
    """
    size = query.weight.shape[1]
    sums = query.weight.new_zeros(2, len(query.weight), size, size)
    counts = query.weight.new_zeros(2)
    held: list[Products] | None = []
    for one in _products(site, query, key):
        sums += torch.stack([one.queries.sum(0), one.keys.sum(0)]).to(sums)
        counts += counts.new_tensor([one.weights, one.rows])
        if held is not None:
            held = [*held, one] if (len(held) + 1) * 2 * one.queries.nbytes <= HELD else None
    moments = sum_over_processes(sums) / sum_over_processes(counts)[:, None, None, None]
    if not bool(moments.isfinite().all()):
        raise InvalidDataError("queries or keys of the calibration images are not finite numbers")
    return moments, held


def _errors(products: Iterable[Products], maps: torch.Tensor) -> torch.Tensor:
    """(choices, heads) squared error of q k^T over the pairs of every sequence, by maps (choices, 2, heads, ...)."""
    lost = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device) - maps[:, 0].mT @ maps[:, 1]
    total = maps.new_zeros(lost.shape[:2])
    for qq, kk, _, _ in products:  # over all pairs of a sequence, |q E k^T|^2 is the trace of (q^T q) E (k^T k) E^T
        for choice, between in enumerate(lost.to(qq)):
            total[choice] += ((qq @ between) * (between @ kk)).sum((0, 2, 3)).to(total)
    return sum_over_processes(total).clamp(min=0)

"""Queries and keys: for every head the basis of its channels in which their products lose least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..errors import InvalidDataError
from ..utils.processes import part_of, sum_over_processes
from .algebra import qk_maps
from .fits import Projection
from .readers import Inputs
from .site import Site, real

#: tokens of whole sequences at a time: bounds what their products take
TOKENS = 1024
#: bytes of the products of sequences that are kept from when they are summed to when errors are found from them
HELD = 2**28
#: differences under this share of a head's products are not worth a word
ROUNDING = 1e-4


class Products(NamedTuple):
    """(sequences, heads, channels, channels) products of queries, weighted, and of keys around their mean.

    ``weights`` and ``rows``: sum of the queries' weights, and number of keys.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    weights: float
    rows: int


def compensate_queries_and_keys(site: Site, inputs: Inputs, moved: bool) -> None:
    """New weights for q and k of a layer.

    Args:
        moved: other heads stay than the plan's, so that there is something to write in any case.
    """
    size = site.source.qk_dim
    cut = any(row != tuple(range(size)) for row in site.entry.qk)
    if not cut and not moved and inputs.map is None:
        return
    query, key = (
        Projection.of(weight[site.qk_rows], bias[site.qk_rows], size)
        for weight, bias in (inputs.weights(site, part) for part in ("q", "k"))
    )
    loses = cut and _loses(site)
    site.ledger.lossy |= loses
    maps = _selections(site, query.weight)
    if loses and "qk" in site.settings.parts and site.plain_qk():
        maps = _rotated(site, query, key, maps)
    site.write("q", *query.through(maps[0]))
    site.write("k", *key.through(maps[1]))


def _selections(site: Site, like: torch.Tensor) -> torch.Tensor:
    """(2, heads, kept channels, channels) of zeros and ones: the plan's channels of q and of k; padding is zero."""
    maps = like.new_zeros(2, len(site.entry.heads), len(site.entry.qk[0]), site.source.qk_dim)
    for head, row in enumerate(site.entry.qk):
        there = real(row)
        maps[:, head, there, [row[position] for position in there]] = 1
    return maps


def _loses(site: Site) -> bool:
    """Removed channels of kept heads that some query and key both use."""
    (wq, bq), (wk, bk) = (site.dense.weights(part) for part in ("q", "k"))
    used = ((wq != 0).any(1) | (bq != 0)) & ((wk != 0).any(1) | (bk != 0))
    kept = torch.zeros_like(used)
    for head, row in zip(site.entry.heads, site.entry.qk, strict=True):
        kept[[head * site.source.qk_dim + row[p] for p in real(row)]] = True
    return bool((used & ~kept)[site.qk_rows].any())


def _rotated(site: Site, query: Projection, key: Projection, plain: torch.Tensor) -> torch.Tensor:
    """The maps of best low rank, but for heads in which the plan's channels lose less.

    The low rank is that of the moments of all sequences together. Where sequences (windows, above all) differ in
    theirs it need not be the best one.
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
    site.record_errors("qk", before, after)
    return torch.where(worse[:, None, None], plain, maps)


def _products(site: Site, query: Projection, key: Projection) -> Iterator[Products]:
    """Of some sequences at a time."""
    for small in site.streams.small:
        batch = site.small.attention_inputs(small)
        weights = _query_weights(site, small, batch).view(*batch.shape[:2], 1, 1)
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


def _query_weights(site: Site, small: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(sequences * tokens,) of a batch; all alike where sequences are windows of images."""
    rows = x.shape[:2]
    return site.streams.token_weights(small) if rows == small.shape[:2] else x.new_ones(rows.numel())


def _moments(site: Site, query: Projection, key: Projection) -> tuple[torch.Tensor, list[Products] | None]:
    """(2, heads, channels, channels) second moments of queries, and of keys around the mean of their sequence.

    Returns:
        These, and the products that they are made of, up to ``HELD`` bytes.
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
    """(choices, heads) squared error of the products of queries and keys, over the pairs of every sequence.

    Args:
        maps: (choices, 2, heads, kept channels, channels) of queries and of keys.
    """
    lost = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device) - maps[:, 0].mT @ maps[:, 1]
    total = maps.new_zeros(lost.shape[:2])
    for qq, kk, _, _ in products:  # over all pairs of a sequence, |q E k^T|^2 is the trace of (q^T q) E (k^T k) E^T
        for choice, between in enumerate(lost.to(qq)):
            total[choice] += ((qq @ between) * (between @ kk)).sum((0, 2, 3)).to(total)
    return sum_over_processes(total).clamp(min=0)

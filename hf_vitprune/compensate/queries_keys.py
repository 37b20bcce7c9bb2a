"""Queries and keys: for every head the basis of its channels in which their products lose least."""

from __future__ import annotations

import torch

from ..utils.processes import distributed
from .algebra import qk_maps
from .fits import Projection
from .moments import Moments, Statistics, precise_device
from .readers import Inputs
from .site import Site, real

#: tokens of whole sequences at a time: bounds what their products take
TOKENS = 1024
#: differences under this share of a head's products are not worth a word
ROUNDING = 1e-4


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
    maps = plain.clone()
    queries, keys = _moments(site)
    second, around = query.second_moments(queries), key.covariances(keys)
    for head, row in enumerate(site.entry.qk):
        there = real(row)
        if 0 < len(there) < site.source.qk_dim:
            maps[0, head, there], maps[1, head, there] = qk_maps(second[head], around[head], len(there))
    everything, sliced, rotated = _errors(site, query, key, torch.stack([torch.zeros_like(plain), plain, maps]))
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


def _moments(site: Site) -> tuple[Statistics, Statistics]:
    """Of what queries and keys are made from; for keys around the mean of each sequence."""
    width = site.small.part("q").in_features
    queries, keys = Moments(width, 0, site.device), Moments(width, 0, site.device)
    for small in site.streams.small:
        x = site.small.attention_inputs(small)
        nothing = x.new_zeros(x.shape[0] * x.shape[1], 0)
        queries.add(x.flatten(0, 1), nothing, _query_weights(site, small, x))
        keys.add((x - x.mean(1, keepdim=True)).flatten(0, 1), nothing, x.new_ones(len(nothing)))
    return queries.total(), keys.total(centred=False)


def _query_weights(site: Site, small: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(sequences * tokens,) of a batch; all alike where sequences are windows of images."""
    rows = x.shape[:2]
    return site.streams.token_weights(small) if rows == small.shape[:2] else x.new_ones(rows.numel())


def _errors(site: Site, query: Projection, key: Projection, maps: torch.Tensor) -> torch.Tensor:
    """(choices, heads) squared error of the products of queries and keys, over the pairs of every sequence.

    Args:
        maps: (choices, 2, heads, kept channels, channels) of queries and of keys.
    """
    lost = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device) - maps[:, 0].mT @ maps[:, 1]
    total = torch.zeros(lost.shape[:2], dtype=torch.float64, device=precise_device(site.device))
    for small in site.streams.small:
        batch = site.small.attention_inputs(small)
        weights = _query_weights(site, small, batch).view(*batch.shape[:2], 1, 1)
        at_once = max(1, TOKENS // batch.shape[1])
        for x, weight in zip(batch.split(at_once), weights.split(at_once), strict=True):
            x = x if x.dtype == torch.float64 else x.float()
            q = torch.einsum("stc,hdc->sthd", x, query.weight.to(x)) + query.bias.to(x)
            k = torch.einsum("stc,hdc->sthd", x - x.mean(1, keepdim=True), key.weight.to(x))
            # over all pairs of a sequence, |q E k^T|^2 is the trace of (q^T q) E (k^T k) E^T
            qq = torch.einsum("sthd,sthe->shde", q * weight, q)
            kk = torch.einsum("sthd,sthe->shde", k, k)
            for choice, between in enumerate(lost.to(x)):
                total[choice] += ((qq @ between) * (between @ kk)).sum((0, 2, 3)).to(total)
    if distributed():
        torch.distributed.all_reduce(total)
    return total.clamp(min=0)

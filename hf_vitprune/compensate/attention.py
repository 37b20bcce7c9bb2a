"""Attention: which heads, values of best low rank a head, and a refitted output projection."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..modeling.blocks import PrunedAttentionMixin
from ..modeling.structure import shape_attention
from ..utils.mixing import mix_into
from ..utils.processes import from_first
from .algebra import balance, obs
from .fits import Branch
from .layer import Layer
from .moments import Moments, Statistics
from .queries_keys import compensate_queries_and_keys
from .readers import Inputs, attention_inputs
from .site import Site, real


def compensate_attention(site: Site) -> None:
    """New weights for the attention of a layer. Both streams are before it, and past it then."""
    site.streams.advance(2 * site.entry.index)
    site.streams.enter(site.entry.index)
    inputs = attention_inputs(site)
    moved = site.settings.reselect and len(site.entry.heads) < site.source.heads
    if moved:
        _reselect_heads(site, inputs)
    compensate_queries_and_keys(site, inputs, moved)
    contexts = _values(site, inputs, moved)
    small = site.streams.small
    if contexts is None:
        small[:] = [site.small.after_attention(hidden) for hidden in small]
    else:  # attention itself is not run again
        small[:] = [site.small.past("o", *pair) for pair in zip(small, contexts, strict=True)]


def _widened(site: Site, inputs: Inputs, every_head: bool) -> Layer:
    """The kept layer with all v channels, of its own heads and its q and k, or of every head with all of theirs."""
    wide = site.small.copy()
    attention, source = wide.part("attention"), site.streams.plan.source
    heads, qk_dim = len(site.entry.heads), len(site.entry.qk[0])
    rows = slice(None) if every_head else site.head_rows
    parts = {"v": rows}
    if every_head:
        heads, qk_dim = site.source.heads, site.source.qk_dim
        parts |= {"q": slice(None), "k": slice(None)}
        if site.dense.table() is not None:
            wide.replace_table(site.dense.table())
    turned = getattr((site.dense if every_head else site.small).part("attention"), "qk_index", None)
    mix_into(attention, PrunedAttentionMixin)  # a stock one has one width for q/k and v
    shape = replace(site.source, heads=heads, qk_dim=qk_dim)
    shape_attention(attention, shape, source.scaling(site.entry.index), source.family)
    if source.family.rotate is not None:
        attention.register_channels(source.head_dim(site.entry.index))
        attention.qk_index = attention.qk_index if turned is None else turned
    for part, chosen in parts.items():
        wide.replace(part, *(tensor[chosen] for tensor in inputs.weights(site, part)))
    return wide


def _contexts(site: Site, wide: Layer, targets: int) -> tuple[Statistics, list[torch.Tensor]]:
    """The contexts of a widened layer; their moments, unless ``targets`` is 0 with what its output should add."""
    contexts = [wide.context(small) for small in site.streams.small]
    moments = Moments(len(wide.part("v").weight), targets, site.device)  # this process may have no images
    for context, (small, dense) in zip(contexts, site.streams.pairs(), strict=True):
        missing = (dense - small)[..., :targets]
        moments.add(context.flatten(0, 1), missing.flatten(0, 1), site.streams.token_weights(small))
    return moments.total(site.small.part("o").bias is not None), contexts


# ---------------------------------------------------------------------- heads
def _reselect_heads(site: Site, inputs: Inputs) -> None:
    """As many heads as the plan keeps, leaving out those that the others can best make up for."""
    stats, _ = _contexts(site, _widened(site, inputs, every_head=True), targets=0)
    gone, _ = obs(_whole(site, stats).effect, stats.xx, len(site.entry.heads), site.source.v_dim, site.settings.ridge)
    gone = from_first(gone)
    site.entry = replace(site.entry, heads=tuple(sorted({*range(site.source.heads)} - {*gone.tolist()})))
    table = site.small.table()
    if table is not None:
        table.data.copy_(site.dense.table()[:, list(site.entry.heads)])


def _whole(site: Site, stats: Statistics) -> Branch:
    """The dense output projection, on the residual channels that stay, and LayerScale."""
    return Branch(stats, site.kept_rows(site.dense.weights("o")[0]), site.small.scale("o"), together=True)


# ---------------------------------------------------------------------- v and output projection
def _values(site: Site, inputs: Inputs, moved: bool) -> list[torch.Tensor] | None:
    """Low-rank values, and an output projection that brings the stream to where the dense one is next.

    Returns:
        What the output projection reads, where that is known by then.
    """
    streams, settings, entry = site.streams, site.settings, site.entry
    position, size = 2 * entry.index, site.source.v_dim
    cut = any(row != tuple(range(size)) for row in entry.v)
    lost = _loses_values(site)
    over = streams.takes_over(position)
    site.ledger.lossy |= lost
    rotate = cut and lost and "v" in settings.parts
    fitted = (site.ledger.lossy and "v" in settings.parts) or (over and "layers" in settings.parts)
    streams.advance(streams.next_position(position))
    down = _selection(site)
    if not (fitted or rotate):
        if moved or inputs.map is not None:
            _write_values(site, inputs, down)
        return None
    site.ledger.lossy = True
    width = len(site.kept_rows(site.dense.weights("o")[0]))
    stats, contexts = _contexts(site, _widened(site, inputs, every_head=False), width)
    whole = _whole(site, stats)
    branch = whole._replace(weight=whole.weight[:, site.head_rows])
    start = branch.weight @ down.T
    flat: list[int] = []
    if rotate:
        places = [[j * len(row) + p for p in real(row)] for j, row in enumerate(entry.v)]
        rows = [row if len(row) < size else [] for row in places]  # a head that keeps all stays as it is
        turned, worth = branch.low_rank(size, rows)
        flat = [place for row in rows for place in row]
        down[flat], start[:, flat] = turned[flat], worth[:, flat]
    fit = whole._replace(stats=stats.through(down), weight=start).refit(settings.ridge)
    factors = balance(down[flat] @ inputs.weights(site, "v")[0][site.head_rows], fit.weight[:, flat])
    down[flat] *= factors[:, None]
    fit.weight[:, flat] /= factors
    _write_values(site, inputs, down)
    site.write("o", fit.weight, fit.bias)
    site.record("attention", fit)
    return [context @ down.T.to(context) for context in contexts]


def _selection(site: Site) -> torch.Tensor:
    """(kept v channels, v channels of the kept heads) of zeros and ones; padding is a row of zeros."""
    size, width = site.source.v_dim, len(site.entry.v[0])
    heads = len(site.entry.heads)
    chosen = torch.zeros(heads * width, heads * size, dtype=torch.float64, device=site.head_rows.device)
    for j, row in enumerate(site.entry.v):
        there = real(row)
        chosen[[j * width + p for p in there], [j * size + row[p] for p in there]] = 1
    return chosen


def _write_values(site: Site, inputs: Inputs, down: torch.Tensor) -> None:
    weight, bias = inputs.weights(site, "v")
    site.write("v", down @ weight[site.head_rows], down @ bias[site.head_rows])


def _loses_values(site: Site) -> bool:
    """Removed heads or channels that are not zero."""
    output, (weight, bias) = site.dense.weights("o")[0], site.dense.weights("v")
    used = (output != 0).any(0) & ((weight != 0).any(1) | (bias != 0))
    kept = torch.zeros_like(used)
    for head, row in zip(site.entry.heads, site.entry.v, strict=True):
        kept[[head * site.source.v_dim + row[p] for p in real(row)]] = True
    return bool((used & ~kept).any())

"""Attention, MLP and head: what they read, which units stay, best low rank of values, refitted last Linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.blocks import PrunedAttentionMixin
from ..modeling.structure import shape_attention
from ..surgery.cuts import find_cuts
from ..utils.mixing import mix_into
from .algebra import balance
from .fits import fold
from .layer import Layer
from .moments import Moments, precise_device
from .queries_keys import compensate_queries_and_keys
from .streams import Site, Streams, real, selection


def compensate_attention(site: Site) -> None:
    """New weights for the attention of a layer. Both streams are before it, and past it then."""
    site.streams.advance(2 * site.entry.index)
    site.streams.enter(site.entry.index)
    find_inputs(site, site.entry.attention_in, ["q", "k", "v"])
    moved = site.settings.reselect and len(site.entry.heads) < site.source.heads
    if moved:
        _reselect_heads(site)
    compensate_queries_and_keys(site, moved)
    _go_past(site, "o", _values(site, moved), site.small.after_attention)


def compensate_mlp(site: Site) -> None:
    """New weights for the MLP of a layer. Both streams are before it, and past it then."""
    site.streams.advance(2 * site.entry.index + 1)
    find_inputs(site, site.entry.mlp_in, site.dense.fc1)
    _go_past(site, "fc2", _neurons(site), site.small.after_mlp)


def _go_past(site: Site, last: str, inputs: list[torch.Tensor] | None, run: Callable[[Any], Any]) -> None:
    """Bring the pruned stream past a branch: from what its last Linear reads, where that is known and held."""
    small = site.streams.small
    if inputs is None:
        small[:] = [run(hidden) for hidden in small]
    else:
        small[:] = [site.small.past(last, *pair) for pair in zip(small, inputs, strict=True)]


# ---------------------------------------------------------------------- attention
def _widened_attention(site: Site, every_head: bool) -> Layer:
    """The kept layer with all v channels, of its own heads and its q and k, or of every head with all of theirs."""
    wide = site.small.copy()
    attention, source = wide.part("attention"), site.streams.plan.source
    heads, qk_dim = len(site.entry.heads), len(site.entry.qk[0])
    if every_head:
        heads, qk_dim = site.source.heads, site.source.qk_dim
        wide.take_per_head(site.dense)
    turned = getattr((site.dense if every_head else site.small).part("attention"), "qk_index", None)
    mix_into(attention, PrunedAttentionMixin)  # a stock one has one width for q/k and v
    shape = replace(site.source, heads=heads, qk_dim=qk_dim)
    shape_attention(attention, shape, source.scaling(site.entry.index), source.family)
    if source.family.rotate is not None:
        attention.register_channels(source.head_dim(site.entry.index))
        attention.qk_index = attention.qk_index if turned is None else turned
    rows = slice(None) if every_head else site.head_rows(site.source.v_dim)
    for part in ("q", "k", "v") if every_head else ("v",):
        wide.replace(part, *(tensor[rows] for tensor in site.weights(part)))
    return wide


def _reselect_heads(site: Site) -> None:
    wide = _widened_attention(site, every_head=True)
    stats, _ = site.measured("o", wide.context, len(wide.part("v").weight), targets=0)
    heads = site.reselected(site.branch("o", stats), len(site.entry.heads), site.source.v_dim)
    site.entry = replace(site.entry, heads=heads)
    for (small, axis), (dense, _) in zip(site.small.per_head(), site.dense.per_head(), strict=True):
        small.data.copy_(dense.index_select(axis, torch.tensor(heads, device=dense.device)))


def _values(site: Site, moved: bool) -> list[torch.Tensor] | None:
    """Low-rank values, and a refitted output projection; what it reads, where that is known.

    ``moved``: other heads stay than the plan's, so that there is something to write in any case.
    """
    streams, settings, entry = site.streams, site.settings, site.entry
    position, size = 2 * entry.index, site.source.v_dim
    output = site.dense.weights("o")[0]
    kept = selection(entry.v, size, output.device)
    lost = site.loses((output != 0).any(0) & site.used("v"), kept, every_head=True)
    site.ledger.lossy |= lost
    rotate = lost and "v" in settings.parts and any(row != tuple(range(size)) for row in entry.v)
    fitted = streams.takes_over(position) or (site.ledger.lossy and "v" in settings.parts)
    streams.advance(streams.next_position(position))
    down, rows = torch.block_diag(*kept), site.head_rows(size)
    weight, bias = (tensor[rows] for tensor in site.weights("v"))
    if not fitted:
        if moved or site.inputs is not None:
            site.write("v", down @ weight, down @ bias)
        return None
    site.ledger.lossy = True
    wide = _widened_attention(site, every_head=False)
    stats, contexts = site.measured("o", wide.context, len(rows), len(site.kept_rows(output)))
    branch = site.branch("o", stats)
    branch = branch._replace(weight=branch.weight[:, rows])
    start = branch.weight @ down.T
    flat: list[int] = []
    if rotate:
        places = [[j * len(row) + p for p in real(row)] for j, row in enumerate(entry.v)]
        ranks = [row if len(row) < size else [] for row in places]  # a head that keeps all stays as it is
        turned, worth = branch.low_rank(size, ranks)
        flat = [place for row in ranks for place in row]
        down[flat], start[:, flat] = turned[flat], worth[:, flat]
    fit = branch._replace(stats=stats.through(down), weight=start).refit(settings.ridge)
    factors = balance(down[flat] @ weight, fit.weight[:, flat])
    down[flat] *= factors[:, None]
    fit.weight[:, flat] /= factors
    site.write("v", down @ weight, down @ bias)
    site.write_fit("o", "attention", fit)
    return contexts and [context @ down.T.to(context) for context in contexts]


# ---------------------------------------------------------------------- MLP
def _neurons(site: Site) -> list[torch.Tensor] | None:
    """A refitted fc2, on the plan's hidden neurons or on those that serve best; what it reads, where that is known."""
    streams, settings, entry = site.streams, site.settings, site.entry
    position = 2 * entry.index + 1
    output = site.dense.weights("fc2")[0]
    gone = torch.ones(site.source.mlp, dtype=torch.bool, device=output.device)
    gone[list(entry.mlp)] = False
    lost = bool(output[:, gone].any())
    site.ledger.lossy |= lost
    fitted = streams.takes_over(position) or (site.ledger.lossy and "mlp" in settings.parts)
    streams.advance(streams.next_position(position))
    reselect = lost and settings.reselect and "mlp" in settings.parts
    if not reselect:
        _write_hidden(site)
    if not fitted:
        return None
    site.ledger.lossy = True
    layer = site.small
    if reselect:  # all hidden neurons; its fc2 is none of its own
        layer = site.small.copy()
        for part in site.dense.fc1:
            layer.replace(part, *site.weights(part))
    size = len(layer.part("fc1.0").weight)
    stats, hidden = site.measured("fc2", layer.hidden_units, size, len(site.kept_rows(output)))
    branch = site.branch("fc2", stats)
    if reselect:
        site.entry = replace(entry, mlp=site.reselected(branch, len(entry.mlp)))
        _write_hidden(site)
        kept = torch.tensor(site.entry.mlp, device=output.device)
        branch = branch.take(kept)
        hidden = hidden and [one[..., kept.to(one.device)] for one in hidden]
    else:
        branch = branch._replace(weight=branch.weight[:, list(entry.mlp)])
    site.write_fit("fc2", "mlp", branch.refit(settings.ridge))
    return hidden


def _write_hidden(site: Site) -> None:
    """The rows of fc1 (gate and up) of the kept neurons."""
    kept = list(site.entry.mlp)
    for part in site.dense.fc1:
        site.write(part, *(tensor[kept] for tensor in site.weights(part)))


# ---------------------------------------------------------------------- what reads the stream
def find_inputs(site: Site, kept: tuple[int, ...] | None, readers: list[str]) -> None:
    """Find ``site.inputs`` of a branch that ``readers`` begin (q, k and v, or fc1); nothing is written yet.

    ``kept``: inputs of the branch that stay; None: the residual channels that do.
    """
    site.inputs = None
    streams, width = site.streams, site.dense.part(readers[0]).in_features
    stay = streams.kept if kept is None else torch.tensor(kept)
    if stay is None:
        return
    prior = _places(stay, width, site.device)
    site.inputs = prior, prior.new_zeros(width)
    gone = prior.sum(1) == 0
    if kept is not None and not any(bool(site.dense.weights(name)[0][:, gone].any()) for name in readers):
        return  # nobody read them
    site.ledger.lossy = True
    if ("embedding" if kept is None else "inputs") not in site.settings.parts:
        return
    read = Layer.attention_inputs if readers[0] == "q" else Layer.mlp_inputs
    moments = Moments(len(stay), width, site.device)
    for small, dense in zip(streams.small, streams.dense, strict=True):
        x, t = read(site.small, small), read(site.dense, dense)
        moments.add(x, t, streams.token_weights(small, x))
    centred = all(site.dense.part(name).bias is not None for name in readers)
    site.inputs = fold(moments.total(centred), prior, site.settings.ridge, together=True)


def _places(kept: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """(size, kept) zeros, and ones that put kept features back into their places."""
    at = precise_device(device)
    return torch.eye(size, dtype=torch.float64, device=at)[:, kept.to(at)]


def compensate_head(dense: PreTrainedModel, small: PreTrainedModel, streams: Streams) -> None:
    """Predict the removed channels of the final tokens for the Linears that read them (classifiers, poolers).

    The fit is over all tokens; it holds for what Linears read of them, one token, their mean, or both side by side.
    """
    plan = streams.plan
    if streams.kept is None or "embedding" not in streams.settings.parts:
        return
    streams.advance(2 * len(plan.source.layers))
    readers = _readers(dense, small, streams)
    if not readers:
        streams.ledger.note(
            "embedding: no Linear behind the last layer reads single residual channels; nothing to make up"
        )
        return
    norm = plan.source.family.head_norm(plan.source.task)
    width = plan.source.hidden_size
    moments = Moments(len(streams.kept), width, streams.device)
    for here, there in zip(streams.small, streams.dense, strict=True):
        x, t = streams.small_walk.behind(norm, here), streams.dense_walk.behind(norm, there)
        moments.add(x, t, streams.token_weights(here))
    prior = _places(streams.kept, width, streams.device)
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

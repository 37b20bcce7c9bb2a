"""Behind the last layer: what reads the residual stream there, where channels of it were removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..surgery.cuts import find_cuts
from .fits import fold
from .moments import Moments, precise_device
from .readers import selection
from .site import Ledger, put
from .streams import Streams


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
    matrix, constant = fold(moments.total(), prior, streams.settings.ridge)
    for name, old in readers.items():
        weight = old.weight.detach().to(matrix)
        copies = weight.shape[1] // width
        new: Any = small.get_submodule(name)
        put(new.weight, weight @ torch.block_diag(*[matrix] * copies))
        if new.bias is not None:
            put(new.bias, old.bias.detach().to(matrix) + weight @ constant.repeat(copies))


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

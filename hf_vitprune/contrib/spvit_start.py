"""What SPViT's authors fine-tune: pre-trained weights, a searched architecture, fresh unfolded convolutions."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ..errors import InvalidPlanError
from ..methods.spvit import SPViTTuningConfig
from ..plan.plan import PruningPlan
from ..pruning import prune
from ..spec.architecture import Architecture, unwrap
from ..spec.layer_shape import KERNELS
from ..training.model import PruningModel, get_pruning_model
from ..utils.modules import get
from .own_layers import own_layers


def released_start(model: Any, plan: PruningPlan) -> PruningModel:
    """A PruningModel that trains the architecture of ``plan`` from ``model``'s weights; ``export()`` folds it.

    MLPs are small from the start. A convolution is made of its layer's value and output weights by a table of ones
    with fresh BatchNorms, all of it trainable, and unfolded until the export. What nothing reads any more (queries and
    keys of those layers) is frozen. The paper fine-tunes so (arXiv 2111.11802); ``PruningModel.export(weights=model)``
    keeps the tables and BatchNorms of the search instead, folded.

    Args:
        model: as before the search; left alone.
        plan: of an SPViT search over it (``pruning_model.plan()``), or of the same shape.

    Raises:
        InvalidPlanError: the plan is of another shape, or removes more than neurons and mixers.
        UnsupportedModelError: it is a bigger model with towers in it.
    """
    own_layers(model)  # raises
    source = Architecture.of(unwrap(model))
    if not plan.source.fits(source):
        raise InvalidPlanError("the plan is for a model of another shape")
    whole = PruningPlan.dense(source)
    if len(plan.layers) != len(whole.layers):
        raise InvalidPlanError("a fresh start is for plans of SPViT, which keep every layer")
    slim = whole.with_layers(
        replace(dense, mlp=entry.mlp, mlp_in=entry.mlp_in)
        for dense, entry in zip(whole.layers, plan.layers, strict=True)
    )
    mixed = slim.with_layers(
        dense if entry.mixer == "attention" else dense.with_mixer(entry.mixer, entry.conv_channels, entry.batch_norm)
        for dense, entry in zip(slim.layers, plan.layers, strict=True)
    )
    if mixed.architecture != plan.architecture:
        raise InvalidPlanError("a fresh start is for plans of SPViT, which change mixers and remove neurons only")
    slim = replace(slim, info=plan.info)
    small = copy.deepcopy(model) if slim.removes_nothing else prune(model, slim)
    mixers = [entry.mixer for entry in plan.layers]
    _freeze_unread(small, mixers)
    return get_pruning_model(small, SPViTTuningConfig(mixers=mixers))


def _freeze_unread(model: Any, mixers: list[str]) -> None:
    """Queries, keys and position biases of convolution layers; all attention, and its norm, of layers without any."""
    for kind, (paths, _) in zip(mixers, own_layers(model), strict=True):
        if kind == "attention":
            continue
        read = [get(model, paths.v), get(model, paths.o)] if kind in KERNELS else []
        kept = {id(parameter) for module in read for parameter in module.parameters()}
        norm = [] if kind in KERNELS else [get(model, paths.norm1)]
        for module in (get(model, paths.attention), *norm):
            for parameter in module.parameters():
                parameter.requires_grad_(id(parameter) in kept)

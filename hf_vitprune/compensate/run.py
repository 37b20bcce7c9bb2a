"""Compensation of a plan: layer by layer, each on what comes out of the already compensated ones below it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import InvalidConfigError, InvalidPlanError
from ..modeling.peft_twin import plain_part
from ..plan.layer_plan import LayerPlan
from ..plan.plan import PruningPlan
from ..surgery.cuts import Cut, find_cuts
from ..surgery.masked import MaskedState
from ..surgery.transplant import check_fits, prune_plain
from ..utils.batches import ImageBatches
from ..utils.crops import Views
from ..utils.examples import processed
from ..utils.offload import StateDict, device_of
from ..utils.processes import is_first_process, shard
from .branches import compensate_attention, compensate_head, compensate_mlp
from .local import reconstruct
from .settings import Compensation
from .streams import Site, Streams
from .walk import Walk

logger = logging.get_logger(__name__)


@torch.no_grad()
def compensate_plan(
    model: Any, plan: PruningPlan, calibration: Any, compensate: Any = "auto", *, reference: PruningPlan | None = None
) -> PruningPlan:
    """The plan with new weights that make up for what it removes, found from unlabelled images.

    Layer by layer, on the already pruned layers below: what attention and MLP add to the residual stream is fitted,
    by least squares, to bring the pruned model's stream to where the dense model's is. Queries and keys, and the
    values of every head, get the basis in which fewest channels lose least. The shape stays the plan's. With several
    processes, all have to call this, with the same data.

    Args:
        model: stock or pruned transformers model, a bigger one with the plan's part in it, or a PeftModel over one
            (with its active adapters).
        plan: made for it; without factors and weights of its own.
        calibration: unlabelled images: anything that ``ImageBatches`` takes, already through the image processor.
        compensate: ``"auto"``, names of parts, or a :class:`Compensation`; ``"none"`` gives the plan back.
        reference: plan of the model under which (see ``mask``) it is what the pruned one is to follow and whose
            weights that one gets, where that is not the model as it is: with the factors that ``plan`` folds.

    Returns:
        The plan with ``weights`` (and, where units were chosen anew, other indices); ``info["compensation"]`` says
        what was done: errors of every fit before and after, and what could not be made up for.

    Raises:
        InvalidPlanError: the plan is for another architecture, carries weights, or folds factors without a reference.
        InvalidDataError: there are no images, the model does not take them, or its features are not finite.
        InvalidConfigError: unknown parts or settings.
    """
    settings = Compensation.of(compensate)
    base = plain_part(model, plan.part)[0]
    check_fits(base, plan, allow_unchanged=True)
    if settings is None:
        return plan
    plan.source.check_looks("compensation", at_images=False)
    _check(base, plan, reference, settings)
    if plan.removes_nothing:
        return plan
    masked = None if reference is None else MaskedState(base, reference)
    dense = base if masked is None else masked.model
    bare = plan.with_layers(replace(entry, scales={}) for entry in plan.layers)
    small = prune_plain(dense, bare, checked=True, state=masked)  # a masked model is not what its config says
    _check_weights(plan, find_cuts(dense, small, bare))
    form = plan.source.family.form(plan.source.config)
    calibration = processed(calibration, model)
    batches = ImageBatches(calibration, settings.batch_size, settings.images, shard=shard(), form=form)
    walks = Walk(dense, plan.source, batches, masked), Walk(small, plan.architecture, batches)
    streams = Streams(*walks, bare, Views(batches, settings.views), settings)
    entries = _layers(streams)
    compensate_head(walks[0].model, small, streams)
    for note in streams.ledger.notes if is_first_process() else ():
        logger.warning(f"compensation: {note}")
    final = plan.with_layers(
        replace(entry, scales=old.scales) for entry, old in zip(entries, plan.layers, strict=True)
    )
    said = {k: getattr(settings, k) for k in ("ridge", "token_share", "reselect", "views", "local_steps")}
    done = {"fits": streams.ledger.rows, "notes": streams.ledger.notes}
    info = {"images": batches.images, "parts": list(settings.parts), **said, **done}
    weights = {**plan.weights, **_changed(base, small, final)}
    return replace(final, weights=weights, info={**plan.info, "compensation": info})


def _check(model: PreTrainedModel, plan: PruningPlan, reference: Any, settings: Compensation) -> None:
    if reference is None and any(entry.scales for entry in plan.layers):
        raise InvalidPlanError(
            "the plan folds factors into what stays, and does not say what those of the removed units were: use "
            'PruningModel.export(calibration=...), which knows them, or compensate="none"'
        )
    device_of(model, "compensation")
    reads = plan.source.family.reads
    if settings.views > 1 and reads != "images":
        raise InvalidConfigError(f"views are parts of images, and this model reads {reads}: leave views at 1")
    if settings.local_steps and model.dtype not in (torch.float32, torch.float64):  # steps would be lost in rounding
        raise InvalidConfigError(
            f"local_steps trains weights, which are {model.dtype} here: load the model in float32, or leave it at 0"
        )


def _check_weights(plan: PruningPlan, cuts: dict[str, Cut]) -> None:
    """New mixers bring weights of their own; others would be overwritten."""
    others = sorted(name for name in plan.weights if name in cuts)
    if others:
        raise InvalidPlanError(
            f"the plan carries new weights already ({others[0]}, ...; it was compensated before?): compensate the "
            'plan that it was made from, or prune with compensate="none"'
        )


def _layers(streams: Streams) -> list[LayerPlan]:
    """Compensate all that stays, in place; what stays of every layer then."""
    plan, settings, ledger = streams.plan, streams.settings, streams.ledger
    lost = streams.unreached()
    if lost and "layers" in settings.parts:
        ledger.lossy = True
        names = ", ".join(f"{'MLP' if p % 2 else 'attention'} of layer {p // 2}" for p in lost)
        ledger.note(f"layers: nothing of their stage is kept below, so nothing takes over from the {names}")
    entries = []
    layers = zip(streams.small_walk.layers, plan.layers, strict=True)
    for small, entry in tqdm(layers, "compensating", len(plan.layers), leave=False, delay=3, disable=shard()[0] > 0):
        site = Site(streams, small, streams.dense_walk.layers[entry.index], entry, plan.source.layers[entry.index])
        streams.enter(entry.index)
        before = list(streams.small) if settings.local_steps else []
        with site.dense.present():
            _compensate(site)
        if settings.local_steps:
            reconstruct(site, before)
        entries.append(site.entry)
    return entries


def _compensate(site: Site) -> None:
    entry, small = site.entry, site.streams.small
    if entry.mixer != "none" and entry.replaces_mixer(site.source):
        site.ledger.lossy = True
        site.ledger.note(f"the {entry.mixer} mixer of layer {entry.index} keeps the weights that the plan gives it")
    if entry.mixer == "attention":
        compensate_attention(site)
    elif entry.mixer != "none":
        small[:] = [site.small.after_attention(hidden) for hidden in small]
    if entry.mlp:
        compensate_mlp(site)


def _changed(model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """The small model's tensors that are not slices of the model's."""
    state, tensors = StateDict(model), small.state_dict()
    cuts = find_cuts(model, small, plan).items()
    return {name: tensors[name] for name, cut in cuts if not torch.equal(cut.take(state[cut.source]), tensors[name])}

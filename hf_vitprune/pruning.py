"""A model and a plan -> the small model, or the full-size copy that computes the same. Knows no method.

Both go through the same cuts (``cuts.py``): ``prune`` gathers along them, ``mask`` scatters back into zeros.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from .compensate import compensate_plan
from .errors import InvalidConfigError, InvalidPlanError, NativeExportError
from .modeling.native import make_stock_
from .modeling.peft_twin import is_peft, merged_twin
from .peft import prune_peft
from .plan.lineage import named_source
from .plan.plan import PruningPlan, check_plan
from .spec.architecture import Architecture, unwrap
from .spec.towers import Tower, find_tower
from .surgery.composite import kept_feature_layers, layers_read, with_masked_tower, with_tower
from .surgery.masked import mask_plain
from .surgery.reload import load_pruned
from .surgery.transplant import empty_like, prune_plain
from .utils.examples import processed
from .utils.finite import check_finite
from .utils.modes import outside_inference_mode
from .utils.offload import check_present, check_weights
from .utils.sharding import check_whole

__all__ = ["load_pruned", "mask", "prune", "truncate"]


@outside_inference_mode()
def prune(
    model: Any,
    plan: PruningPlan,
    *,
    calibration: Any = None,
    compensate: Any = "auto",
    allow_unchanged: bool = False,
    stock: bool = True,
) -> Any:
    """A new, physically small model: same task head, same outputs as ``mask(model, plan)``.

    Args:
        model: stock or pruned transformers model, or a PeftModel over one (its adapters are sliced with it). Weights
            that ``from_pretrained(folder, device_map=...)`` left on the disk or in CPU memory are read a layer at a
            time.
        plan: what stays; made for this model or one of the same architecture.
        calibration: unlabelled images (a tensor, data set, list or loader; about 128 are enough), from which the
            loss of what is removed is made up for; None: weights are sliced and nothing else.
        compensate: what ``calibration`` is used for: ``"auto"``, names of parts, or a ``Compensation``; ``"none"``
            (or False) for nothing. See :func:`hf_vitprune.compensate.compensate_plan`.
        allow_unchanged: accept a plan that removes nothing.
        stock: give a model of the model's own class, which loads without this library, where its config can say the
            new sizes (the same in all layers, q/k as v); how it was pruned is plain data in it (``pruning_info``).
            False: always a ``Pruned<X>...`` model, whose record says what the dense sizes were.

    Returns:
        A copy of the model, cut in place, on its device and in its dtype and training mode: of its own class where
        that can hold the shape, else a ``Pruned<X>...`` one (for a PeftModel: a PeftModel over a ``Pruned<X>...``
        base, whose adapters no other base takes).

    Raises:
        InvalidPlanError: the plan is for another architecture, or removes nothing.
        UnsupportedModelError: no family is registered for the model.
        AdapterError: an adapter can be neither sliced nor merged.
        InvalidDataError: the calibration images are none, or not for this model.
        InvalidConfigError: ``compensate`` asks for something and there is no ``calibration``.
        NotFiniteError: the model has weights that are infinite or no numbers.
    """
    if calibration is None and compensate is not False and compensate not in ("auto", "none"):
        raise InvalidConfigError(f"compensate={compensate!r} needs calibration images: pass calibration=<images>")
    check_plan(plan)
    check_whole(model)
    tower = find_tower(model, plan.part)
    Architecture.of(unwrap(model), plan.part)  # raises where the model is not what its config says
    check_weights(unwrap(model).get_submodule(tower.path) if tower.path else model, "prune")
    check_finite(model, "pruned")
    calibration = processed(calibration, model)
    if tower.path:
        check_present(model, "pruning a tower inside of a bigger model")
        return _prune_part(model, tower, plan, calibration, compensate, allow_unchanged, stock)
    if is_peft(model):
        check_present(model, "pruning adapters with their model")
    given = plan.weights.keys()
    if calibration is not None:
        plan = compensate_plan(model, plan, calibration, compensate)
    if is_peft(model):
        return prune_peft(model, plan, allow_unchanged=allow_unchanged)
    small = prune_plain(unwrap(model), plan, allow_unchanged=allow_unchanged, given_away=plan.weights.keys() - given)
    if stock:
        with contextlib.suppress(NativeExportError):  # it stays what it is
            make_stock_(small)
    return small


def _prune_part(
    model: Any,
    tower: Tower,
    plan: PruningPlan,
    calibration: Any,
    compensate: Any,
    allow_unchanged: bool,
    stock: bool,
) -> Any:
    """A bigger model with its tower pruned by itself; all else is shared with ``model``."""
    whole = unwrap(model)
    named = named_source(getattr(getattr(whole, "config", None), "_name_or_path", ""))
    alone = replace(plan.of_part(None), info={**named, **plan.info})
    feature_layers = kept_feature_layers(whole, tower, alone)
    if is_peft(model):
        if calibration is not None:
            merged = merged_twin(model, tower.path).get_submodule(tower.path)
            alone = compensate_plan(merged, alone, calibration, compensate)
        return prune_peft(
            model, alone, allow_unchanged=allow_unchanged, part=tower.path, feature_layers=feature_layers
        )
    small = prune(
        whole.get_submodule(tower.path),
        alone,
        calibration=calibration,  # batches of the whole model's processor: the tower takes what it knows of them
        compensate=compensate,
        allow_unchanged=allow_unchanged,
        stock=stock,
    )
    return with_tower(whole, tower, small, alone.source.hidden_size, alone.embedding, feature_layers)


@outside_inference_mode()
def mask(model: Any, plan: PruningPlan) -> Any:
    """A full-size copy of ``model`` that computes what ``prune(model, plan)`` computes: removed units are zero.

    LayerNorms run over the kept residual channels. Useful to evaluate a plan, and to test the surgery. A PeftModel
    gives a plain model with its active adapters merged.

    Raises:
        InvalidPlanError: the plan is for another architecture.
        AdapterError: an adapter cannot be merged.
    """
    check_plan(plan)
    check_present(model, "mask")
    tower = find_tower(model, plan.part)
    check_weights(unwrap(model).get_submodule(tower.path) if tower.path else model, "mask")
    whole = merged_twin(model, tower.path) if is_peft(model) else unwrap(model)
    if not tower.path:
        return mask_plain(whole, plan)
    alone = plan.of_part(None)
    module = whole.get_submodule(tower.path)
    kept_feature_layers(whole, tower, alone)  # refuses what prune refuses
    return with_masked_tower(whole, tower, mask_plain(module, alone), empty_like(module, alone).config, alone)


@outside_inference_mode()
def truncate(model: Any, k: int | str, part: str | None = None, *, stock: bool = True) -> Any:
    """Keep the first ``k`` layers, then the unchanged final norm and head.

    Of Swin, stages above the k-th layer keep their patch merging alone.

    Args:
        model: as in :func:`prune`.
        k: number of layers; ``"unused"`` keeps all those whose output a bigger model reads, and drops what lies above
            (LLaVA reads the last layer but one), which changes no output.
        part: which tower of a bigger model; its only one by default.
        stock: as in :func:`prune`.

    Raises:
        InvalidPlanError: ``k`` is not in 1..layers-1, or is ``"unused"`` and every layer is read.
    """
    plan = PruningPlan.dense(model, part)
    total = len(plan.layers)
    if k == "unused":
        k = layers_read(unwrap(model), find_tower(model, part), total)
        if k == total:
            raise InvalidPlanError(f"every one of the {total} layers is read: there is nothing unused to drop")
    if type(k) is not int or not 1 <= k < total:
        raise InvalidPlanError(f"k is a whole number of layers in 1..{total - 1}, or 'unused', got {k!r}")
    return prune(model, plan.keep_layers(range(k)), stock=stock)

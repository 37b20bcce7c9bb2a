"""A model and a plan -> the small model, or the full-size copy that computes the same. Knows no method.

Both go through the same cuts (``cuts.py``): ``prune`` gathers along them, ``mask`` scatters back into zeros.
"""

from __future__ import annotations

import contextlib
from typing import Any

from .compensate import compensate_plan
from .errors import InvalidConfigError, InvalidPlanError, NativeExportError
from .modeling.native import make_stock_
from .modeling.peft_twin import is_peft, merged_twin
from .peft import prune_peft
from .plan.plan import PruningPlan
from .spec.architecture import unwrap
from .surgery.transplant import mask_plain, prune_plain


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
        model: stock or pruned transformers model, or a PeftModel over one (its adapters are sliced with it).
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
    """
    if calibration is not None:
        plan = compensate_plan(model, plan, calibration, compensate)
    elif compensate is not False and compensate not in ("auto", "none"):
        raise InvalidConfigError(f"compensate={compensate!r} needs calibration images: pass calibration=<images>")
    if is_peft(model):
        return prune_peft(model, plan, allow_unchanged=allow_unchanged)
    small = prune_plain(unwrap(model), plan, allow_unchanged=allow_unchanged)
    if stock:
        with contextlib.suppress(NativeExportError):  # it stays what it is
            make_stock_(small)
    return small


def mask(model: Any, plan: PruningPlan) -> Any:
    """A full-size copy of ``model`` that computes what ``prune(model, plan)`` computes: removed units are zero.

    LayerNorms run over the kept residual channels. Useful to evaluate a plan, and to test the surgery. A PeftModel
    gives a plain model with its active adapters merged.

    Raises:
        InvalidPlanError: the plan is for another architecture.
        AdapterError: an adapter cannot be merged.
    """
    return mask_plain(merged_twin(model) if is_peft(model) else unwrap(model), plan)


def truncate(model: Any, k: int) -> Any:
    """Keep the first ``k`` layers, then the unchanged final norm and head.

    Of Swin, stages above the k-th layer keep their patch merging alone.

    Raises:
        InvalidPlanError: ``k`` is not in 1..layers-1.
    """
    plan = PruningPlan.dense(model)
    total = len(plan.layers)
    if type(k) is not int or not 1 <= k < total:
        raise InvalidPlanError(f"k is a whole number of layers in 1..{total - 1}, got {k!r}")
    return prune(model, plan.keep_layers(range(k)))

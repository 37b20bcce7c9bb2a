"""Between decision and surgery: what a decision takes away is made up for from images, where that holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.utils import logging

from .adapters.absorb import why_merged
from .architecture import unwrap
from .batches import ImageBatches, fixed_randomness
from .compensate import Compensation, compensate_plan
from .errors import AdapterError
from .lineage import lineage_of, removes_only_layers
from .methods import PruningMethod
from .peft_twin import is_peft, merged_twin
from .plan import PruningPlan
from .processes import by_itself
from .transplant import mask_plain

logger = logging.get_logger(__name__)

#: images of the training set that an export looks at
TRAINING_IMAGES = 128


def compensated(
    model: Any, method: PruningMethod, plan: PruningPlan, images: Any, compensate: Any, *, asked: bool, tuned: bool
) -> PruningPlan:
    """The plan of a method's decision with weights that make up for it, or with the reason why it has none.

    Each process works by itself on all images, so that an export may be called on one of several.

    Args:
        model: the wrapped model.
        method: has decided ``plan``.
        images: anything that ``ImageBatches`` takes.
        compensate: as in :func:`hf_vitprune.prune`.
        asked: the caller gave the images; what cannot be done is then said aloud.
        tuned: the model was trained after the decision.

    Raises:
        AdapterError: images were given for a PeftModel that only loses layers.
        InvalidDataError, UnsupportedModelError, InvalidConfigError: as :func:`hf_vitprune.compensate_plan`.
    """
    settings = Compensation.of(compensate)
    if settings is None or plan.removes_nothing:
        return plan
    if compensate in ("auto", True) and not asked:
        settings = settings.replace(images=TRAINING_IMAGES)
    if is_peft(model) and removes_only_layers(plan):
        if asked:
            raise AdapterError(
                "a truncated PeftModel is its adapters over the backbone as it was, which other tasks share; "
                "compensation would change the backbone's weights. Leave calibration out, or merge_and_unload() first"
            )
        return plan
    whole = method.reference()
    reason = _nothing_to_do(method, whole, tuned) or (None if asked else _left_alone(model))
    if reason is not None:
        logger.log(logging.WARNING if asked else logging.INFO, f"the export is not compensated: {reason}")
        return replace(plan, info={**plan.info, "compensation": {"skipped": reason}})
    assert whole is not None
    base = merged_twin(model) if is_peft(model) else unwrap(model)
    plain = whole.removes_nothing and not any(entry.scales for entry in whole.layers)
    with by_itself(), fixed_randomness():
        reference = None if plain else mask_plain(base, whole)
        return compensate_plan(model, plan, ImageBatches(images), settings, reference=reference)


def is_compensated(small: Any) -> bool:
    """Whether an exported model (or PeftModel) has weights that make up for something."""
    return bool(lineage_of(unwrap(small).config).get("compensation", {}).get("fits"))


def _nothing_to_do(method: PruningMethod, whole: PruningPlan | None, tuned: bool) -> str | None:
    if tuned:
        return "the model was trained on without the removed units, and computes what it computes without them"
    return method.no_reference if whole is None else None


def _left_alone(model: Any) -> str | None:
    """Why a model is not compensated where nobody asked for it."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"the model is spread over {', '.join(devices)}"
    return why_merged(model) if is_peft(model) else None

"""Between decision and surgery: what a decision takes away is made up for from images, where that holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers.utils import logging

from ..compensate import Compensation, compensate_plan
from ..errors import AdapterError, InvalidConfigError
from ..modeling.peft_twin import is_peft, plain_part
from ..peft.absorb import why_merged
from ..plan.lineage import lineage_of, removes_only_layers
from ..plan.plan import PruningPlan
from ..spec.architecture import unwrap
from ..utils.batches import ImageBatches, fixed_randomness
from ..utils.examples import processed
from ..utils.modules import get
from ..utils.processes import by_itself

logger = logging.get_logger(__name__)

#: images of the training set that an export looks at
TRAINING_IMAGES = 128


def export_plan(pruning_model: Any, calibration: Any, compensate: Any, weights: Any = None) -> PruningPlan:
    """The plan of a PruningModel's decision with what ``PruningModel.export`` was asked for.

    Each process works by itself on all images, so that an export may be called on one of several.
    """
    asked, images = calibration is not None, processed(calibration, pruning_model.get_base_model())
    if not asked and weights is None:
        images = pruning_model.training_images
    if not asked and compensate == "auto":
        compensate = "none" if images is None else pruning_model.compensate
    settings = Compensation.of(compensate)
    plan, method = pruning_model.plan(), pruning_model.method
    if weights is not None:
        plan = method.choose(get(unwrap(weights), pruning_model.tower.path)).of_part(plan.part)
    if settings is None or plan.removes_nothing:
        return plan
    if images is None:
        raise InvalidConfigError(f"compensate={compensate!r} needs images: pass calibration=<images>")
    if compensate in ("auto", True) and not asked:
        settings = settings.replace(images=TRAINING_IMAGES)
    if weights is None:
        return _compensated(pruning_model, plan, images, settings, asked)
    whole = method.reference()  # of weights that it has not trained, where all that it trains are factors
    factors = whole if isinstance(whole, PruningPlan) and whole.removes_nothing else None
    return _followed(weights, plan, factors, images, settings)


def _compensated(
    pruning_model: Any, plan: PruningPlan, images: Any, settings: Compensation, asked: bool
) -> PruningPlan:
    """The plan with weights, or with the reason why it has none; said aloud where the caller gave the images."""
    model, method = pruning_model.model, pruning_model.method
    if is_peft(model) and removes_only_layers(plan):
        if asked:
            raise AdapterError(
                "a truncated PeftModel is its adapters over the backbone as it was, which other tasks share; "
                "compensation would change the backbone's weights. Leave calibration out, or merge_and_unload() first"
            )
        return plan
    whole = method.reference()
    if pruning_model.tuned:
        whole = "the model was trained on without the removed units, and computes what it computes without them"
    reason = whole if isinstance(whole, str) else None if asked else _left_alone(model)
    if reason is not None or isinstance(whole, str):
        logger.log(logging.WARNING if asked else logging.INFO, f"the export is not compensated: {reason}")
        return replace(plan, info={**plan.info, "compensation": {"skipped": reason}})
    return _followed(model, plan, whole, images, settings)


def _followed(
    model: Any, plan: PruningPlan, whole: PruningPlan | None, images: Any, settings: Compensation
) -> PruningPlan:
    """The plan with the weights that bring it to the model under the plan ``whole`` (None: to the model itself)."""
    base = plain_part(model, plan.part)[0]
    plain = whole is None or (whole.removes_nothing and not any(entry.scales for entry in whole.layers))
    reference = None if plain or whole is None else whole.of_part(None)
    with by_itself(), fixed_randomness():
        alone = compensate_plan(base, plan.of_part(None), ImageBatches(images), settings, reference=reference)
    return alone.of_part(plan.part)


def is_compensated(small: Any) -> bool:
    """Whether an exported model (or PeftModel) has weights that make up for something."""
    return bool(lineage_of(unwrap(small).config).get("compensation", {}).get("fits"))


def _left_alone(model: Any) -> str | None:
    """Why a model is not compensated where nobody asked for it."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"the model is spread over {', '.join(devices)}"
    return why_merged(model) if is_peft(model) else None

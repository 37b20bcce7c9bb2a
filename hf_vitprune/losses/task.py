"""The loss that an image classifier is trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import InvalidDataError, MissingLabelsError
from ..spec.architecture import unwrap
from ..spec.configs import task_of


def is_classifier(model: Any) -> bool:
    """Whether the transformers model inside classifies images: then :func:`task_loss` is its loss."""
    base = unwrap(model)
    return isinstance(base, PreTrainedModel) and task_of(base).startswith("ForImageClassification")


def task_loss(
    model: Any, labels: torch.Tensor | None, logits: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The loss that a classifier of transformers has on these logits, exact under gradient accumulation.

    Args:
        model: the transformers model; its config says what problem it is.
        labels: (batch,) classes; or (batch, classes) shares of an image's classes, rows that sum to one, as Mixup
            and CutMix make them; or (batch, classes) for several labels an image.
        logits: (batch, classes).
        num_items: labels in all micro-batches of the update; the loss is then a sum over this one, divided by it.

    Raises:
        MissingLabelsError: there are no labels.
        InvalidDataError: shares that do not sum to one.
    """
    if labels is None:
        raise MissingLabelsError("training needs labels: the batch has none")
    if _are_shares(labels, logits, model.config):
        model.config.problem_type = "single_label_classification"  # transformers would say: several labels an image
        precise = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(precise), labels.to(logits.device, precise))
        return loss if num_items is None else loss * labels.numel() / num_items  # the Trainer counts every entry
    scale = {} if num_items is None else {"num_items_in_batch": num_items}
    loss = model.loss_function(labels, logits, model.config, **scale)
    if num_items is not None and model.config.problem_type in ("regression", "multi_label_classification"):
        loss = loss * labels.numel() / num_items  # these two take the mean whatever they are given
    return loss


def _are_shares(labels: torch.Tensor, logits: torch.Tensor, config: Any) -> bool:
    """Whether labels are soft ones: the cross-entropy with a distribution over the classes is then the loss."""
    one_class = config.problem_type in (None, "single_label_classification")
    if not one_class or not labels.is_floating_point() or labels.shape != logits.shape or logits.shape[-1] < 2:
        return False
    sums = labels.double().sum(-1)
    if bool((labels >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all()):
        return True
    if config.problem_type is None:
        return False
    raise InvalidDataError(
        f"soft labels are shares of an image's classes, and these rows sum to {float(sums.min()):.3g} to "
        f"{float(sums.max()):.3g}: make them sum to one, or set config.problem_type='multi_label_classification' for "
        "several labels an image"
    )

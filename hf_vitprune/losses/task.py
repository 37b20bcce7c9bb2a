"""The loss that an image classifier is trained with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import MissingLabelsError
from ..spec.architecture import task_of, unwrap


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
        labels: (batch,) classes, or (batch, classes) for several labels.
        logits: (batch, classes).
        num_items: labels in all micro-batches of the update; the loss is then a sum over this one, divided by it.

    Raises:
        MissingLabelsError: there are no labels.
    """
    if labels is None:
        raise MissingLabelsError("training needs labels: the batch has none")
    scale = {} if num_items is None else {"num_items_in_batch": num_items}
    loss = model.loss_function(labels, logits, model.config, **scale)
    if num_items is not None and model.config.problem_type in ("regression", "multi_label_classification"):
        loss = loss * labels.numel() / num_items  # these two take the mean whatever they are given
    return loss

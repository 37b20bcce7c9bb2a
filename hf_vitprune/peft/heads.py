"""The labels of a task and the classifier for them, which an adapter brings along to a base with other labels."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import is_shared
from ..spec.architecture import Architecture

Labels = dict[int, str]


def labels_of(model: Any) -> dict[str, str] | None:
    """For the record: number -> name of every label; None for a model that has no classifier."""
    config = model.config
    return {str(i): str(name) for i, name in config.id2label.items()} if _heads(model) and config.num_labels else None


def recorded_labels(config: Any) -> Labels | None:
    """Of the task that an adapter was trained for; None where its record names none."""
    labels = getattr(config, "pruning", {}).get("labels")
    return {int(i): name for i, name in labels.items()} if labels else None


def set_labels(model: Any, labels: Labels) -> None:
    """In config and model; the Linears stay as they are."""
    model.config.id2label = dict(labels)
    model.config.label2id = {name: i for i, name in labels.items()}
    if hasattr(model, "num_labels"):
        model.num_labels = len(labels)


def check_heads(model: Any, config: Any) -> None:
    """Refuse an adapter for other labels than the base has, unless it has a classifier of its own.

    Raises:
        AdapterError: with both numbers of labels.
    """
    labels = recorded_labels(config)
    if labels is None or len(labels) == model.config.num_labels:
        return
    saved = getattr(config, "modules_to_save", None) or ()
    if not _heads(model) or not all(name in saved for name in _heads(model)):
        raise AdapterError(
            f"the adapter was trained for {len(labels)} labels and the base model has {model.config.num_labels}; the "
            f"adapter holds no classifier (modules_to_save), so load the base model with num_labels={len(labels)} and "
            "the classifier that the adapter was trained with"
        )
    if not is_shared(model) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            f"this adapter is for {len(labels)} labels, and those of the model, which has adapters already, are "
            f"{model.config.num_labels}; prepare the dense model with "
            "hf_vitprune.peft.share_backbone before loading them"
        )


def fit_heads(model: Any, config: Any, adapter: str) -> None:
    """Give the adapter's own copy of the classifier as many outputs as the adapter has labels."""
    labels = recorded_labels(config)
    if labels is None:
        return
    for name in _heads(model):
        wrapper = getattr(model, name)
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        old = wrapper.modules_to_save[adapter]
        if isinstance(old, nn.Linear) and old.out_features != len(labels):
            new = nn.Linear(
                old.in_features, len(labels), old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
            )
            new.requires_grad_(old.weight.requires_grad).train(old.training)
            wrapper.modules_to_save[adapter] = new


def _heads(model: Any) -> list[str]:
    """Names of the classifiers of a task model."""
    if not Architecture.of(model).task.startswith("ForImageClassification"):
        return []
    root = Architecture.of(model).family.root
    return [name for name, part in model.named_children() if name != root and _is_linear(part)]


def _is_linear(part: nn.Module) -> bool:
    original = getattr(part, "original_module", getattr(part, "base_layer", part))
    return isinstance(original, nn.Linear) and isinstance(original.weight, torch.Tensor)

"""An image classifier and labelled images with the same classes, by the same numbers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from hf_vitprune.utils.data import LabelledImages

from .saved import load_any_config


def load_classifier(
    model: str, images: LabelledImages, new_head: bool = False, **settings: Any
) -> tuple[Any, LabelledImages]:
    """(the classifier of a folder or Hub id, the images with its class numbers).

    A classifier keeps its own classes, and the images follow; one whose classes have no names takes the data's. With
    ``new_head`` fresh weights are for the data's classes, whatever the saved ones are for.

    Raises:
        InvalidDataError: its classes are not the data's, and no new head is asked for.
    """
    names = dict(enumerate(images.label_names))
    if new_head:
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        loaded = AutoModelForImageClassification.from_pretrained(
            model, ignore_mismatched_sizes=True, **labels, **settings
        )
        _renew_heads(loaded)
        return loaded, images
    aligned = images.aligned_to(AutoConfig.from_pretrained(model), model=model)  # before weights are read
    if aligned.match is not None and not aligned.match.named:
        names = dict(sorted(zip(aligned.match.numbers, images.label_names, strict=True)))
        settings |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return AutoModelForImageClassification.from_pretrained(model, **settings), aligned


def aligned(images: LabelledImages, model: str) -> LabelledImages:
    """The images with the class numbers of a saved classifier, which may have more classes; tells how on stderr.

    Raises:
        InvalidDataError: there are classes that the classifier does not have.
    """
    found = images.aligned_to(load_any_config(model), every=False, model=model)
    if found.match is not None and found.match.how:
        print(found.match.how, file=sys.stderr)  # what is printed may be JSON
    return found


def _renew_heads(model: Any) -> None:
    """Fresh weights, as the model's class starts them, for every Linear beside the encoder."""
    for name, old in model.named_children():
        if name == model.base_model_prefix or not isinstance(old, nn.Linear):
            continue
        weight = old.weight
        new = nn.Linear(
            old.in_features, old.out_features, old.bias is not None, device=weight.device, dtype=weight.dtype
        )
        model._init_weights(new)
        setattr(model, name, new)

"""Zero-shot accuracy of saved dual encoders."""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from hf_vitprune.evaluation.zero_shot import zero_shot_accuracy
from hf_vitprune.utils.classes import chance_note
from hf_vitprune.utils.data import load_images

from .saved import load_any_config, model_class_of


def accuracy_of_saved(model: str, source: str) -> float:
    """Zero-shot accuracy of a saved dual encoder on the evaluation split of labelled images.

    Args:
        model: folder or Hub id, with its tokenizer and image processor.
        source: what ``load_images`` takes; its class names are the captions.

    Raises:
        OSError: there is no such model, or no tokenizer or image processor with it.
        InvalidDataError, UnsupportedModelError: as :func:`zero_shot_accuracy`.
    """
    images = load_images(source, training=False)
    loaded: Any = model_class_of(load_any_config(model)).from_pretrained(model).eval()
    _, evaluation = images.processed(AutoImageProcessor.from_pretrained(model))
    accuracy = zero_shot_accuracy(loaded, AutoTokenizer.from_pretrained(model), evaluation, images.label_names)
    note = chance_note(
        accuracy, evaluation.labels, f"{model} with captions like 'a photo of a {images.label_names[0]}'"
    )
    if note is not None:
        print(note, file=sys.stderr)  # what is printed may be JSON
    return accuracy

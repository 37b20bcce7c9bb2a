"""Zero-shot accuracy of a dual encoder (CLIP, SigLIP and their kin): class names in, share of right images out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..errors import InvalidDataError, UnsupportedModelError
from ..utils.batches import ImageBatches
from ..utils.modes import evaluating
from .metrics import TopK, ranked_classes

_NO_DUAL = "compares no images with texts: zero-shot accuracy is for dual encoders"


def zero_shot_accuracy(
    model: Any, tokenizer: Any, data: Any, class_names: Sequence[str], *how: Any, **kw: Any
) -> float:
    """The ``accuracy`` of :func:`zero_shot_metrics`, which takes the same."""
    return zero_shot_metrics(model, tokenizer, data, class_names, *how, **kw)["accuracy"]


def zero_shot_metrics(
    model: Any,
    tokenizer: Any,
    data: Any,
    class_names: Sequence[str],
    template: str = "a photo of a {}.",
    batch_size: int = 64,
    k: int = 5,
) -> dict[str, float]:
    """Accuracy with class names as captions (CLIP, arXiv 2103.00020, section 3.1).

    Args:
        model: a dual encoder: it gives ``logits_per_image`` for ``input_ids`` and ``pixel_values``.
        tokenizer: its tokenizer, or its processor.
        data: images with class numbers: anything that ``ImageBatches`` takes.
        class_names: one a class, in the order of the numbers.
        template: the caption of a class, with ``{}`` for its name.
        batch_size: images a forward pass; accuracies do not depend on it.
        k: of ``top_k_accuracy``, which is left out where there are no more classes than that.

    Returns:
        ``accuracy`` and ``top_k_accuracy``: shares of images whose own class's caption is the most similar one, and is
        among the ``k`` most similar.

    Raises:
        UnsupportedModelError: the model compares no images with texts.
        InvalidDataError: a template without ``{}``, images without labels, or labels that are no number of a class.
    """
    if "{}" not in template:
        raise InvalidDataError(f"the template has a {{}} for the name of the class, and {template!r} has none")
    if not {"input_ids", "pixel_values"} <= inspect.signature(model.forward).parameters.keys():
        raise UnsupportedModelError(f"{type(model).__name__} {_NO_DUAL}")
    words = _captions(model, tokenizer, [template.format(name.replace("_", " ")) for name in class_names])
    k = k if k < len(class_names) else 1
    metric = TopK()
    with evaluating(model):
        for batch in tqdm(ImageBatches(data, batch_size), "zero-shot", leave=False, delay=3):
            labels = batch.get("labels")
            whole = isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point()
            if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
                raise InvalidDataError(f"zero-shot accuracy needs labels, numbers of the {len(class_names)} classes")
            pixels = batch["pixel_values"].to(model.device, model.dtype)
            outputs = model(pixel_values=pixels, **words)
            if "logits_per_image" not in outputs:
                raise UnsupportedModelError(f"{type(model).__name__} {_NO_DUAL}")
            logits = outputs.logits_per_image.float().cpu().numpy()
            metric.add_batch(predictions=ranked_classes(logits, k), references=labels.tolist())
    return metric.compute() or {}


def _captions(model: Any, tokenizer: Any, captions: list[str]) -> dict[str, torch.Tensor]:
    # SigLIP was trained on captions of one length, and has no mask for shorter ones
    padding: Any = "max_length" if "siglip" in model.config.model_type else True
    words = dict(tokenizer(text=captions, padding=padding, truncation=True, return_tensors="pt"))
    return {name: words[name].to(model.device) for name in ("input_ids", "attention_mask") if name in words}

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

_NO_DUAL = "compares no images with texts: zero-shot accuracy is for dual encoders"


@torch.no_grad()
def zero_shot_accuracy(
    model: Any,
    tokenizer: Any,
    data: Any,
    class_names: Sequence[str],
    template: str = "a photo of a {}.",
    batch_size: int = 64,
) -> float:
    """Share of images whose own class's caption is the most similar one (CLIP, arXiv 2103.00020, section 3.1).

    Args:
        model: a dual encoder: it gives ``logits_per_image`` for ``input_ids`` and ``pixel_values``.
        tokenizer: its tokenizer, or its processor.
        data: images with class numbers: anything that ``ImageBatches`` takes.
        class_names: one a class, in the order of the numbers.
        template: the caption of a class, with ``{}`` for its name.
        batch_size: images a forward pass.

    Raises:
        UnsupportedModelError: the model compares no images with texts.
        InvalidDataError: a template without ``{}``, images without labels, or labels that are no number of a class.
    """
    if "{}" not in template:
        raise InvalidDataError(f"the template has a {{}} for the name of the class, and {template!r} has none")
    if not {"input_ids", "pixel_values"} <= inspect.signature(model.forward).parameters.keys():
        raise UnsupportedModelError(f"{type(model).__name__} {_NO_DUAL}")
    captions = [template.format(name.replace("_", " ")) for name in class_names]
    # SigLIP was trained on captions of one length, and has no mask for shorter ones
    padding: Any = "max_length" if "siglip" in model.config.model_type else True
    words = dict(tokenizer(text=captions, padding=padding, truncation=True, return_tensors="pt"))
    device = next(model.parameters()).device
    words = {name: words[name].to(device) for name in ("input_ids", "attention_mask") if name in words}
    right = total = 0
    with evaluating(model):
        for batch in tqdm(ImageBatches(data, batch_size), "zero-shot", leave=False, delay=3):
            labels = batch.get("labels")
            whole = isinstance(labels, torch.Tensor) and labels.ndim == 1 and not labels.is_floating_point()
            if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < len(captions):
                raise InvalidDataError(f"zero-shot accuracy needs labels, numbers of the {len(captions)} classes")
            pixels = batch["pixel_values"].to(device, next(model.parameters()).dtype)
            outputs = model(pixel_values=pixels, **words)
            if "logits_per_image" not in outputs:
                raise UnsupportedModelError(f"{type(model).__name__} {_NO_DUAL}")
            right += int((outputs.logits_per_image.argmax(-1).cpu() == labels.cpu()).sum())
            total += len(labels)
    return right / total

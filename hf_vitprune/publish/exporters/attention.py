"""Attention as graphs want it: no mask where nothing is masked.

transformers leaves an empty mask out, but not while it is exported: then every layer of every encoder of images would
add zeros to all scores, and choose all outputs by a condition that always holds. That work does not shrink with the
model. For an attention without a mask function of its own transformers makes no mask.

ONNX has no node for torch's fused attention, and what stands for it reads its shapes as it runs and turns the keys
twice: for ONNX it is written in plain steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...families import family_of
from ...modeling.blocks import IN_STEPS, UNPADDED, eager_attention_forward
from ...spec.towers import towers

AttentionInterface.register(UNPADDED, sdpa_attention_forward)
AttentionInterface.register(IN_STEPS, eager_attention_forward)


@contextlib.contextmanager
def without_empty_masks(model: Any, inputs: dict[str, Any], to: str) -> Iterator[None]:
    """Encoders of images make no masks for a while; where the inputs have some, all stays as it is.

    Args:
        model, inputs: what is exported, and its example.
        to: the format.
    """
    changed = []
    if not any(name.startswith("pixel") and "mask" in name for name in inputs):
        for tower in towers(model).values():
            module = model.get_submodule(tower.path)
            family = family_of(module)
            config = family.sizes_config(module.config)
            if family.part != "text" and config._attn_implementation == "sdpa":
                changed.append(config)
    try:
        for config in changed:
            config._attn_implementation = IN_STEPS if to == "onnx" else UNPADDED
        yield
    finally:
        for config in changed:
            config._attn_implementation = "sdpa"

"""Evaluation mode, and models without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.integrations import deepspeed as zero


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Tensors made in here can be trained later, which those made within ``torch.inference_mode`` cannot."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Models made in here are shapes without weights, also where DeepSpeed (ZeRO-3) would cut new ones to pieces."""
    held = zero._hf_deepspeed_config_weak_ref  # what transformers asks; it has no public reader
    zero.unset_hf_deepspeed_config()
    try:
        with torch.device("meta"):
            yield
    finally:
        if held is not None and held() is not None:
            zero.set_hf_deepspeed_config(held())

"""What one task has to keep on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hf_vitprune.modeling.peft_twin import is_peft

from .adapters import trained_tensors


def stored(model: Any, shared_backbone: bool) -> dict[str, Any]:
    """Parameters that a task adds to what is stored, and the bytes that they take in safetensors files.

    Args:
        model: adapted, pruned or not.
        shared_backbone: other tasks use the same backbone (cut off at another depth): adapters, head and the number
            of layers are all that is the task's own. Otherwise its whole model is.
    """
    own = trained_tensors(model)
    if not shared_backbone:
        own = {
            name: p.detach().cpu().contiguous()
            for name, p in model.named_parameters()
            if ".original_module." not in name  # the untrained head that PEFT keeps beside the trained one
        }
    with tempfile.TemporaryDirectory() as folder:
        if shared_backbone and is_peft(model):
            model.save_pretrained(folder)
        else:
            save_file(own, Path(folder) / "own.safetensors")
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {
        "params": sum(tensor.numel() for tensor in own.values()),
        "bytes": size,
        "shared_backbone": shared_backbone,
    }

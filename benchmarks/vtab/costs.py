"""What a model of a sweep costs: parameters, multiply-adds, what a task has to keep on disk, and speed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hf_vitprune import count
from hf_vitprune.errors import AdapterError
from hf_vitprune.latency.measure import measure_speed
from hf_vitprune.modeling.peft_twin import is_peft, merged_twin, plain_twin
from hf_vitprune.spec.architecture import unwrap

from .adapters import HEAD, trained_tensors
from .settings import Settings


def sizes_of(adapted: Any, small: Any, shared: bool, image_size: int | None) -> dict[str, Any]:
    """Parameters and multiply-adds of a model (pruned, or the adapted one itself), beside those of the adapted one.

    ``shared``: its backbone is other tasks' too (cut off at another depth), and counts for none.
    """
    dense, cost = count(adapted, image_size), count(small, image_size)
    head = sum(p.numel() for p in plain_twin(unwrap(adapted)).get_submodule(HEAD).parameters())
    return {
        "params": cost.params,
        "dense_params": dense.params,
        "backbone_params": dense.params - head,
        "macs": cost.macs,
        "dense_macs": dense.macs,
        "stored": stored(small, shared),
    }


def stored(model: Any, shared_backbone: bool) -> dict[str, Any]:
    """Parameters that a task adds to what is stored, and the bytes that they take in safetensors files.

    Beside a shared backbone: adapters and head; else its whole model, without the untrained head that PEFT keeps.
    """
    own = trained_tensors(model)
    if not shared_backbone:
        named = {name: p for name, p in model.named_parameters() if ".original_module." not in name}
        own = {name: p.detach().cpu().contiguous() for name, p in named.items()}
    with tempfile.TemporaryDirectory() as folder:
        if shared_backbone and is_peft(model):
            model.save_pretrained(folder)
        else:
            save_file(own, Path(folder) / "own.safetensors")
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    params = sum(tensor.numel() for tensor in own.values())
    return {"params": params, "bytes": size, "shared_backbone": shared_backbone}


def speed_of(adapted: Any, small: Any, settings: Settings, progress: bool) -> dict[str, Any]:
    """Images a second, and the ratio to the adapted model; both take turns, with adapters merged where they can be.

    ``small`` is None for the adapted model itself.
    """
    models = {"dense": _as_deployed(adapted), **({} if small is None else {"pruned": _as_deployed(small)})}
    timings = measure_speed(
        models, settings.speed_batch, settings.image_size, settings.speed_rounds, progress=progress
    )
    last = list(models)[-1]
    return {
        "images_per_second": timings[last].images_per_second,
        "speedup": timings[last].speedup,
        "adapters_merged": not is_peft(models[last]),
    }


def _as_deployed(model: Any) -> Any:
    """Adapters merged, where they can be."""
    try:
        return merged_twin(model) if is_peft(model) else model
    except AdapterError:
        return model

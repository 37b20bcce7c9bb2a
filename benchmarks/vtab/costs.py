"""What a model of a sweep costs: parameters, multiply-adds, what is stored, and speed."""

from __future__ import annotations

from typing import Any

from hf_vitprune import count
from hf_vitprune.errors import AdapterError
from hf_vitprune.latency.measure import measure_speed
from hf_vitprune.modeling.peft_twin import is_peft, merged_twin, plain_twin
from hf_vitprune.spec.architecture import unwrap

from .adapters import HEAD
from .settings import Settings
from .storage import stored


def sizes_of(adapted: Any, small: Any, shared: bool, image_size: int | None) -> dict[str, Any]:
    """Parameters and multiply-adds of a model, beside those of the adapted one, and what a task keeps on disk.

    Args:
        adapted: all of its layers.
        small: pruned, or the adapted model itself.
        shared: the backbone is other tasks' too, and counts for none.
        image_size: side in pixels; None for the model's own.
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


def speed_of(adapted: Any, small: Any, settings: Settings, progress: bool) -> dict[str, Any]:
    """Images a second, and the ratio to the adapted model; both take turns, with adapters merged where they can be.

    Args:
        small: None for the adapted model itself.
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

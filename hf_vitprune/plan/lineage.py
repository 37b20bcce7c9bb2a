"""Which units a pruned model was made of. Shapes cannot tell: layers 0 and 1 of a model are shaped like 0 and 2."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..cost import count
from ..errors import InvalidConfigError
from ..spec.configs import lineage_of
from .layer_plan import LayerPlan
from .plan import PruningPlan

#: key of ``PruningPlan.info``: digest of weights that differ from those of the source checkpoint (merged adapters)
ALTERED_WEIGHTS = "altered_weights"


def lineage(config: PreTrainedConfig, plan: PruningPlan) -> dict[str, Any]:
    """What goes into the info of the record of what ``plan`` makes of a model with this config.

    Returns:
        ``plan``, a digest of every decision since the dense model; and, where whole layers were all that was ever
        removed, ``kept_layers``, their positions in the dense model; ``dense``, its sizes, where a stock config
        between the two has others; ``history``, what every model was from the dense one to that which is pruned now.
    """
    info = lineage_of(config)
    dense = {"dense": info["dense"]} if "dense" in info else {}
    dense["history"] = [*info.get("history", []), count(plan.source)._asdict()]
    record = getattr(config, "pruning_config", None) or info or None
    before = list(range(len(plan.source.layers))) if record is None else info.get("kept_layers")
    altered = plan.info.get(ALTERED_WEIGHTS)
    if before is not None and altered is None and removes_only_layers(plan):
        kept = [before[entry.index] for entry in plan.layers]
        return {**dense, "kept_layers": kept, "plan": digest(["layers", kept])}
    previous = None if record is None else info.get("plan", record.get("fingerprint"))
    weights = {name: digest_tensor(tensor) for name, tensor in sorted(plan.weights.items())}
    decision = {k: v for k, v in plan._record().items() if k in ("layers", "embedding")}
    return {**dense, "plan": digest([previous, decision, weights, altered])}


def note(config: PreTrainedConfig, **facts: Any) -> None:
    """Put facts into the record of a pruned model's config, which is saved with it; InvalidConfigError without one."""
    info = {**lineage_of(config), **facts}
    record: Any = getattr(config, "pruning_config", None)
    if isinstance(record, dict):
        config.pruning_config = {**record, "info": info}
    elif getattr(config, "pruning_info", None) is not None:
        config.pruning_info = info
    else:
        raise InvalidConfigError("nothing was pruned in this model, and its config has no record of it")


def removes_only_layers(plan: PruningPlan) -> bool:
    """Whole layers or nothing, and no new weights."""
    whole = all(entry == LayerPlan.dense(entry.index, plan.source.layers[entry.index]) for entry in plan.layers)
    return whole and plan.embedding is None and not plan.weights


def plain_name(place: str) -> str:
    """A Hub id as it is; of a folder its own name: where it is on this machine, is nobody else's business."""
    return Path(place).resolve().name if Path(place).exists() else place


def named_source(place: str) -> dict[str, str]:
    """``base_model``, a Hub id, or ``base_folder``, the name of a folder, which is never taken for an id."""
    if not place:
        return {}
    return {"base_folder": plain_name(place)} if Path(place).exists() else {"base_model": place}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_tensor(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

"""The baseline of width pruning: DepGraph (Torch-Pruning) on an adapted model, as a plan of this library.

Torch-Pruning decides (group Taylor importance, one step, the same ratio everywhere, heads kept and made narrower); the
plan is cut by the same surgery as every other one, adapters included. The package is optional: ``pip install
torch-pruning``, or the extra ``baselines``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_vitprune import PruningPlan
from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.modeling.peft_twin import is_peft
from hf_vitprune.modeling.structure import layer_paths
from hf_vitprune.plan.layer_plan import LayerPlan
from hf_vitprune.plan.select import check_ratio
from hf_vitprune.spec.architecture import Architecture, unwrap
from hf_vitprune.utils.batches import ImageBatches
from hf_vitprune.utils.extras import need

BATCHES, BATCH_SIZE = 10, 32
ROUND_TO = 2


def torch_pruning() -> Any:
    """The package."""
    need("DepGraph baselines", "torch_pruning")
    import torch_pruning

    return torch_pruning


def depgraph_plan(
    model: Any,
    examples: Any,
    ratio: float,
    *,
    round_to: int = ROUND_TO,
    embedding: bool = False,
    importance: str = "taylor",
) -> PruningPlan:
    """What Torch-Pruning keeps of the heads' channels and of the MLP neurons; refused where it finds nothing to prune.

    By default the embedding keeps its width: adapters and head share it. Gradients come from the adapted model; what
    is scored and traced is the backbone, so that adapters are ignored, as in the comparison of the SLS paper.

    Args:
        examples: 10 batches of 32 of them, evenly spaced, give the gradients.
        ratio: share of the channels that goes, in (0, 1).
        embedding: prune residual channels as well (a plain model of one width).
        importance: of its groups, ``taylor`` or ``l2`` (the norm of their weights).
    """
    tp = torch_pruning()
    check_ratio(ratio)
    plan = PruningPlan.dense(model)
    paths = layer_paths(unwrap(model), plan.source)
    kinds = {"taylor": tp.importance.GroupTaylorImportance, "l2": tp.importance.GroupMagnitudeImportance}
    settings = {"importance": kinds[importance](), "pruning_ratio": ratio, "round_to": round_to}
    removed = _removed(model, plan.source, paths, examples, embedding, **settings)
    layers = []
    for entry, path, shape in zip(plan.layers, paths, plan.source.layers, strict=True):
        if path.o not in removed or path.fc2 not in removed:
            raise UnsupportedModelError(f"Torch-Pruning finds nothing to prune at {path.layer} of this model")
        layers.append(_cut(entry, shape, removed[path.o], removed[path.fc2]))
    width = None
    if embedding:
        lost = removed[paths[0].q]
        width = tuple(channel for channel in range(plan.source.hidden_size) if channel not in lost)
    info = {"method": "DepGraph", "ratio": ratio, "round_to": round_to, "importance": importance}
    info["torch_pruning"] = tp.__version__
    return replace(plan, layers=tuple(layers), embedding=width, info=info).validated()


def _subject(model: Any) -> Any:
    """A copy for Torch-Pruning to trace: attention as plain matrix products, every weight with a gradient."""
    subject = copy.deepcopy(model)
    unwrap(subject).set_attn_implementation("eager")
    return subject.eval().requires_grad_(True)


def _add_gradients(subject: Any, batches: ImageBatches, device: torch.device) -> torch.Tensor:
    """Sum the gradients of all batches; gives one image back."""
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = subject(pixel_values=inputs["pixel_values"]).logits
        nn.functional.cross_entropy(logits, inputs["labels"]).backward()
    return inputs["pixel_values"][:1]


def _removed(
    model: Any, source: Architecture, paths: Sequence[Any], examples: Any, embedding: bool, **settings: Any
) -> dict[str, set[int]]:
    """Name of a Linear -> inputs that go. Torch-Pruning's groups are only looked at, not pruned."""
    tp = torch_pruning()
    subject = _subject(model)
    batches = ImageBatches(examples, BATCH_SIZE, limit=BATCHES * BATCH_SIZE)
    pixels = _add_gradients(subject, batches, next(subject.parameters()).device)
    named = {name.replace(".base_layer", ""): module for name, module in unwrap(subject).named_modules()}
    names = {module: name for name, module in named.items()}
    heads = {
        named[name]: shape.heads
        for path, shape in zip(paths, source.layers, strict=True)
        for name in (path.q, path.k, path.v)
    }
    prunable = {named[name] for path in paths for name in (path.q, path.k, path.v, *path.fc1)}
    ignored = [m for m in subject.modules() if not list(m.children()) and m not in prunable]
    removed: dict[str, set[int]] = {}
    with warnings.catch_warnings(), subject.disable_adapter() if is_peft(subject) else nullcontext():
        warnings.simplefilter("ignore")  # on tokens and positions
        pruner = tp.pruner.BasePruner(
            subject,
            {"pixel_values": pixels},
            num_heads=heads,
            prune_num_heads=False,
            prune_head_dims=True,
            ignored_layers=[unwrap(subject).classifier] if embedding else ignored,
            output_transform=lambda outputs: outputs.logits.sum(),
            **settings,
        )
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                module = dependency.target.module
                if isinstance(module, nn.Linear) and pruner.DG.is_in_channel_pruning_fn(dependency.handler):
                    removed.setdefault(names[module], set()).update(indices)
    return removed


def _cut(entry: LayerPlan, shape: Any, channels: set[int], neurons: set[int]) -> LayerPlan:
    """The layer without these inputs of its output projection (all heads lose the same) and of its second Linear."""
    lost = {channel % shape.v_dim for channel in channels}
    if channels != {head * shape.v_dim + channel for head in range(shape.heads) for channel in lost}:
        raise UnsupportedModelError(f"Torch-Pruning cut the heads of layer {entry.index} differently")
    kept = [channel for channel in range(shape.v_dim) if channel not in lost]
    entry = entry.keep_channels("qk", kept).keep_channels("v", kept)
    return replace(entry, mlp=tuple(n for n in range(shape.mlp) if n not in neurons))

"""What can be pruned in which family, by which method: read from the registry, and tried on tiny models.

python -m benchmarks.families            # prints docs/families.md, in two minutes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_vitprune import (
    NViTConfig,
    OneShotScores,
    SLSConfig,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    get_pruning_model,
    mask,
)
from hf_vitprune.errors import VitPruneError
from hf_vitprune.families import UNITS, Family, all_families
from hf_vitprune.family_check import TOLERANCE, difference, tensors_of, tiny_model
from hf_vitprune.modeling.registry import stock_classes
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.configs import task_of

HEAD = """# Families

Made by `python -m benchmarks.families`. Every unit marked x passes the common tester: cut as its mask says. Plans from
random and magnitude scores work on all of them. A method marked x was run on a tiny model: a few steps of training (or
of scoring), the decision, and an export that computes what the gated model did. Elsewhere the method refuses
the family when it is wrapped, and says why. SPViT needs convolutions, which mix patches that lie on a grid. SLS looks
at images, which SigLIP 2 (patches), VideoMAE (frames), MAE (its own masks) and text towers do not take; one-shot takes
all but text.
VTP learns on Swin v2 with `points=["mlp_hidden"]`, as its v channels all stay.

Some units depend on the config: with `use_shared_relative_position_bias`, BEiT's and data2vec's heads stay; with
`use_qk_norm`, InternVL's heads and q/k; without windows (`num_windows=1`), RF-DETR's layers can go.

A stock result loads without this library: the last column has what gave one on a tiny model, when the last layer was
removed (of a backbone the first), or half of the units, alike in all layers. DINOv2's MLPs need a whole ratio; Swin's
layers go where plain and shifted windows still take turns.
"""

IMAGES = 16
#: of the images: brighter ones are of a higher class, so that there is something to tell apart
CLASSES = torch.arange(IMAGES) % 3
STEPS = 4
#: sizes of NViT's groups for models of 32 channels
GROUPS = {"embedding": 4, "heads": 1, "qk": 2, "v": 2, "mlp": 4}
#: column -> settings with which a tiny model loses something
METHODS: dict[str, Callable[[], Any]] = {
    "VTP": lambda: VTPConfig(pruning_ratio=0.4, round_to=2),
    "NViT": lambda: NViTConfig(target=0.8, group_sizes=GROUPS, criterion="magnitude"),
    "SPViT": lambda: SPViTConfig(target=0.8, round_to=2, gate_learning_rate=1.0),
    "SLS": lambda: SLSConfig(alpha=0.1, iterations=250, perplexity=3.0),
    "Truncation": lambda: TruncationConfig(layers=1),
}
ONE_SHOT = "one-shot"
#: what half of is removed, the same in all layers -> its units
CUTS = {
    "MLP": ("mlp",),
    "heads": ("heads",),
    "q/k as v": ("qk", "v"),
    "embedding": ("embedding",),
    "q/k as v with the embedding": ("qk", "v", "embedding"),
}


def stock_shapes(family: Family) -> str:
    """What a stock class was found to hold: each cut is made, and the class of the result looked at."""
    model = tiny_model(family)
    dense = PruningPlan.dense(model)
    layers = range(len(dense.layers))
    plans = {}
    if "layers" in dense.source.units:  # a backbone gives the output of its last one
        plans["layers"] = dense.keep_layers(layers[1:] if task_of(model) == "Backbone" else layers[:-1])
    for name, units in CUTS.items():
        if set(units) <= dense.source.units:
            plans[name] = PruningPlan.random(model, 0.5, units, round_to=1)
    return ", ".join(name for name, plan in plans.items() if type(prune(model, plan)) is type(model))


def works(family: Family, method: str) -> bool:
    """Whether a method prunes a tiny model of the family; False where it refuses it before any work."""
    model = tiny_model(family)
    if task_of(model) == "Backbone" and method in ("SLS", "Truncation"):
        model.config.set_output_features_output_indices(out_features=["stage1"], out_indices=None)
    batch = _several(family, model)
    if method == ONE_SHOT:
        return _scored(model, batch)
    try:
        wrapped = get_pruning_model(model, METHODS[method]())
    except VitPruneError:
        return False
    optimizer = torch.optim.SGD(wrapped.train().parameter_groups(), lr=1e-3)
    for step in range(STEPS):
        outputs = wrapped(**batch)
        torch.stack([t.square().mean() for _, t in tensors_of(outputs) if t.requires_grad]).sum().backward()
        wrapped.before_step(step, STEPS)
        optimizer.step()
        wrapped.after_step(step, STEPS)
        optimizer.zero_grad()
    images = zip(batch.get("pixel_values", ()), CLASSES.tolist(), strict=False)
    labelled = [{"pixel_values": image, "labels": int(label)} for image, label in images]
    wrapped.decide(labelled if method == "SLS" else None)
    small = wrapped.export(compensate="none")
    _check_same(wrapped.eval(), small.eval(), batch, wrapped.plan())
    return True


def _scored(model: PreTrainedModel, batch: dict[str, Any]) -> bool:
    try:
        scores = OneShotScores.measure(model, {name: value for name, value in batch.items() if value is not None})
    except VitPruneError:
        return False
    plan = scores.plan(0.8, round_to=1)
    _check_same(mask(model, plan), prune(model, plan), batch, plan)
    return True


def _several(family: Family, model: PreTrainedModel) -> dict[str, Any]:
    """What the model takes for some images."""
    torch.manual_seed(0)
    one = [family.inputs(model.config, task=task_of(model)) for _ in range(IMAGES)]
    batch = {name: None if value is None else torch.cat([row[name] for row in one]) for name, value in one[0].items()}
    if family.reads == "images":
        batch["pixel_values"] += CLASSES.view(-1, 1, 1, 1)
    return batch


def _check_same(full: Any, small: Any, batch: dict[str, Any], plan: PruningPlan) -> None:
    with torch.no_grad():
        theirs, ours = dict(tensors_of(full(**batch))), dict(tensors_of(small(**batch)))
    for name, tensor in ours.items():
        assert difference(tensor, theirs[name], plan) < TOLERANCE, name


def facts(family: Family) -> list[str]:
    """The cells of a family that need no trial."""
    classes = ", ".join(sorted(stock.__name__ for stock in stock_classes(family)))
    units = PruningPlan.dense(tiny_model(family)).source.units
    return [f"`{family.model_type}`", classes, *("x" if unit in units else "" for unit in UNITS)]


def table() -> str:
    """The page."""
    methods = [*METHODS, ONE_SHOT]
    rows = [["`model_type`", "classes", *UNITS, *methods, "stock result"]]
    rows.append(["---"] * len(rows[0]))
    for family in all_families():
        tried = ["x" if works(family, method) else "" for method in methods]
        rows.append([*facts(family), *tried, stock_shapes(family)])
    return HEAD + "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")

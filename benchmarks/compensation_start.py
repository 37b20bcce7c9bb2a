"""Compensation as a start for fine-tuning: steps until the small model is within half a point of the dense one.

    python -m benchmarks.compensation_start RESULTS                # every model, seed and method that is not there yet
    python -m benchmarks.compensation_start RESULTS --seeds 1 --subjects "ViT, digits"

A dense model is pruned by every method to about a share of its multiply-adds (truncation: of its layers), once as
plain slices and once compensated (128 training images, no labels), and both are fine-tuned from there with AdamW. Test
accuracy is looked at every ten steps; the number of steps is that of the first look at which it is within half a point
of the dense model's, at the best of three learning rates. One JSON file a model, share, method and seed.
"""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import set_seed

from hf_vitprune import (
    NViTConfig,
    PruningPlan,
    PruningTrainer,
    SPViTConfig,
    TruncationConfig,
    VTPConfig,
    count,
    get_pruning_model,
    prune,
)
from hf_vitprune.spec.configs import lineage_of
from hf_vitprune.utils.batches import ImageBatches

from .common import once, quiet_arguments, table_of
from .trained import Split, accuracy_of, batches, logits_of, read, trained

SUBJECTS = ("ViT, digits", "ViT, dSprites")
#: share of the multiply-adds that stays
KEPT = (0.5, 0.25)
METHODS = ("magnitude", "VTP", "NViT", "NViT at once", "SPViT", "truncation")
RATES = (5e-5, 2e-4, 1e-3)
#: steps of a learning method before it decides; most steps of a fine-tuning; steps between two looks
LEARN, MOST, EVERY = 180, 200, 10
GROUPS = {"embedding": 4, "heads": 1, "qk": 4, "v": 4, "mlp": 8}


def accuracy(model: Any, split: Split) -> float:
    return accuracy_of(logits_of(model.eval(), split.pixels), split.labels)


def starts(method: str, kept: float, dense: Any, train: Split, seed: int) -> dict[str, Any]:
    """Both small models."""
    examples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(train.pixels, train.labels, strict=True)]
    images = ImageBatches(examples, limit=128)
    if method == "magnitude":
        plan = PruningPlan.magnitude(dense, 1 - kept, ["qk", "v", "mlp"])
        return {"plain": prune(dense, plan), "compensated": prune(dense, plan, calibration=images)}
    settings: dict[str, Any] = {
        "truncation": lambda: TruncationConfig(layers=math.ceil(kept * len(dense.vit.layers))),
        "NViT at once": lambda: NViTConfig(target=kept, group_sizes=GROUPS, criterion="magnitude"),
        "VTP": lambda: VTPConfig(target=kept, sparsity_weight=1e-4, sparsity_warmup=0.2, gate_learning_rate=2e-2),
        # the whole training is the search
        "SPViT": lambda: SPViTConfig(target=kept, round_to=1, gate_learning_rate=12 / LEARN, patience=0),
        "NViT": lambda: NViTConfig(target=kept, group_sizes=GROUPS),
    }
    wrapped = get_pruning_model(copy.deepcopy(dense), settings[method]())
    if method in ("truncation", "NViT at once"):
        wrapped.decide()
        return {"plain": wrapped.export(), "compensated": wrapped.export(calibration=images)}
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        more = {"learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.1, "seed": seed}
        PruningTrainer(wrapped, quiet_arguments(folder, LEARN, 64, **more), train_dataset=examples).train()
    return {"plain": wrapped.export(compensate=False), "compensated": wrapped.export()}


def fine_tune(model: Any, train: Split, test: Split, goal: float, rate: float, seed: int) -> tuple[int | None, float]:
    """Steps until the goal (None: not in the steps there are), and the best accuracy seen."""
    model = copy.deepcopy(model)
    best = accuracy(model, test)
    if best >= goal:
        return 0, best
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    for step, batch in zip(range(1, MOST + 1), batches(train, 64, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 10)
        model.train()(pixel_values=batch.pixels, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            best = max(best, accuracy(model, test))
            if best >= goal:
                return step, best
    return None, best


def measure(subject: str, kept: float, method: str, seed: int) -> dict[str, Any]:
    dense = trained(subject, seed)
    data = read(subject)
    train, test = data["train"], data["test"].part(slice(1000))
    top = accuracy(dense, test)
    row: dict[str, Any] = {"subject": subject, "kept": kept, "seed": seed, "method": method, "dense": top}
    for start, small in starts(method, kept, dense, train, seed).items():
        note = lineage_of(small.config).get("compensation", {}).get("skipped")
        if note is not None:  # the same model again
            row[start] = {**row["plain"], "note": note}
            continue
        runs = {rate: fine_tune(small, train, test, top - 0.5, rate, seed) for rate in RATES}
        reached = [steps for steps, _ in runs.values() if steps is not None]
        row[start] = {
            "macs": count(small).macs / count(dense).macs,
            "accuracy": accuracy(small, test),
            "steps": min(reached, default=None),
            "best": max(best for _, best in runs.values()),
            "steps_by_rate": {f"{rate:g}": steps for rate, (steps, _) in runs.items()},
            "note": None,
        }
    return row


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Means over seeds."""
    cells = [["model", "method", "MACs", "dense", "just pruned", "compensated", "steps, plain", "steps, comp."]]
    groups = defaultdict(list)
    for row in rows:
        groups[row["subject"], row["kept"], row["method"]].append(row)
    for (subject, _, method), group in groups.items():
        accuracies, steps = {}, {}
        for start in ("plain", "compensated"):
            accuracies[start] = f"{mean(row[start]['accuracy'] for row in group):.1f}"
            found = [row[start]["steps"] for row in group]
            steps[start] = ", ".join(f"> {MOST}" if n is None else str(n) for n in found)
        if any(row["compensated"]["note"] for row in group):
            accuracies["compensated"] = "nothing to do"
        macs, dense = mean(row["plain"]["macs"] for row in group), mean(row["dense"] for row in group)
        cells.append([subject, method, f"{macs:.2f}", f"{dense:.1f}", *accuracies.values(), *steps.values()])
    return cells


def main(
    results: Annotated[Path, typer.Argument(help="Folder for one JSON file a run.")],
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ... of everything.")] = 3,
    subjects: Annotated[list[str], typer.Option(help="Models.")] = list(SUBJECTS),  # noqa: B006
    methods: Annotated[list[str], typer.Option(help="Methods.")] = list(METHODS),  # noqa: B006
    kept: Annotated[list[float], typer.Option(help="Shares of the multiply-adds that stay.")] = list(KEPT),  # noqa: B006
) -> None:
    rows = []
    for subject, share, method, seed in itertools.product(subjects, kept, methods, range(seeds)):
        name = f"{subject}-{share}-{method}-{seed}.json".replace(", ", "-").replace(" ", "_")
        rows.append(once(results / name, partial(measure, subject, share, method, seed)))
        print(name, flush=True)
    title = f"within 0.5 points of dense; {MOST} steps at the most; mean over seeds"
    Console(width=120).print(table_of(table(rows), title))


if __name__ == "__main__":
    typer.run(main)

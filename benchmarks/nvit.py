"""What NViT costs and gives: its training step, its published shape, a latency target.

    python -m benchmarks.nvit overhead              # a training step with scores against a plain one
    python -m benchmarks.nvit shape                 # wall-clock of the published .54 shape against its MACs
    python -m benchmarks.nvit latency --table FILE  # the measured ratio of a latency target of 0.5, ViT-S/16
    python -m benchmarks.nvit sizes                 # weights of DeiT-B when it is cut to the published MACs, at random

Every time is a ratio between sides that take turns in one run, medians of the rounds. Weights are random. ``--json
FILE`` keeps the samples.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTForImageClassification

from hf_vitprune import Architecture, LatencyTable, NViTConfig, build, count, get_pruning_model, mask
from hf_vitprune.latency.measure import measure_speed

from .common import interleaved, ratio, show, step_of, vit_config

#: a run at target .54 of the paper: residual width; heads, q/k and v channels, neurons of the 12 layers
WIDTH = 544
HEADS = (2, 4, 4, 10, 10, 10, 6, 10, 12, 6, 8, 10)
QK = (8, 24, 40, 48, 56, 56, 48, 48, 56, 32, 24, 40)
V = (8, 64, 48, 64, 64, 64, 64, 64, 64, 64, 56, 64)
MLP = (944, 800, 1440, 2240, 2432, 2384, 2448, 2496, 1840, 1488, 1184, 1056)
#: multiply-adds of the published models
PUBLISHED_MACS = {"NViT-B": 6.8e9, "NViT-H": 6.2e9, "NViT-S": 4.2e9, "NViT-T": 1.3e9}


def published(config: Any, padded: bool = False) -> Architecture:
    """The .54 shape; ``padded``: with q/k and v as wide as the wider of the two, as a kernel pads them."""
    rows = []
    for heads, qk, v, mlp in zip(HEADS, QK, V, MLP, strict=True):
        qk, v = (max(qk, v), max(qk, v)) if padded else (qk, v)
        rows.append({"heads": heads, "qk_dim": qk, "v_dim": v, "mlp": mlp})
    return Architecture.from_layers(config, rows, hidden_size=WIDTH)


def shape(rounds: int, batch: int) -> list[dict[str, Any]]:
    """Forward pass of ViT-B/16, of the .54 shape, and of the same with q/k and v equally wide."""
    config = vit_config(768, num_labels=1000)
    models = {
        "dense": ViTForImageClassification(config),
        "published .54": build(config, published(config)),
        "q/k and v equally wide": build(config, published(config, padded=True)),
    }
    timings = measure_speed(models, batch_size=batch, image_size=224, rounds=rounds)
    dense = count(models["dense"]).macs
    rows = []
    for name in ("published .54", "q/k and v equally wide"):
        macs = dense / count(models[name]).macs
        speedup = timings[name].speedup
        rows.append(
            {"what": f"{name}, batch {batch}", "MAC ratio": macs, "speed-up": speedup, "of it": speedup / macs}
        )
    unequal, equal = timings["published .54"].samples, timings["q/k and v equally wide"].samples
    rows.append({"what": "time of unequal q/k and v against equal ones", "ratio": ratio(unequal, equal)})
    return rows


def overhead(rounds: int, batch: int, width: int) -> list[dict[str, Any]]:
    """A whole training step (forward, backward, clipping, AdamW) with and without scores, before and after pruning."""
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config(width, num_labels=1000))
    sides: dict[str, Any] = {"plain": copy.deepcopy(model)}
    for name, pruned in (("with scores", False), ("with scores, half pruned", True)):
        wrapped = get_pruning_model(copy.deepcopy(model), NViTConfig(target=0.4))
        if pruned:  # on the way: masks of every kind are on
            half = NViTConfig(target=0.7, criterion="random", eta=0)
            decided = get_pruning_model(copy.deepcopy(model), half)
            decided.decide()
            wrapped.method.trajectory.order.copy_(decided.method.trajectory.order)
            wrapped.method.refresh()
        sides[name] = wrapped
    samples = interleaved({name: step_of(side.train(), batch) for name, side in sides.items()}, rounds)
    plain = samples.pop("plain")
    return [
        {"what": f"training step, width {width}, batch {batch}, {name}", "of a plain one": ratio(row, plain)}
        for name, row in samples.items()
    ]


def latency(table_file: Path, rounds: int) -> list[dict[str, Any]]:
    """Prune a ViT-S/16 to half of its predicted latency, and measure; masked against exported on the way."""
    table = LatencyTable.load(table_file)
    rows = []
    for criterion in ("magnitude", "random"):
        model = ViTForImageClassification(vit_config(384, num_labels=1000)).eval()
        goal = NViTConfig(target=0.5, target_metric="latency", latency_table=table, criterion=criterion)
        wrapped = get_pruning_model(model, goal).eval()
        small, plan = wrapped.export(), wrapped.plan()
        pixels = torch.randn(2, 3, 224, 224)
        with torch.no_grad():
            expected = mask(model, plan)(pixel_values=pixels).logits
            error = (small(pixel_values=pixels).logits - expected).abs().max() / expected.abs().max()
        batch = table.provenance["batch_size"]
        timing = measure_speed({"dense": model, "small": small}, batch_size=batch, image_size=224, rounds=rounds)
        rows.append(
            {
                "what": f"latency 0.5, {criterion}, width {plan.architecture.hidden_size}, batch {batch}",
                "predicted": wrapped.method.ratio,
                "measured": 1 / timing["small"].speedup,
                "MAC ratio": count(small).macs / count(model).macs,
                "masked against exported": float(error),
            }
        )
    return rows


def sizes() -> list[dict[str, Any]]:
    """DeiT-B with two heads, groups removed at random down to the multiply-adds that the paper prints."""
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=1000))
    dense = count(model).macs
    rows = []
    for name, macs in PUBLISHED_MACS.items():
        wrapped = get_pruning_model(model, NViTConfig(target=macs / dense, criterion="random", eta=0))
        wrapped.decide()
        cost = count(wrapped.plan().architecture)
        wrapped.unload()
        rows.append({"what": name, "weights, 10^6": cost.weight_params / 1e6, "MACs, 10^9": cost.macs / 1e9})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "shape", "latency", "sizes"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=384, help="of the model whose training step is timed")
    parser.add_argument("--table", type=Path, help="for latency: a LatencyTable of a ViT-S/16 on this device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "latency" and args.table is None:
        parser.error("latency needs --table: hf-vitprune latency makes one")
    rows = {
        "overhead": lambda: overhead(args.rounds, args.batch_size, args.width),
        "shape": lambda: shape(args.rounds, args.batch_size),
        "latency": lambda: latency(args.table, args.rounds),
        "sizes": sizes,
    }[args.what]()
    show({args.what: rows}, args.json, ".3g")


if __name__ == "__main__":
    main()

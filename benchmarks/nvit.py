"""What NViT costs and gives: its training step, its published shape, a latency target.

    python benchmarks/nvit.py overhead              # a training step with scores against a plain one
    python benchmarks/nvit.py shape                 # wall-clock of the published .54 shape against its MACs
    python benchmarks/nvit.py latency --table FILE  # the measured ratio of a latency target of 0.5, ViT-S/16
    python benchmarks/nvit.py sizes                 # weights of DeiT-B when it is cut to the published MACs, at random

Every time is a ratio between sides that take turns in one run, medians of the rounds. Weights are random. ``--json
FILE`` keeps the samples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

from hf_vitprune import Architecture, LatencyTable, NViTConfig, build, count, get_pruning_model, mask
from hf_vitprune.latency.measure import device_name, measure_speed

#: a run at target .54 of the paper: residual width; heads, q/k and v channels, neurons of the 12 layers
WIDTH = 544
HEADS = (2, 4, 4, 10, 10, 10, 6, 10, 12, 6, 8, 10)
QK = (8, 24, 40, 48, 56, 56, 48, 48, 56, 32, 24, 40)
V = (8, 64, 48, 64, 64, 64, 64, 64, 64, 64, 56, 64)
MLP = (944, 800, 1440, 2240, 2432, 2384, 2448, 2496, 1840, 1488, 1184, 1056)
#: multiply-adds of the published models
PUBLISHED_MACS = {"NViT-B": 6.8e9, "NViT-H": 6.2e9, "NViT-S": 4.2e9, "NViT-T": 1.3e9}


def config_of(width: int, heads: int) -> ViTConfig:
    return ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)


def published(config: Any, padded: bool = False) -> Architecture:
    """The .54 shape; ``padded``: with q/k and v as wide as the wider of the two, as a kernel pads them."""
    rows = []
    for heads, qk, v, mlp in zip(HEADS, QK, V, MLP, strict=True):
        qk, v = (max(qk, v), max(qk, v)) if padded else (qk, v)
        rows.append({"heads": heads, "qk_dim": qk, "v_dim": v, "mlp": mlp})
    return Architecture.from_layers(config, rows, hidden_size=WIDTH)


def shape(rounds: int, batch: int) -> list[dict[str, Any]]:
    """Forward pass of ViT-B/16, of the .54 shape, and of the same with q/k and v equally wide."""
    config = config_of(768, 12)
    models = {
        "dense": ViTForImageClassification(config),
        "published .54": build(config, published(config)),
        "q/k and v equally wide": build(config, published(config, padded=True)),
    }
    timings = measure_speed(models, batch_size=batch, image_size=224, rounds=rounds)
    dense = count(models["dense"]).macs
    rows = []
    for name in ("published .54", "q/k and v equally wide"):
        ratio = dense / count(models[name]).macs
        speedup = timings[name].speedup
        rows.append(
            {"what": f"{name}, batch {batch}", "MAC ratio": ratio, "speed-up": speedup, "of it": speedup / ratio}
        )
    unequal, equal = timings["published .54"].samples, timings["q/k and v equally wide"].samples
    against = statistics.median(a / b for a, b in zip(unequal, equal, strict=True))
    rows.append({"what": "time of unequal q/k and v against equal ones", "ratio": against})
    return rows


def overhead(rounds: int, batch: int, width: int, heads: int) -> list[dict[str, Any]]:
    """A whole training step (forward, backward, clipping, AdamW) with and without scores, before and after pruning."""
    torch.manual_seed(0)
    model = ViTForImageClassification(config_of(width, heads))
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
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch)
    optimizers = {name: torch.optim.AdamW(side.parameters(), lr=1e-5) for name, side in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            step(side.train(), optimizers[name], pixels, labels, scored=name != "plain")
            if turn:  # the first round warms up
                samples[name].append(time.perf_counter() - start)
    plain = samples.pop("plain")
    return [
        {
            "what": f"training step, width {width}, batch {batch}, {name}",
            "of a plain one": statistics.median(a / b for a, b in zip(row, plain, strict=True)),
        }
        for name, row in samples.items()
    ]


def step(model: Any, optimizer: Any, pixels: torch.Tensor, labels: torch.Tensor, scored: bool) -> None:
    model(pixel_values=pixels, labels=labels).loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if scored:
        model.method.before_step(model.model, 0.0, max(1.0, norm))
    optimizer.step()
    if scored:
        model.method.after_step(model.model, 1, 10**6)  # no prune step: that is one in a hundred
    optimizer.zero_grad()


def latency(table_file: Path, rounds: int) -> list[dict[str, Any]]:
    """Prune a ViT-S/16 to half of its predicted latency, and measure; masked against exported on the way."""
    table = LatencyTable.load(table_file)
    rows = []
    for criterion in ("magnitude", "random"):
        model = ViTForImageClassification(config_of(384, 6)).eval()
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
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--table", type=Path, help="for latency: a LatencyTable of a ViT-S/16 on this device")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.what == "latency" and args.table is None:
        parser.error("latency needs --table: hf-vitprune latency makes one")
    rows = {
        "overhead": lambda: overhead(args.rounds, args.batch_size, args.width, args.heads),
        "shape": lambda: shape(args.rounds, args.batch_size),
        "latency": lambda: latency(args.table, args.rounds),
        "sizes": sizes,
    }[args.what]()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=f"{device_name()}, {torch.get_num_threads()} threads")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in columns))
    Console(width=140).print(table)
    if args.json:
        args.json.write_text(json.dumps({"device": device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""Does a latency table predict what models take?

    python -m benchmarks.latency_table                                    # ViT-S/16, batch 8: minutes on two cores
    python -m benchmarks.latency_table --model vit-base --batch-size 1 --device cuda --dtype bfloat16
    python -m benchmarks.latency_table --table table.json                 # against a table that was made before

Random architectures, of the sizes that searches leave, are predicted, built and measured. They and the dense model
take turns with the blocks of the table in one run, since the speed of a machine drifts; with ``--table`` the drift
since then is a part of the error. To reach: median error at most 5 %, worst 15 %.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DeiTConfig, Dinov2Config, SwinConfig

from hf_vitprune import Architecture, LatencyTable, build, count
from hf_vitprune.latency.measure import measure_speed
from hf_vitprune.publish.run_report import plot_predictions
from hf_vitprune.spec.layer_shape import LayerShape
from hf_vitprune.utils.extras import need

from .common import show, vit_config

MODELS: dict[str, Callable[[], Any]] = {
    "vit-tiny": lambda: vit_config(192, num_labels=1000),
    "vit-small": lambda: vit_config(384, num_labels=1000),
    "vit-base": lambda: vit_config(768, num_labels=1000),
    "deit-small": lambda: DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000),
    "dinov2-small": lambda: Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=224, patch_size=14, num_labels=1000
    ),
    "swin-tiny": lambda: SwinConfig(num_labels=1000),
}


def random_architecture(config: Any, generator: random.Random) -> Architecture:
    """Sizes as a search leaves them: multiples of 2 heads, 8 channels, 16 neurons, 16 residual channels."""

    def size(dense: int, step: int) -> int:
        steps = max(dense // step, 1)
        return min(dense, step * generator.randint(max(1, steps // 8), steps))

    dense = Architecture.dense(config)
    width = size(dense.hidden_size, 16) if "embedding" in dense.units else dense.hidden_size
    layers = tuple(
        LayerShape(
            "attention",
            size(shape.heads, 2 if shape.heads % 2 == 0 else 1),
            size(shape.qk_dim, 8),
            size(shape.v_dim, 8),
            size(shape.mlp, 16),
            shifted=shape.shifted,
        )
        for shape in dense.layers
    )
    return dense.replace(layers=layers, hidden_size=width)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="vit-small")
    parser.add_argument("--architectures", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid", choices=("coarse", "fine"), default="coarse")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is timed")
    parser.add_argument("--no-monotone", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="use this table instead of a new one")
    parser.add_argument("--save", type=Path, help="save the new table here")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--plot", type=Path, help="draw predicted against measured times into this file")
    args = parser.parse_args()
    if args.plot:
        need("plots", "matplotlib")
    return args


def measured(args: argparse.Namespace, config: Any, models: dict[str, Any]) -> tuple[LatencyTable, dict[str, float]]:
    """A table, and seconds of every model: in one run with a new table, or by themselves with an old one."""
    kind = getattr(torch, args.dtype)
    if args.table:
        table = LatencyTable.load(args.table)
        table.check(Architecture.dense(config), args.image_size, args.batch_size)
        table.check_device()
        ready = {name: model.to(args.device, kind) for name, model in models.items()}
        timings = measure_speed(ready, batch_size=args.batch_size, rounds=args.rounds)
        return table, {name: timing.seconds for name, timing in timings.items()}
    table = LatencyTable.measure(
        config,
        args.batch_size,
        args.image_size,
        kind,
        args.device,
        args.grid,
        args.rounds,
        monotone=not args.no_monotone,
        beside=models,
    )
    if args.save:
        table.save(args.save)
    return table, table.provenance["beside_seconds"]


def main() -> None:
    args = arguments()
    config = MODELS[args.model]()
    if args.image_size:
        config.image_size = args.image_size
    generator = random.Random(args.seed)
    shapes = {"dense": Architecture.dense(config)}
    shapes |= {f"random {i}": random_architecture(config, generator) for i in range(args.architectures)}
    table, seconds = measured(args, config, {name: build(config, shape) for name, shape in shapes.items()})
    rows = [
        {
            "architecture": name,
            "width": shape.hidden_size,
            "GMACs": count(shape).macs / 1e9,
            "predicted ms": 1e3 * table.predict(shape),
            "measured ms": 1e3 * seconds[name],
            "error": table.predict(shape) / seconds[name] - 1,
        }
        for name, shape in shapes.items()
    ]
    errors = sorted(abs(row["error"]) for row in rows[1:])
    shown = [{**row, "error": f"{row['error']:+.1%}"} for row in rows]
    show({f"{args.model}, batch {args.batch_size}, {args.dtype},": shown}, shown=".2f")
    minutes = table.provenance["minutes"]
    print(f"error: median {median(errors):.1%}, worst {errors[-1]:.1%} (the table took {minutes} minutes)")
    if args.plot:
        predicted, times = ([row[name] / 1e3 for row in rows] for name in ("predicted ms", "measured ms"))
        plot_predictions(predicted, times, args.plot)
    if args.json:
        record = {"provenance": table.provenance, "rows": rows, "median": median(errors), "worst": errors[-1]}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

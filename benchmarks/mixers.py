"""What do convolution mixers gain, and as much as their multiply-adds say?

    python benchmarks/mixers.py                # both parts, about five minutes on two cores
    python benchmarks/mixers.py mixers --models vit-tiny
    python benchmarks/mixers.py published --names SPViT-DeiT-B --batch-sizes 8

``mixers``: one mixer against the attention it replaces, at DeiT-Ti/S/B shapes. ``published``: SPViT's published shapes
against their dense models; ``of it`` is the speed-up over the ratio of multiply-adds. Both sides take turns; medians
of ratios. Models have random weights. ``--json FILE`` keeps the numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from published_spvit import DENSE, PUBLISHED, published
from rich.console import Console
from rich.table import Table
from speed import interleaved
from transformers import ViTConfig

from hf_vitprune import Architecture, build, count
from hf_vitprune.contrib.fuse import fuse_bn
from hf_vitprune.cost.closed_form import block_macs
from hf_vitprune.latency.measure import device_name, measure_speed

SHAPES = {"vit-tiny": (192, 3), "vit-small": (384, 6), "vit-base": (768, 12)}


@torch.no_grad()
def mixers(names: list[str], batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """One mixer against attention, on the tokens of 224 x 224 images."""
    rows = []
    for name in names:
        width, heads = SHAPES[name]
        config = ViTConfig(
            hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_hidden_layers=3
        )
        architecture = Architecture.from_layers(config, [{"mixer": "conv3x3"}, {"mixer": "conv1x1"}, {}])
        layers = build(config, architecture).eval().vit.layers
        macs = dict(zip(("conv3x3", "conv1x1", "attention"), (m for m, _ in block_macs(architecture)), strict=True))
        for batch in batch_sizes:
            tokens = torch.randn(batch, 197, width)
            functions = {
                kind: functools.partial(layer.attention, tokens, patch_grid=(14, 14))
                for kind, layer in zip(macs, layers, strict=True)
            }
            samples = interleaved(functions, rounds)
            for kind in ("conv3x3", "conv1x1"):
                ratios = [a / b for a, b in zip(samples["attention"], samples[kind], strict=True)]
                macs_ratio = macs["attention"] / macs[kind]
                speedup = statistics.median(ratios)
                rows.append(_row(f"{name} {kind}, batch {batch}", macs_ratio, speedup))
    return rows


def whole(names: list[str], batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Published shapes against dense models, with BatchNorm and with it folded."""
    rows = []
    for name in names:
        small = build(DENSE[name], published(name)).eval()
        dense = build(DENSE[name], Architecture.dense(DENSE[name]))
        models = {"dense": dense, name: small, f"{name}, fused": fuse_bn(small)}
        macs_ratio = count(dense).macs / count(small).macs
        for batch in batch_sizes:
            timings = measure_speed(models, batch_size=batch, image_size=224, rounds=rounds)
            rows += [
                _row(f"{key}, batch {batch}", macs_ratio, timings[key].speedup) for key in models if key != "dense"
            ]
    return rows


def _row(what: str, macs_ratio: float, speedup: float) -> dict[str, Any]:
    return {"what": what, "MAC ratio": macs_ratio, "speed-up": speedup, "of it": speedup / macs_ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("mixers", "published", "all"), default="all")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--names", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    if args.part != "published":
        results["mixers"] = mixers(args.models, args.batch_sizes, args.rounds)
    if args.part != "mixers":
        results["published"] = whole(args.names, args.batch_sizes, args.rounds)
    for part, rows in results.items():
        table = Table(title=f"{part} on {device_name()}")
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()))
        Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"device": device_name(), "torch": torch.__version__, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()

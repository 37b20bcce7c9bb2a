"""What do convolution mixers gain, and as much as their multiply-adds say?

    python -m benchmarks.mixers                # both parts, about five minutes on two cores
    python -m benchmarks.mixers mixers --models vit-tiny
    python -m benchmarks.mixers published --names SPViT-DeiT-B --batch-sizes 8

``mixers``: one mixer against the attention it replaces, at DeiT-Ti/S/B shapes. ``published``: SPViT's published shapes
against their dense models; ``of it`` is the speed-up over the ratio of multiply-adds. Both sides take turns; medians
of ratios. Models have random weights. ``--json FILE`` keeps the numbers.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from hf_vitprune import Architecture, build, count
from hf_vitprune.contrib.fuse import fuse_bn
from hf_vitprune.cost.closed_form import block_macs
from hf_vitprune.latency.measure import measure_speed

from .common import interleaved, ratio, show, vit_config
from .published_spvit import DENSE, PUBLISHED, published

WIDTHS = {"vit-tiny": 192, "vit-small": 384, "vit-base": 768}


@torch.no_grad()
def mixers(names: list[str], batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """One mixer against attention, on the tokens of 224 x 224 images."""
    rows = []
    for name in names:
        config = vit_config(WIDTHS[name], 3)
        architecture = Architecture.from_layers(config, [{"mixer": "conv3x3"}, {"mixer": "conv1x1"}, {}])
        layers = build(config, architecture).eval().vit.layers
        macs = dict(zip(("conv3x3", "conv1x1", "attention"), (m for m, _ in block_macs(architecture)), strict=True))
        for batch in batch_sizes:
            tokens = torch.randn(batch, 197, WIDTHS[name])
            functions = {
                kind: functools.partial(layer.attention, tokens, patch_grid=(14, 14))
                for kind, layer in zip(macs, layers, strict=True)
            }
            samples = interleaved(functions, rounds)
            for kind in ("conv3x3", "conv1x1"):
                speedup = ratio(samples["attention"], samples[kind])
                rows.append(_row(f"{name} {kind}, batch {batch}", macs["attention"] / macs[kind], speedup))
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
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
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
    show(results, args.json)


if __name__ == "__main__":
    main()

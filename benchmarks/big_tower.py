"""A tower of a billion parameters pruned and compensated on one machine, a layer in memory at a time.

    python -m benchmarks.big_tower                       # DINOv2-giant, random bf16 weights, 64 images of 98 x 98
    python -m benchmarks.big_tower --image-size 224 --folder /tmp/giant

The model is written first, by a process of its own. A second one reads it from its folder, scores it, chooses sizes
for half of the MACs, compensates and saves, and reports seconds and the peak of its resident set (VmHWM) in each part.
Pages of the weights' files that are mapped while a layer is read count in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model

from hf_vitprune import Compensation, OneShotScores, PruningPlan, prune
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.modeling.streamed import load_streamed

from .common import in_process, resident, spent

#: published shape of DINOv2-giant
GIANT = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "mlp_ratio": 4,
    "use_swiglu_ffn": True,
    "image_size": 518,
    "patch_size": 14,
}
#: the same at a size for tests
TINY = {**GIANT, "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 28}


def write(folder: str, shape: dict[str, Any]) -> None:
    """Save a model of random bf16 weights, in files of a gigabyte."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(**shape))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # norms and LayerScale
    model.save_pretrained(folder, max_shard_size="1GB")


def prune_streamed(folder: str, images: int, size: int, threads: int, target: float, choice: str) -> dict[str, Any]:
    """Read, score, choose, compensate, save: seconds and bytes of each."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    pixels = torch.randn(images, 3, size, size)
    row: dict[str, Any] = {"imported": resident(), "seconds": {}, "processor": {}, "peak": {}}

    def part(name: str, work: Any) -> Any:
        found = spent(work)
        row["seconds"][name], row["processor"][name], row["peak"][name] = found[1:]
        print(f"{name}: {found.seconds:.0f} s, {found.peak / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        return found.result

    with tempfile.TemporaryDirectory() as copies:
        model = part("read", lambda: load_streamed(Dinov2Model, folder, copies=copies))
        row["weights"] = sum(p.numel() * p.element_size() for p in model.parameters())
        if choice == "magnitude":
            plan = part("choose", lambda: PruningPlan.magnitude(model, 1 - target, units=("qk", "v", "mlp")))
        else:
            settings = OneShotSettings(images=None, statistics=False)
            scores = part("score", lambda: OneShotScores.measure(model, pixels, settings))
            plan = part("choose", lambda: scores.plan(target, image_size=size))
        fits = Compensation(images=None)
        small = part("compensate", lambda: prune(model, plan, calibration=pixels, compensate=fits))
        row["left"] = sum(p.numel() * p.element_size() for p in small.parameters())
        part("save", lambda: small.save_pretrained(f"{copies}/small"))
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.5, help="share that stays: of the MACs, or of units")
    parser.add_argument("--choice", choices=("one-shot", "magnitude"), default="one-shot", help="of what stays")
    parser.add_argument("--folder", type=Path, help="where the model is kept for another run; nowhere by default")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch) / "model"
        if not folder.is_dir():
            in_process(write, str(folder), TINY if given.tiny else GIANT)
        settings = (given.images, given.image_size, given.threads, given.target, given.choice)
        row = in_process(prune_streamed, str(folder), *settings, threads=given.threads)
    gib, peak = 2**30, max(row["peak"].values())
    print(f"weights {row['weights'] / gib:.2f} GiB, left {row['left'] / gib:.2f}, imports {row['imported'] / gib:.2f}")
    for name, seconds in row["seconds"].items():
        times = f"{seconds:8.1f} s, {row['processor'][name]:7.1f} of the processor"
        print(f"{name:>10}: {times}, peak {row['peak'][name] / gib:.2f} GiB")
    print(f"peak {peak / gib:.2f} GiB = 1.3 x the weights {(peak - 1.3 * row['weights']) / gib:+.2f} GiB")
    return row


if __name__ == "__main__":
    main()

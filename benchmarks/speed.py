"""Is the pruned model faster, as much as its multiply-adds say?

    python -m benchmarks.speed                      # everything, about a quarter of an hour on two cores
    python -m benchmarks.speed inference --models vit-small --batch-sizes 1 8
    python -m benchmarks.speed truncation|training|pruning|loading|importing

Every number is a ratio between two sides that take turns in one run; medians of several rounds, MACs beside. Models
have random weights and published shapes. ``--json FILE`` keeps every sample.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_vitprune import Architecture, PruningPlan, VTPConfig, build, count, get_pruning_model, prune, truncate
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.latency.measure import measure_speed
from hf_vitprune.modeling.native import to_native

from .common import in_process, interleaved, ratio, resident, show, spent, step_of, vit_config

WIDTHS = {"vit-small": 384, "vit-base": 768}


def dense_config(name: str) -> ViTConfig:
    return vit_config(WIDTHS[name], num_labels=1000)


def half_the_macs(config: ViTConfig) -> Architecture:
    """Half the MACs by an even number of heads and a multiple of 64 neurons; the most balanced such shape."""
    dense = Architecture.dense(config)
    meter = ClosedFormMeter("macs", dense)
    head_dim = dense.layers[0].qk_dim
    best, imbalance = None, 1.0
    for heads in range(2, dense.layers[0].heads, 2):
        for mlp in range(64, config.intermediate_size, 64):
            shape = {"heads": heads, "qk_dim": head_dim, "v_dim": head_dim, "mlp": mlp}
            architecture = Architecture.from_layers(config, [shape] * len(dense.layers))
            skew = abs(heads / dense.layers[0].heads - mlp / config.intermediate_size)
            if abs(meter.ratio(architecture) - 0.5) < 0.02 and skew < imbalance:
                best, imbalance = architecture, skew
    assert best is not None
    return best


def inference(names: list[str], batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Forward pass, dense against half the MACs."""
    rows = []
    for name in names:
        config = dense_config(name)
        architecture = half_the_macs(config)
        models = {"dense": ViTForImageClassification(config), "pruned": build(config, architecture)}
        macs = count(models["dense"]).macs / count(models["pruned"]).macs
        for batch in batch_sizes:
            timing = measure_speed(models, batch_size=batch, image_size=224, rounds=rounds)["pruned"]
            rows.append(
                {
                    "what": f"{name}, batch {batch}",
                    "MAC ratio": macs,
                    "speed-up": timing.speedup,
                    "of it": timing.speedup / macs,
                }
            )
    return rows


def truncation(names: list[str], batch_sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Forward pass, all 12 layers against the first k: the speed-up as a share of 12 / k."""
    rows = []
    for name in names:
        model = ViTForImageClassification(dense_config(name))
        layers = model.config.num_hidden_layers
        models = {"dense": model, **{str(k): truncate(model, k) for k in (9, 6, 3)}}
        for batch in batch_sizes:
            timings = measure_speed(models, batch_size=batch, image_size=224, rounds=rounds)
            for k in list(models)[1:]:
                rows.append(
                    {
                        "what": f"{name}, {k} of {layers} layers, batch {batch}",
                        "N / k": layers / int(k),
                        "MAC ratio": count(model).macs / count(models[k]).macs,
                        "speed-up": timings[k].speedup,
                        "of N / k": timings[k].speedup / (layers / int(k)),
                    }
                )
    return rows


def training(names: list[str], batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """A VTP step against a plain one: time, interleaved; peak activation memory, by what autograd saves."""
    rows = []
    for name in names:
        models = {side: made(name, side) for side in ("plain", "VTP")}
        samples = interleaved({side: step_of(model, batch_size) for side, model in models.items()}, rounds)
        saved = {side: _saved_bytes(model, batch_size) for side, model in models.items()}
        peaks = {side: in_process(peak_of_steps, name, side, batch_size) for side in models}
        rows.append(
            {
                "what": f"{name}, batch {batch_size}",
                "step time ratio": ratio(samples["VTP"], samples["plain"]),
                "saved activations ratio": saved["VTP"] / saved["plain"],
                "peak memory ratio": peaks["VTP"] / peaks["plain"],
            }
        )
    return rows


def made(name: str, side: str) -> Any:
    """A model in training, by VTP or not."""
    model = ViTForImageClassification(dense_config(name)).train()
    return model if side == "plain" else get_pruning_model(model, VTPConfig(pruning_ratio=0.4)).train()


def _saved_bytes(model: Any, batch_size: int) -> int:
    """Bytes of distinct activations that the backward pass keeps alive."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(pixel_values=torch.randn(batch_size, 3, 224, 224), labels=torch.arange(batch_size)).loss
        total = sum(kept.values())
    del loss
    return total


def peak_of_steps(name: str, side: str, batch_size: int) -> int:
    """Bytes of this process at its peak, with the imports, in three training steps."""
    step = step_of(made(name, side), batch_size)
    return spent(lambda: [step() for _ in range(3)]).peak


def pruning(rounds: int) -> list[dict[str, Any]]:
    """``prune`` of a ViT-B/16: seconds."""
    model = ViTForImageClassification(dense_config("vit-base"))
    plan = PruningPlan.random(model, 0.4, round_to=8)
    samples = interleaved({"prune": lambda: prune(model, plan)}, rounds)["prune"]
    what = "prune(vit-base), every unit by 40 %"
    return [{"what": what, "seconds": statistics.median(samples), "worst": max(samples)}]


def loading(rounds: int) -> list[dict[str, Any]]:
    """Loading a pruned model against a stock model with the same tensors: time and peak memory of fresh processes."""
    config = dense_config("vit-base")
    pruned = build(config, half_the_macs(config))
    models = {"pruned": pruned, "stock": to_native(pruned)}  # the same tensors in both: uniform sizes allow it
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(f"{folder}/{name}")
        rows = [{name: in_process(loaded, f"{folder}/{name}") for name in models} for _ in range(rounds)]
    medians = {name: [statistics.median(c) for c in zip(*(row[name] for row in rows), strict=True)] for name in models}
    return [
        {
            "what": "load vit-base at half the MACs, against stock",
            "bytes ratio": count(models["pruned"]).params / count(models["stock"]).params,
            "time ratio": medians["pruned"][0] / medians["stock"][0],
            "memory ratio": medians["pruned"][1] / medians["stock"][1],
        }
    ]


def loaded(folder: str) -> tuple[float, int]:
    """(seconds, bytes over what the imports needed) of loading."""
    before = resident()
    found = spent(lambda: AutoModelForImageClassification.from_pretrained(folder))
    return found.seconds, found.peak - before


def importing(rounds: int) -> list[dict[str, Any]]:
    """torch, transformers and PEFT in fresh processes, with this library and without: processor seconds."""
    samples: dict[str, list[float]] = {"": [], "import hf_vitprune": []}
    for turn in range(rounds + 1):
        for more, seconds in samples.items():
            code = f"import time, torch, transformers, peft\n{more}\nprint(time.process_time())"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds += [float(done.stdout.split()[-1])] if turn else []
    without, with_it = samples.values()
    what = "import, against torch, transformers, peft"
    return [{"what": what, "seconds": statistics.median(with_it), "ratio": ratio(with_it, without)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("inference", "truncation", "training", "pruning", "loading", "importing")
    parser.add_argument("part", nargs="?", choices=(*parts, "all"), default="all")
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "inference": lambda: inference(args.models, args.batch_sizes, args.rounds),
        "truncation": lambda: truncation(args.models, args.batch_sizes, args.rounds),
        "training": lambda: training(args.models, args.batch_sizes[-1], args.rounds),
        "pruning": lambda: pruning(args.rounds),
        "loading": lambda: loading(args.rounds),
        "importing": lambda: importing(args.rounds),
    }
    show({part: runs[part]() for part in (parts if args.part == "all" else (args.part,))}, args.json)


if __name__ == "__main__":
    main()

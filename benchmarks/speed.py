"""Is the pruned model faster, as much as its multiply-adds say?

    python benchmarks/speed.py                      # everything, about a quarter of an hour on two cores
    python benchmarks/speed.py inference --models vit-small --batch-sizes 1 8
    python benchmarks/speed.py truncation|training|pruning|loading|importing

Every number is a ratio between two sides that take turns in one run; medians of several rounds, MACs beside. Models
have random weights and published shapes. ``--json FILE`` keeps every sample.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import ViTConfig, ViTForImageClassification

from hf_vitprune import Architecture, PruningPlan, VTPConfig, build, count, get_pruning_model, prune, truncate
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.latency.measure import device_name, measure_speed
from hf_vitprune.modeling.native import to_native

SHAPES = {"vit-small": (384, 6), "vit-base": (768, 12)}


def dense_config(name: str) -> ViTConfig:
    width, heads = SHAPES[name]
    return ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_labels=1000,
    )


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
        plain = ViTForImageClassification(dense_config(name)).train()
        gated = get_pruning_model(ViTForImageClassification(dense_config(name)), VTPConfig(pruning_ratio=0.4)).train()
        pixels, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(0, 1000, (batch_size,))
        steps = {"plain": _step(plain, None, pixels, labels), "VTP": _step(gated, gated.method, pixels, labels)}
        samples = interleaved(steps, rounds)
        saved = {key: _saved_bytes(model, pixels, labels) for key, model in (("plain", plain), ("VTP", gated))}
        rows.append(
            {
                "what": f"{name}, batch {batch_size}",
                "step time ratio": statistics.median(
                    b / a for a, b in zip(samples["plain"], samples["VTP"], strict=True)
                ),
                "saved activations ratio": saved["VTP"] / saved["plain"],
                "peak memory ratio": _peak(name, batch_size, True) / _peak(name, batch_size, False),
            }
        )
    return rows


def _step(model: Any, method: Any, pixels: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(pixel_values=pixels, labels=labels).loss.backward()
        if method is not None:
            parameters = method.gate_parameters()
            penalty = method.before_step(None, 1.0, 1.0)
            for p, grad in zip(parameters, torch.autograd.grad(penalty, parameters), strict=True):
                p.grad.add_(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _saved_bytes(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> int:
    """Bytes of distinct activations that the backward pass keeps alive."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(pixel_values=pixels, labels=labels).loss
        total = sum(kept.values())
    del loss
    return total


def _peak(name: str, batch_size: int, gated: bool) -> int:
    """Peak resident memory of a fresh process that takes three training steps, in bytes."""
    here = str(Path(__file__).parent)
    call = f"speed.peak_of_steps({name!r}, {batch_size}, {gated})"
    return int(_run_python(f"import sys; sys.path.insert(0, {here!r}); import speed; {call}")[-1])


def _run_python(code: str) -> list[str]:
    """Words that a fresh process prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def peak_of_steps(name: str, batch_size: int, gated: bool) -> None:
    model: Any = ViTForImageClassification(dense_config(name))
    method = None
    if gated:
        model = get_pruning_model(model, VTPConfig(pruning_ratio=0.4))
        method = model.method
    pixels, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(0, 1000, (batch_size,))
    step = _step(model.train(), method, pixels, labels)
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def pruning(rounds: int) -> list[dict[str, Any]]:
    """``prune`` of a ViT-B/16: seconds."""
    model = ViTForImageClassification(dense_config("vit-base"))
    plan = PruningPlan.random(model, 0.4, round_to=8)
    samples = interleaved({"prune": lambda: prune(model, plan)}, rounds)["prune"]
    return [
        {"what": "prune(vit-base), every unit by 40 %", "seconds": statistics.median(samples), "worst": max(samples)}
    ]


def loading(rounds: int) -> list[dict[str, Any]]:
    """Loading a pruned model against a stock model with the same tensors: time and peak memory of fresh processes."""
    config = dense_config("vit-base")
    pruned = build(config, half_the_macs(config))
    stock = to_native(pruned)  # the same tensors in a stock class: uniform sizes allow it
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(f"{folder}/pruned")
        stock.save_pretrained(f"{folder}/stock")
        ratio = count(pruned).params / count(stock).params
        samples: dict[str, list[list[float]]] = {"stock": [], "pruned": []}
        for _ in range(rounds):
            for name, rows in samples.items():
                rows.append(_load_in_process(f"{folder}/{name}"))
    medians = {name: [statistics.median(c) for c in zip(*rows, strict=True)] for name, rows in samples.items()}
    return [
        {
            "what": "load vit-base at half the MACs, against stock",
            "bytes ratio": ratio,
            "time ratio": medians["pruned"][0] / medians["stock"][0],
            "memory ratio": medians["pruned"][1] / medians["stock"][1],
        }
    ]


def _load_in_process(folder: str) -> list[float]:
    # Linux: writing 5 to clear_refs resets the peak, so that what the imports needed does not hide what loading needs
    code = f"""
import time
import hf_vitprune
from transformers import AutoModelForImageClassification
from transformers.models.vit import modeling_vit
def resident(field):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(field))
before = resident('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
start = time.perf_counter()
model = AutoModelForImageClassification.from_pretrained({folder!r})
print(time.perf_counter() - start, resident('VmHWM') - before)
"""
    return [float(word) for word in _run_python(code)[-2:]]


def importing(rounds: int) -> list[dict[str, Any]]:
    """torch, transformers and PEFT in fresh processes, with this library and without: processor seconds."""
    base = "import time, torch, transformers, peft"
    samples: dict[str, list[float]] = {"": [], "import hf_vitprune": []}
    for round_number in range(rounds + 1):
        for more, seconds in samples.items():
            words = _run_python(f"{base}\n{more}\nprint(time.process_time())")
            if round_number:
                seconds.append(float(words[-1]))
    without, with_it = samples.values()
    ratio = statistics.median(b / a for a, b in zip(without, with_it, strict=True))
    return [
        {"what": "import, against torch, transformers, peft", "seconds": statistics.median(with_it), "ratio": ratio}
    ]


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in every round, after one round of warm-up; all of them take turns."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number:
                samples[name].append(time.perf_counter() - start)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("inference", "truncation", "training", "pruning", "loading", "importing")
    parser.add_argument("part", nargs="?", choices=(*parts, "all"), default="all")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
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
    results = {}
    for part in parts if args.part == "all" else (args.part,):
        results[part] = runs[part]()
        table = Table(title=f"{part} on {device_name()}")
        for column in results[part][0]:
            table.add_column(column)
        for row in results[part]:
            table.add_row(*(v if isinstance(v, str) else f"{v:.3f}" for v in row.values()))
        Console().print(table)
    if args.json:
        args.json.write_text(
            json.dumps({"device": device_name(), "torch": torch.__version__, "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()

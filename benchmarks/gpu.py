"""What a GPU does to pruned models, in one run of under eight minutes: numbers as JSON, and a table.

    python -m benchmarks.gpu [--out DIR] [--small] [--budget SECONDS]

Speed-up against MACs (dense, half, quarter; batch 1, 8, 64), bf16 and fp16 training steps, attention whose q/k and v
differ in width, 2:4 kernels, torch.compile and CUDA graphs, a latency table against the clock, one-shot pruning with
compensation in seconds. Random weights: none of this depends on them. A part that fails is a row that says so, and the
command then ends with 1. ``--small`` is for a CPU: the same code on tiny models.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, ViTForImageClassification

from hf_vitprune import (
    Architecture,
    LatencyTable,
    NViTConfig,
    OneShotScores,
    PruningPlan,
    PruningTrainer,
    SPViTConfig,
    VTPConfig,
    count,
    criteria,
    get_pruning_model,
    prune,
)
from hf_vitprune.contrib.sparsity import sparsify, use_sparse_kernels
from hf_vitprune.latency.measure import device_name, measure_speed
from hf_vitprune.publish.report import markdown_table

from .common import StepClock, quiet_arguments, vit_config

Row = dict[str, Any]
#: width, layers, heads
SIZES = {"vit-s": (384, 12, 6), "vit-b": (768, 12, 12), "vit-l": (1024, 24, 16)}
TINY = {"tiny": (64, 2, 2)}
#: of the dense model's MACs
SHARES = (1.0, 0.5, 0.25)


class Bench:
    """The device, the sizes, and the models that the parts share.

    Args:
        small: tiny models and few rounds.
    """

    def __init__(self, small: bool) -> None:
        self.small = small
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sizes = TINY if small else SIZES
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rounds = 2 if small else 10

    def model(self, size: str) -> Any:
        sides = {"image_size": 32, "patch_size": 8, "num_labels": 10} if self.small else {"num_labels": 1000}
        config = vit_config(*self.sizes[size], **sides)
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval().to(self.device)

    def pruned(self, model: Any, share: float, **settings: Any) -> Any:
        if share == 1:
            return model
        scores = criteria.magnitude(model)
        return prune(model, PruningPlan.from_scores(model, scores, target=share, **settings)).eval()

    def images(self, model: Any, number: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        side = model.config.image_size
        generator = torch.Generator().manual_seed(1)
        return torch.randn(number, 3, side, side, generator=generator).to(self.device, dtype or torch.float32)

    @property
    def middle(self) -> str:
        return "tiny" if self.small else "vit-b"


def speed(bench: Bench) -> Iterator[Row]:
    """Speed-up against the share of the MACs."""
    for size in bench.sizes:
        dense = bench.model(size)
        models = {share: bench.pruned(dense, share) for share in SHARES}
        macs = {share: count(model).macs for share, model in models.items()}
        models = {share: model.to(bench.dtype) for share, model in models.items()}
        for batch in (1, 2) if bench.small else (1, 8, 64):
            named = {str(share): model for share, model in models.items()}
            times = measure_speed(named, batch, rounds=bench.rounds, progress=False)
            for share in SHARES:
                timing = times[str(share)]
                yield {"model": size, "batch": batch, "macs": macs[share] / macs[1.0],
                       "ms": timing.seconds * 1e3, "speedup": timing.speedup}  # fmt: skip


def training(bench: Bench) -> Iterator[Row]:
    """Steps of every learned method in half precision, against the model alone."""
    kinds = ("bf16", "fp16") if bench.device.type == "cuda" else ("bf16",)
    methods = {"plain": None, "vtp": VTPConfig(target=0.5), "nvit": NViTConfig(target=0.5),
               "spvit": SPViTConfig(target=0.7, gate_learning_rate=3)}  # fmt: skip
    batch, steps = (2, 2) if bench.small else (64, 15)
    for kind, (name, settings) in product(kinds, methods.items()):
        model = bench.model(bench.middle).train()
        pixels = bench.images(model, batch).cpu()
        rows = [{"pixel_values": x, "labels": i % 10} for i, x in enumerate(pixels)] * steps
        with tempfile.TemporaryDirectory() as folder:
            args = quiet_arguments(
                folder, steps, batch, logging_strategy="steps", logging_steps=1, use_cpu=bench.device.type == "cpu",
                dataloader_num_workers=0 if bench.small else 4, **{kind: True},
            )  # fmt: skip
            clock = StepClock(now)
            if settings is None:
                run = Trainer(model, args, train_dataset=rows, callbacks=[clock])
            else:
                run = PruningTrainer(get_pruning_model(model, settings), args, train_dataset=rows, callbacks=[clock])
            run.train()
        losses = [row["loss"] for row in run.state.log_history if "loss" in row]
        if not all(torch.tensor(losses).isfinite()):
            raise RuntimeError(f"{name} in {kind}: losses {losses}")
        yield {
            "method": name,
            "precision": kind,
            "step_ms": median(clock.seconds[min(3, steps - 1) :]) * 1e3,
            "loss": losses[-1],
        }


def now() -> float:
    """Seconds, once the device has done what it was told."""
    synchronize()
    return time.monotonic()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attention(bench: Bench) -> Iterator[Row]:
    """Heads whose queries and values differ in width: which kernels take them and agree, and what each takes."""
    model = bench.model(bench.middle)
    kernels = ["MATH"] if bench.small else ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"]
    pixels = bench.images(model, 2 if bench.small else 8)
    for width, units in {"qk != v": ("heads", "qk", "mlp"), "qk == v": ("heads", "mlp")}.items():
        half = bench.pruned(model, 0.5, units=units)
        with torch.no_grad():
            half.set_attn_implementation("eager")
            expected = half(pixels).logits
            for name in ["eager", *kernels]:
                half.set_attn_implementation("eager" if name == "eager" else "sdpa")
                backend = nullcontext() if name == "eager" else sdpa_kernel(getattr(SDPBackend, name))
                with backend:
                    small = copy.deepcopy(half).to(bench.dtype)
                    try:
                        found = small(pixels.to(bench.dtype)).logits.float()
                    except RuntimeError as error:  # a kernel that this GPU or width has not got
                        yield {"widths": width, "kernel": name, "refused": str(error).splitlines()[0]}
                        continue
                    timing = measure_speed({name: small}, len(pixels), rounds=bench.rounds, progress=False)
                difference = float((found - expected).abs().max() / expected.abs().max())
                yield {"widths": width, "kernel": name, "difference": difference, "ms": timing[name].seconds * 1e3}


def compiled(bench: Bench) -> Iterator[Row]:
    """torch.compile, and CUDA graphs where there are any."""
    model = bench.pruned(bench.model(bench.middle), 0.5).to(bench.dtype)
    pixels = bench.images(model, 2 if bench.small else 8, bench.dtype)
    modes = ["default", "reduce-overhead"] if bench.device.type == "cuda" else ["default"]
    with torch.no_grad():
        expected = model(pixels).logits.float()
        for mode in modes:
            backend = {"backend": "eager"} if bench.small else {"mode": mode}
            started = time.monotonic()
            fast = torch.compile(model, **backend)
            for _ in range(3):
                found = fast(pixels).logits.float()
            took = time.monotonic() - started
            error = float((found - expected).abs().max() / expected.abs().max())
            seconds = clock(partial(fast, pixels), bench)
            yield {"mode": mode, "compile_s": took, "error": error, "ms": 1e3 * seconds}


def sparse(bench: Bench) -> Iterator[Row]:
    """2:4 kernels."""
    if bench.device.type != "cuda":
        yield {"skipped": "2:4 kernels are for CUDA"}
        return
    model = bench.pruned(bench.model(bench.middle), 0.5).half()
    sparsify(model)
    pixels = bench.images(model, 64, torch.float16)
    with torch.no_grad():
        before, expected = clock(lambda: model(pixels), bench), model(pixels).logits.float()
        names = use_sparse_kernels(model)
        error = float((model(pixels).logits.float() - expected).abs().max() / expected.abs().max())
        yield {"linears": len(names), "error": error, "speedup": before / clock(lambda: model(pixels), bench)}


def one_shot(bench: Bench) -> Iterator[Row]:
    """Scores, plan and compensation from 128 images, in seconds."""
    for size in ("tiny",) if bench.small else ("vit-b", "vit-l"):
        model = bench.model(size)
        images = bench.images(model, 8 if bench.small else 128).cpu()
        marks = [time.monotonic()]
        scores = OneShotScores.measure(model, images)
        marks.append(time.monotonic())
        plan = scores.plan(0.6)
        marks.append(time.monotonic())
        prune(model, plan, calibration=images)
        marks.append(time.monotonic())
        seconds = [after - before for before, after in pairwise(marks)]
        parts = dict(zip(("scores_s", "plan_s", "compensation_s"), seconds, strict=True))
        memory = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None
        yield {"model": size, **parts, "peak_gib": memory}


def latency(bench: Bench) -> Iterator[Row]:
    """What a latency table predicts, against the clock."""
    size = "tiny" if bench.small else "vit-s"
    model, batch = bench.model(size), 2 if bench.small else 8
    grid: Any = {"heads": [1, 2], "qk": [16, 32], "v": [16, 32], "mlp": [64, 256], "embedding": [64]}
    table = LatencyTable.measure(model, batch, dtype=bench.dtype, rounds=bench.rounds, progress=False,
                                 **({"grid": grid} if bench.small else {}))  # fmt: skip
    for share in SHARES[: 1 if bench.small else None]:
        one = bench.pruned(model, share)
        macs, predicted = count(one).macs / count(model).macs, table.predict(Architecture.of(one))
        timing = measure_speed({"one": one}, batch, rounds=bench.rounds, dtype=bench.dtype, progress=False)["one"]
        yield {"macs": macs, "predicted_ms": 1e3 * predicted, "measured_ms": 1e3 * timing.seconds}


#: in the order in which they run while there is time
PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "speed": speed, "training": training, "attention": attention, "compiled": compiled, "sparse": sparse,
    "one_shot": one_shot, "latency": latency,
}  # fmt: skip


def clock(call: Callable[[], Any], bench: Bench) -> float:
    """Seconds of one call, the median of some."""
    times = []
    for _ in range(2 * bench.rounds):
        started = time.monotonic()
        call()
        synchronize()
        times.append(time.monotonic() - started)
    return float(torch.tensor(times).median())


def run(out: Path, small: bool, budget: float) -> int:
    """Run what there is time for, and write ``gpu.json`` and ``gpu.md``.

    Returns:
        Number of parts that failed.
    """
    bench, started, failed = Bench(small), time.monotonic(), 0
    about = {"device": device_name(bench.device), "torch": torch.__version__, "small": small}
    results: dict[str, list[Row]] = {}
    for name, part in PARTS.items():
        rows = results.setdefault(name, [])
        if time.monotonic() - started > budget:
            rows.append({"skipped": "no time left"})
            continue
        try:
            rows.extend(part(bench))
        except Exception as error:  # told in the result, and by the exit code
            failed += 1
            rows.append({"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)})
        write(out, {**about, "parts": results})  # a run that is cut off leaves what it has
        print(f"{name}: {time.monotonic() - started:.0f} s so far", file=sys.stderr)
    write(out, {**about, "parts": results})
    return failed


def write(out: Path, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(record, indent=1))
    (out / "gpu.md").write_text(tables(record))


def tables(record: dict[str, Any]) -> str:
    """A Markdown table for every part."""
    lines = [f"# {record['device']}, torch {record['torch']}{' (small)' if record['small'] else ''}", ""]
    for name, rows in record["parts"].items():
        names = list(dict.fromkeys(key for row in rows for key in row if key != "where"))
        cells = [[f"{v:.3g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in names] for row in rows]
        lines += [f"## {name}", "", markdown_table([names, *cells]), ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("output/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--budget", type=float, default=400, help="seconds after which no part begins")
    given = parser.parse_args(arguments)
    failed = run(given.out, given.small, given.budget)
    print((given.out / "gpu.md").read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

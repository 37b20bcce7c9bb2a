"""What does a search step of SPViT cost, in time and memory?

    python benchmarks/spvit.py                       # ViT-S/16, batch 8, against a plain step; about three minutes
    python benchmarks/spvit.py --model vit-base --batch-size 4 --rounds 5

A step is forward, backward, cost term, clipping and AdamW. Plain fine-tuning, the single-path search and the
multi-path baseline take turns in one run; the ratio is the median over the rounds. Peak memory is that of a fresh
process that takes a few steps, less what the imports needed. Weights are random. ``--json FILE`` keeps the samples.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from speed import SHAPES, dense_config, interleaved
from transformers import ViTForImageClassification

from hf_vitprune import SPViTConfig, get_pruning_model
from hf_vitprune.latency.measure import device_name

SIDES = {"plain": None, "single-path": True, "multi-path": False}


def made(model: str, side: str) -> Any:
    """A model in training, searched or not."""
    torch.manual_seed(0)
    plain: Any = ViTForImageClassification(dense_config(model)).train()
    single_path = SIDES[side]
    if single_path is None:
        return plain
    return get_pruning_model(plain, SPViTConfig(target=0.5, single_path=single_path)).train()


def step_of(model: Any, batch_size: int) -> Callable[[], None]:
    """One update of a model on random images."""
    pixels, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(0, 1000, (batch_size,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    method = getattr(model, "method", None)

    def step() -> None:
        model(pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if method is not None:
            parameters = method.gate_parameters()
            grads = torch.autograd.grad(method.before_step(None, 1.0, 1.0), parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        optimizer.step()
        if method is not None:
            method.after_step(model, 1, 1000)
        optimizer.zero_grad()

    return step


def peak(model: str, side: str, batch_size: int, steps: int) -> int:
    """Bytes at the peak of a fresh process, over what it held before the model was made."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import spvit
def resident(field):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(field))
before = resident('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
step = spvit.step_of(spvit.made({model!r}, {side!r}), {batch_size})
for _ in range({steps}):
    step()
print(1024 * (resident('VmHWM') - before))
"""
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "vit-small",
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 8,
    rounds: Annotated[int, typer.Option(help="Steps of every side.")] = 15,
    memory_steps: Annotated[int, typer.Option(help="Steps under which memory is measured; 0: not.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the samples.")] = None,
) -> None:
    """Time and memory of search steps."""
    models = {side: made(model, side) for side in SIDES}
    sizes = {side: sum(p.numel() for p in one.parameters() if p.requires_grad) for side, one in models.items()}
    samples = interleaved({side: step_of(one, batch_size) for side, one in models.items()}, rounds)
    peaks = {side: peak(model, side, batch_size, memory_steps) for side in SIDES} if memory_steps else {}
    table = Table(title=f"training steps of {model}, batch {batch_size}, on {device_name()}")
    for column in ("", "trained parameters", "step (s)", "against plain", "peak memory (MB)", "against plain"):
        table.add_column(column)
    for side in SIDES:
        ratio = statistics.median(b / a for a, b in zip(samples["plain"], samples[side], strict=True))
        row = [side, f"{sizes[side] / 1e6:.2f}M", f"{statistics.median(samples[side]):.3f}", f"{ratio:.3f}"]
        if peaks:
            row += [f"{peaks[side] / 1e6:.0f}", f"{peaks[side] / peaks['plain']:.3f}"]
        table.add_row(*row)
    Console().print(table)
    if json_file is not None:
        record = {
            "device": device_name(),
            "torch": torch.__version__,
            "samples": samples,
            "peaks": peaks,
            "parameters": sizes,
        }
        json_file.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    typer.run(main)

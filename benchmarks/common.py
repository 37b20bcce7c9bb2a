"""What benchmarks share: shapes, steps, sides that take turns, processes of their own, memory, results, tables."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainingArguments, ViTConfig

from hf_vitprune.latency.measure import device_name

ROOT = Path(__file__).parents[1]


def vit_config(width: int, layers: int = 12, heads: int | None = None, **fields: Any) -> ViTConfig:
    """Of a ViT with heads of 64 channels and MLPs of four widths."""
    heads = heads or width // 64
    return ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width, **fields
    )


# ---------------------------------------------------------------------- steps of a training
def quiet_arguments(folder: str, steps: int, batch_size: int, **more: Any) -> TrainingArguments:
    """Of a Trainer that takes steps and leaves nothing."""
    more = {"learning_rate": 1e-5, "use_cpu": True, "logging_strategy": "no", **more}
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=batch_size, report_to=[], save_strategy="no",
        disable_tqdm=True, **more,
    )  # fmt: skip


class StepClock(TrainerCallback):
    """Seconds of every step, data not counted; ``now`` waits for the device."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.begun, self.seconds = now, 0.0, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self.now() - self.begun)


def step_of(model: Any, batch_size: int, side: int = 224) -> Callable[[], None]:
    """One update of a model or PruningModel on random images: forward, backward, clipping, penalty, AdamW."""
    pixels, labels = torch.randn(batch_size, 3, side, side), torch.arange(batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(pixel_values=pixels, labels=labels).loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if hasattr(model, "before_step"):
            model.before_step(1, 10**6, max(1.0, norm))
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step(1, 10**6)
        optimizer.zero_grad()

    return step


# ---------------------------------------------------------------------- sides that take turns
def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every function in every round, after one round of warm-up; all of them take turns."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + warm_up):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= warm_up:
                samples[name].append(time.perf_counter() - start)
    return samples


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------------- processes and their memory
def in_process(function: Callable[..., Any], *args: Any, threads: int | None = None) -> Any:
    """What a function of a module gives in a process of its own; arguments and result pass as JSON."""
    module = function.__module__
    module = sys.modules["__main__"].__spec__.name if module == "__main__" else module  # type: ignore[union-attr]
    order = json.dumps([module, function.__name__, args])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.common", order]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


class Spent(NamedTuple):
    """What a call took: seconds by the clock and of the processor (all threads), peak of the resident set in bytes."""

    result: Any
    seconds: float
    processor: float
    peak: int


def resident() -> int:
    """Bytes of this process (Linux), once what was freed has been given back."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def spent(call: Callable[[], Any]) -> Spent:
    resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    clock, processor = time.perf_counter(), time.process_time()
    result = call()
    return Spent(result, time.perf_counter() - clock, time.process_time() - processor, _status("VmHWM"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# ---------------------------------------------------------------------- results
def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record in a file, which is made, and written as a whole, where it is not there."""
    if not path.is_file():
        write_record(make(), path)
    return json.loads(path.read_text(encoding="utf-8"))


def write_record(record: Mapping[str, Any], path: Path) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file beside ``path``, and move it there when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def table_of(cells: list[list[str]], title: str | None = None) -> Table:
    """Rows of text, headings first."""
    table = Table(*cells[0], title=title)
    for row in cells[1:]:
        table.add_row(*row)
    return table


def show(results: Mapping[str, list[dict[str, Any]]], json_file: Path | None = None, shown: str = ".3f") -> None:
    """A table a part; every number in a file, too, where one is given."""
    for part, rows in results.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [
            [format(v, shown) if isinstance(v := row.get(k, ""), float) else str(v) for k in columns] for row in rows
        ]
        title = f"{part} on {device_name()}, {torch.get_num_threads()} threads"
        Console(width=None if sys.stdout.isatty() else 140).print(table_of([columns, *cells], title))
    if json_file is not None:
        record = {"device": device_name(), "torch": torch.__version__, "results": results}
        json_file.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    module_name, function_name, arguments = json.loads(sys.argv[1])
    print(json.dumps(getattr(importlib.import_module(module_name), function_name)(*arguments)))

"""DeiT against ReViT, both trained from scratch: the same steps, data and seeds; nothing is pruned."""

from __future__ import annotations

import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_vitprune import Architecture, build, count, revit
from hf_vitprune.errors import InvalidConfigError

from ..common import once, vit_config
from .models import shaped
from .tasks import Task, load_task
from .training import accuracy, fit

LEARNING_RATE = 1e-3
#: residual widths of the published sizes, with heads of 64 channels
WIDTHS = {"deit-t": 192, "revit-t": 192, "deit-s": 384, "revit-s": 384}


@dataclass(frozen=True)
class Training:
    """One cell of the table; the published models have twelve layers, a step ``batch_size`` images."""

    shape: str
    task: str
    layers: int
    steps: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.shape not in WIDTHS:
            raise InvalidConfigError(f"shapes are {', '.join(WIDTHS)}; not {self.shape!r}")

    def architecture(self, task: Task) -> Architecture:
        """DeiT's of the width, or ReViT's."""
        width = WIDTHS[self.shape]
        config = vit_config(width, self.layers, **shaped(task, 4))
        return revit(config, width) if self.shape.startswith("revit") else Architecture.dense(config)

    def path(self, folder: Path) -> Path:
        return folder / "scratch" / f"{'-'.join(map(str, astuple(self)))}.json"

    def run(self, folder: Path) -> dict[str, Any]:
        """Train and test; what was done before is read."""
        return once(self.path(folder), self._trained)

    def _trained(self) -> dict[str, Any]:
        task = load_task(self.task)
        architecture = self.architecture(task)
        torch.manual_seed(self.seed)
        model = build(architecture.config, architecture)
        started = time.perf_counter()
        what = f"{self.shape} from scratch, {self.task}"
        fit(model, task, self.steps, LEARNING_RATE, self.seed, what=what, batch_size=self.batch_size)
        return {
            **asdict(self),
            **count(model)._asdict(),
            "accuracy": accuracy(model, task.test),
            "seconds": round(time.perf_counter() - started, 1),
            "torch": torch.__version__,
        }

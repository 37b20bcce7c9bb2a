"""The dense models of ``benchmarks.compare`` for other benchmarks: trained once, in the same folder, as plain tensors.

A ViT and a Swin on scikit-learn's digits (800 images to train on, 797 to test), and a ViT on dSprites (re-rendered; 16
positions across, 8000 and 2000 images).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .compare.cli import OUTPUT
from .compare.models import dense_model
from .compare.tasks import load_task


class Split(NamedTuple):
    """Images (n, 1, height, width), within -1..1, and their classes (n,)."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def part(self, indices: Any) -> Split:
        return Split(self.pixels[indices], self.labels[indices])


#: name -> family and data of ``benchmarks.compare``
SUBJECTS = {
    "ViT, digits": ("vit", "digits"),
    "Swin, digits": ("swin", "digits"),
    "ViT, dSprites": ("vit", "dsprites_loc"),
}


def read(name: str) -> dict[str, Split]:
    """``train`` and ``test`` of a subject's data."""
    task = load_task(SUBJECTS[name][1])
    return {name: Split(part.pixels, part.labels) for name, part in (("train", task.train), ("test", task.test))}


def trained(name: str, seed: int, folder: Path = OUTPUT) -> Any:
    """The model of a subject for a seed, in eval mode; it is trained where ``folder`` does not have it."""
    family, data = SUBJECTS[name]
    return dense_model(family, load_task(data), seed, folder / "dense")


def batches(split: Split, size: int, seed: int) -> Iterator[Split]:
    """Without end, another order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(split.labels), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield split.part(order[start : start + size])


def fit(model: Any, split: Split, steps: int, learning_rate: float, *, seed: int = 0, what: str = "") -> Any:
    """Train in place: AdamW, batches of 64, one cycle of the learning rate. Returns the model, in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _, batch in zip(tqdm(range(steps), what, leave=False, delay=3), batches(split, 64, seed), strict=False):
        model(pixel_values=batch.pixels, labels=batch.labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(n, classes)."""
    return torch.cat([model(pixel_values=part).logits for part in pixels.split(256)])


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())

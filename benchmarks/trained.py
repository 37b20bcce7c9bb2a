"""Small trained classifiers for benchmarks of accuracy: made once a seed, and kept in the assets cache.

    python -m benchmarks.trained [SEED ...]     # makes those that are not there yet

A ViT and a Swin on scikit-learn's digits (1078 images to train on, 719 to test), and a ViT on dSprites (re-rendered;
16 positions across, 8000 and 2000 of the images that VTAB's splits leave out, at half the size). Each takes one or two
minutes on one core.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import cached_assets_path
from tqdm.auto import tqdm
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from hf_vitprune.data import DIGITS, load_images

from .vtab.dsprites import factors_of, render, unused_by_vtab

#: goes into the names of the cached models: raise it when training changes
VERSION = 1


class Split(NamedTuple):
    """Images (n, 3, height, width), about within -1..1, and their classes (n,)."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def part(self, indices: Any) -> Split:
        return Split(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class Subject:
    """A model and the data it is trained on."""

    name: str
    data: str
    config: dict[str, Any]
    epochs: int
    learning_rate: float
    swin: bool = False

    def build(self) -> Any:
        """Untrained."""
        labels = 10 if self.data == DIGITS else 16
        if self.swin:
            return SwinForImageClassification(SwinConfig(num_labels=labels, **self.config))
        return ViTForImageClassification(ViTConfig(num_labels=labels, **self.config))  # type: ignore[call-arg]


_VIT = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
_SWIN = {"embed_dim": 32, "depths": [2, 4], "num_heads": [2, 4], "window_size": 4, "drop_path_rate": 0.0}
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("ViT, digits", DIGITS, {**_VIT, "image_size": 16, "patch_size": 4}, 60, 1e-3),
        Subject("Swin, digits", DIGITS, {**_SWIN, "image_size": 16, "patch_size": 2}, 50, 1e-3, swin=True),
        Subject("ViT, dSprites", "dsprites", {**_VIT, "image_size": 32, "patch_size": 8}, 20, 1e-3),
    )
}


@lru_cache(maxsize=2)
def read(data: str) -> dict[str, Split]:
    """``train`` and ``test`` of ``digits`` or ``dsprites``."""
    if data == DIGITS:
        return _digits()
    indices = unused_by_vtab(10000)
    drawn = torch.from_numpy(render(indices).astype(np.float32) / 127.5 - 1)[:, None]
    pixels = torch.nn.functional.avg_pool2d(drawn, 2).expand(-1, 3, -1, -1)
    both = Split(pixels, torch.from_numpy(factors_of(indices)["x"] // 2).long())
    return {"train": both.part(slice(8000)), "test": both.part(slice(8000, None))}


def _digits() -> dict[str, Split]:
    loaded = load_images(DIGITS, eval_share=0.4, seed=0)
    found = {}
    for name, part in (("train", loaded.train), ("test", loaded.evaluation)):
        images = np.stack([np.asarray(row[loaded.image_column], dtype=np.float32) for row in part])
        small = torch.from_numpy(images / 127.5 - 1)[:, None]
        pixels = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear", antialias=True)
        found[name] = Split(pixels.expand(-1, 3, -1, -1), torch.tensor(part[loaded.label_column][:]))
    return found


# ---------------------------------------------------------------------- training
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


def trained(name: str, seed: int) -> Any:
    """The model of a subject for a seed, from the cache where it is there. In eval mode."""
    subject = SUBJECTS[name]
    key = hashlib.sha256(json.dumps([VERSION, asdict(subject)], sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(cached_assets_path("hf_vitprune", namespace="benchmarks", subfolder=f"{key}-{seed}"))
    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        split = read(subject.data)["train"]
        steps = subject.epochs * (len(split.labels) // 64)
        model = fit(
            subject.build(), split, steps, subject.learning_rate, seed=seed, what=f"training {name}, seed {seed}"
        )
        model.save_pretrained(folder)
    stock = SwinForImageClassification if subject.swin else ViTForImageClassification
    return stock.from_pretrained(folder).eval()


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    return 100 * float((logits.argmax(1) == labels).float().mean())


def main(seeds: list[int] | None = None) -> None:
    for name, subject in SUBJECTS.items():
        test = read(subject.data)["test"]
        for seed in range(3) if seeds is None else seeds:
            accuracy = accuracy_of(logits_of(trained(name, seed), test.pixels), test.labels)
            print(f"{name}, seed {seed}: {accuracy:.2f} % of {len(test.labels)} test images", flush=True)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or None)

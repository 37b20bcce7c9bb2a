"""Small stand-ins for VTAB-1k tasks: folders in the field's layout, and datasets as the Hub's mirrors have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {"train800": 6, "val200": 3, "test": 5}


def sample(label: int, seed: int, side: int = 12) -> Image.Image:
    """Noise whose brightness tells the class."""
    noise = np.random.default_rng(seed).integers(0, 60, (side, side + 2, 3))
    return Image.fromarray((noise + 30 * (label % 6)).astype(np.uint8))


def write_task(folder: Path, classes: int = 4, sizes: dict[str, int] = SIZES, suffix: str = ".jpg") -> Path:
    """A task's folder; classes go round."""
    for number, (split, size) in enumerate(sizes.items()):
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(size):
            name = f"images/{split}/{i:06d}"
            sample(i % classes, 1000 * number + i).save(folder / f"{name}{suffix}")
            lines.append(f"{name}.jpg {i % classes}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder

"""Tower, decoder and drawings in a folder that travels: to a machine without a network and with little to carry.

Weights are rounded to steps of a hundredth of each row's standard deviation (25 MB in place of 97); drawings are WebP.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .drawings import Drawings, Split
from .tower import Decoder, decoder_of, tower_of

#: of a row's standard deviation; larger steps would show in the features (0.02: CLS cosine .9999 in place of .99997)
STEP = 0.01
SETS = ("calibration", "gallery", "queries")


def pack(folder: Path, model: nn.Module, decoder: nn.Module, split: Split, quality: int = 85) -> int:
    """Write it; ``split`` has images as bytes, ``quality`` is of the WebP files. Returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in (("tower", model), ("decoder", decoder)):
        arrays: dict[str, np.ndarray] = {}
        for key, tensor in module.state_dict().items():
            arrays |= _rounded(key, tensor)
        np.savez_compressed(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    with zipfile.ZipFile(folder / "drawings.zip", "w") as file:
        for name, part in zip(SETS, split, strict=True):
            for i, (pixels, label) in enumerate(zip(part.pixels, part.labels.tolist(), strict=True)):
                data = io.BytesIO()
                Image.fromarray(pixels.numpy().transpose(1, 2, 0)).save(data, "WEBP", quality=quality)
                file.writestr(f"{name}/{i:05d}_{label}.webp", data.getvalue())
    return sum(path.stat().st_size for path in folder.iterdir())


def unpack(folder: Path) -> tuple[Any, Decoder, Split]:
    """What was packed: the tower, its decoder, and the images as bytes."""
    model, decoder = (
        of(_weights(dict(np.load(folder / f"{name}.npz"))))
        for name, of in (("tower", tower_of), ("decoder", decoder_of))
    )
    with zipfile.ZipFile(folder / "drawings.zip") as file:
        data = {name: file.read(name) for name in sorted(file.namelist())}
    with ThreadPoolExecutor() as pool:
        pixels = dict(zip(data, pool.map(_read, data.values()), strict=True))
    parts = []
    for part in SETS:
        names = [name for name in pixels if name.startswith(f"{part}/")]
        labels = [int(name.rpartition("_")[2].removesuffix(".webp")) for name in names]
        parts.append(Drawings(torch.from_numpy(np.stack([pixels[name] for name in names])), torch.tensor(labels)))
    return model, decoder, Split(*parts)


def _read(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1).copy()


def _rounded(name: str, tensor: torch.Tensor) -> dict[str, np.ndarray]:
    """Matrices as whole numbers, whose high and low bytes compress apart, and a step a row; the rest as it is."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return {name: tensor.numpy()}
    step = (STEP * tensor.flatten(1).std(1)).clamp(min=1e-12)
    codes = (tensor / step.view(-1, *[1] * (tensor.ndim - 1))).round().clamp(-(2**15), 2**15 - 1)
    shifted = codes.short().numpy().astype(np.int32) + 2**15
    return {f"{name}@step": step.numpy(), f"{name}@high": (shifted >> 8).astype(np.uint8),
            f"{name}@low": (shifted & 255).astype(np.uint8)}  # fmt: skip


def _weights(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    state = {}
    for name, array in arrays.items():
        key, _, kind = name.partition("@")
        if not kind:
            state[key] = torch.from_numpy(array)
        elif kind == "step":
            codes = arrays[f"{key}@high"].astype(np.int32) * 256 + arrays[f"{key}@low"] - 2**15
            step = array.reshape(-1, *[1] * (codes.ndim - 1))
            state[key] = torch.from_numpy(codes.astype(np.float32) * step)
    return state

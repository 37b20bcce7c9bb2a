"""The blocks that a latency table times: built in every shape of the grid, run as the model itself runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from ..cost.closed_form import count
from ..families.base import pair
from ..modeling import build
from ..modeling.conv_mixer import GRID
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.layer_shape import KERNELS, LayerShape
from .grid import StageAxes, grids_of

Call = Callable[[], Any]

#: blocks take their weights in turn from as much memory as the dense model's take, up to so many elements: what is
#: in a processor's cache and what is not is then as in the model
POOL = 1 << 25
#: weights start at multiples of this many elements, as separately allocated ones do
ALIGNMENT = 64


@dataclass(frozen=True)
class Point:
    """One thing to time: a block of some sizes (by axis), or with stage None the model around the blocks."""

    stage: int | None
    grid: str
    sizes: dict[str, int]

    def shape(self, windows: bool) -> LayerShape:
        """The block to build; where there are windows, they are shifted or not."""
        shifted = bool(self.sizes.get("shifted")) if windows else None
        if self.grid.startswith("attention"):
            heads, qk, v = (self.sizes[name] for name in ("heads", "qk", "v"))
            return LayerShape("attention", heads, qk, v, attention_in=self.sizes.get("inputs"), shifted=shifted)
        if self.grid.startswith("mlp"):
            return LayerShape("none", mlp=self.sizes["mlp"], mlp_in=self.sizes.get("inputs"), shifted=shifted)
        if self.grid in KERNELS:
            norm = bool(self.sizes["batch_norm"])
            return LayerShape(self.grid, conv_channels=self.sizes["channels"], batch_norm=norm, shifted=shifted)
        return LayerShape(self.grid, shifted=shifted)


def points_of(stages: Sequence[StageAxes], architecture: Architecture) -> list[Point]:
    """Everything that a table of these axes times, in a fixed order."""
    points = [Point(None, "model", {"embedding": width}) for width in stages[0]["embedding"]]
    for stage, axes in enumerate(stages):
        for name, sizes in grids_of(axes, architecture).items():
            points += [Point(stage, name, dict(zip(sizes, at, strict=True))) for at in product(*sizes.values())]
    return points


class TimedModel:
    """Runs the points of a grid for one kind of model on one input.

    Every block is called with what its place in a forward pass of the model gives it, so that windows, masks and
    whatever else a family hands its blocks are there.

    Args:
        architecture: of the model; its dense form is what is built, in every width.
        image_size: (height, width) in pixels; the models are built for it.

    Attributes:
        attention: name of the attention implementation that runs.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch_size: int,
        image_size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        config = copy.deepcopy(architecture.config)
        sizes: Any = architecture.family.sizes_config(config)
        if pair(sizes.image_size) != image_size:
            sizes.image_size = image_size[0] if image_size[0] == image_size[1] else list(image_size)
        self.dense = Architecture.dense(config, architecture.task)
        self.dtype, self.device = dtype, device
        self.pixels = torch.randn(batch_size, sizes.num_channels, *image_size).to(device, dtype)
        self.attention = ""
        self._pool = self._memory(min(count(self.dense).params, POOL))
        self._taken = 0

    def calls(self, points: Sequence[Point]) -> list[Call]:
        """One function a point, to be called in inference mode."""
        calls: dict[int, Call] = {}
        for hidden_size in sorted({self._hidden_size(point) for point in points}):
            mine = [(i, point) for i, point in enumerate(points) if self._hidden_size(point) == hidden_size]
            model, inputs = self._empty_model(hidden_size)
            for i, point in mine:
                if point.stage is None:
                    calls[i] = partial(model, pixel_values=self.pixels)
            rows = [[(i, point) for i, point in mine if point.stage == stage] for stage in range(len(inputs))]
            windows = self.dense.depths is not None
            layers = self._layers(hidden_size, [[point.shape(windows) for _, point in row] for row in rows])
            for row, blocks, (args, kwargs) in zip(rows, layers, inputs, strict=True):
                for (i, point), block in zip(row, blocks, strict=True):
                    calls[i] = partial(block, *args, **kwargs, **self._told(point))
        return [calls[i] for i in range(len(points))]

    def _told(self, point: Point) -> dict[str, Any]:
        """What a model with convolutions would tell its blocks; blocks of windows know it anyway."""
        if point.grid not in KERNELS or self.dense.depths is not None:
            return {}
        return {GRID: self.dense.family.grid(self.dense.config, None)}

    def _hidden_size(self, point: Point) -> int:
        factor = 1 if point.stage is None else self.dense.family.width_factor(point.stage)
        return point.sizes["embedding"] // factor

    def _empty_model(self, hidden_size: int) -> tuple[nn.Module, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """A model with one empty block a stage, and what each block is called with."""
        model, blocks = self._build(hidden_size, [[self._empty_shape()] for _ in set(self.dense.stages)])
        inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args, kwargs))

        handles = [row[0].register_forward_pre_hook(note, with_kwargs=True) for row in blocks]
        with torch.inference_mode():
            model(pixel_values=self.pixels)
        for handle in handles:
            handle.remove()
        return model, inputs

    def _empty_shape(self) -> LayerShape:
        return LayerShape("none", shifted=None if self.dense.depths is None else False)

    def _layers(self, hidden_size: int, shapes: list[list[LayerShape]]) -> list[list[nn.Module]]:
        """Blocks of these shapes, a list a stage; all take their weights from one piece of memory."""
        _, blocks = self._build(hidden_size, [row or [self._empty_shape()] for row in shapes])
        blocks = [made[: len(row)] for made, row in zip(blocks, shapes, strict=True)]
        for block in (block for row in blocks for block in row):
            for parameter in block.parameters():
                parameter.data = self._weights(parameter.shape)
        return blocks

    def _build(self, hidden_size: int, shapes: list[list[LayerShape]]) -> tuple[nn.Module, list[list[nn.Module]]]:
        dense, config = self.dense, copy.deepcopy(self.dense.config)
        depths = None if dense.depths is None else tuple(len(row) for row in shapes)
        count = sum(len(row) for row in shapes)
        dense.family.resize_config(config, dense.hidden_size, count, depths)
        wanted = Architecture(config, tuple(s for row in shapes for s in row), hidden_size, depths, dense.task)
        with self.device:
            model: Any = build(config, wanted)
        model = model.to(self.dtype).eval()
        self.attention = model.config._attn_implementation
        modules: Iterator[nn.Module] = (model.get_submodule(paths.layer) for paths in layer_paths(model, wanted))
        return model, [[next(modules) for _ in row] for row in shapes]

    def _weights(self, shape: torch.Size) -> torch.Tensor:
        """The next piece of the pool; at its end, on from the start."""
        if shape.numel() > len(self._pool):
            self._pool = self._memory(shape.numel())
        if self._taken + shape.numel() > len(self._pool):
            self._taken = 0
        piece = self._pool[self._taken : self._taken + shape.numel()].view(shape)
        self._taken += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
        return piece

    def _memory(self, size: int) -> torch.Tensor:
        """Values like those of weights, quickly."""
        some = torch.randn(min(size, 1 << 16), device=self.device, dtype=self.dtype) * 0.02
        return some.repeat(-(-size // len(some)))

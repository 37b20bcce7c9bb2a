"""The blocks that a latency table times: built in every shape of the grid, run as the model itself runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from ..cost.closed_form import count
from ..errors import UnsupportedModelError
from ..families.base import pair
from ..modeling import build
from ..modeling.conv_mixer import GRID
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.layer_shape import KERNELS, LayerShape
from .grid import SampledGrid, StageAxes, grids_of
from .measure import PartialFile, timed_rounds

Call = Callable[[], Any]

#: blocks take their weights in turn from as much memory as the dense model's take, up to so many elements: what is
#: in a processor's cache and what is not is then as in the model
POOL = 1 << 25
#: one sample takes at least this long, by repeating the block
LEAST_SECONDS = {"cpu": 0.005}
LEAST_SECONDS_ELSEWHERE = 0.02
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


def covered_model(architecture: Architecture, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """The dense model behind an architecture and the input it is timed on, as far as times depend on them."""
    dense = Architecture.dense(architecture.config, architecture.task)
    family, config = dense.family, dense.config
    stages = sorted(set(dense.stages))
    first = [dense.stages.index(stage) for stage in stages]
    grid = family.grid(config, image_size)
    return {
        "model_type": dense.model_type,
        "task": dense.task,
        "hidden_size": dense.hidden_size,
        "depths": [dense.stages.count(stage) for stage in stages],
        "width_factors": [family.width_factor(stage) for stage in stages],
        "heads": [dense.layers[i].heads for i in first],
        "head_dim": [dense.layers[i].qk_dim for i in first],
        "mlp": [dense.layers[i].mlp for i in first],
        "fc1": len(family.fc1_names(config)),
        "tokens": [list(family.attention_tokens(config, grid, stage)) for stage in stages],
        "patch_size": list(pair(family.sizes_config(config).patch_size)),
    }


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

    Attributes:
        dense: the dense architecture behind what was given, which is built in every width.
        image_size: (height, width) in pixels; the models are built for it.
        pixels: the input.
    """

    def __init__(
        self,
        model_or_config: Any,
        batch_size: int,
        image_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """For a model, a config or an Architecture; its own image size, dtype and device are the defaults.

        Raises:
            InvalidConfigError: an impossible image size.
            UnsupportedModelError: the model cannot be built from single blocks that stand for all.
        """
        if isinstance(model_or_config, PreTrainedConfig):
            model_or_config = Architecture.from_config(model_or_config)
        architecture = Architecture.given(model_or_config)
        architecture.check_looks("timing")
        _check_alike(architecture)
        self.device, self.dtype = torch.device("cpu"), dtype or torch.float32
        if isinstance(model_or_config, nn.Module):
            parameter = next(p for p in model_or_config.parameters() if p.is_floating_point())
            self.device, self.dtype = parameter.device, dtype or parameter.dtype
        if device is not None:
            self.device = torch.device(device)
        if self.device.type == "meta":
            raise UnsupportedModelError("nothing runs on the meta device: say where to measure, with device=")
        config = copy.deepcopy(architecture.config)
        sizes: Any = architecture.family.sizes_config(config)
        self.image_size = height, width = architecture.checked_size(image_size) or pair(sizes.image_size)
        if pair(sizes.image_size) != self.image_size:
            sizes.image_size = height if height == width else [height, width]
        self.dense = Architecture.dense(config, architecture.task)
        self.pixels = torch.randn(batch_size, sizes.num_channels, height, width).to(self.device, self.dtype)
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
                    if point.grid in KERNELS and not windows:  # blocks of windows know it anyway
                        grid = {GRID: self.dense.family.grid(self.dense.config, None)}
                        calls[i] = partial(block, *args, **kwargs, **grid)
                    else:
                        calls[i] = partial(block, *args, **kwargs)
        return [calls[i] for i in range(len(points))]

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
        depths = None
        if dense.depths is not None:  # the last stages may be empty
            depths = (*map(len, shapes), *[0] * (len(dense.depths) - len(shapes)))
        count = sum(len(row) for row in shapes)
        dense.family.resize_config(config, dense.hidden_size, count, depths)
        wanted = Architecture(config, tuple(s for row in shapes for s in row), hidden_size, depths, dense.task)
        with self.device:
            model: Any = build(config, wanted)
        model = model.to(self.dtype).eval()
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


def time_blocks(
    timed: TimedModel,
    stages: Sequence[StageAxes],
    rounds: int,
    beside: Sequence[nn.Module],
    kept: PartialFile | None = None,
    progress: bool = True,
) -> tuple[SampledGrid, list[dict[str, SampledGrid]], list[float]]:
    """Median seconds over the rounds of everything that a table of these axes holds.

    ``beside``: whole models that take turns with the blocks, in eval mode, where the blocks are.

    Returns:
        Times of the model around the blocks; of the blocks, a mapping a stage; and of the models beside them.
    """
    points = points_of(stages, timed.dense)
    calls = timed.calls(points) + [partial(model, pixel_values=timed.pixels) for model in beside]
    least = LEAST_SECONDS.get(timed.device.type, LEAST_SECONDS_ELSEWHERE)
    done = timed_rounds(calls, rounds, timed.device, least, kept, progress, shuffled=True)
    medians = [median(row[i] for row in done) for i in range(len(calls))]
    rest = iter(medians)

    def sampled(name: str, axes: Mapping[str, tuple[int, ...]]) -> SampledGrid:
        shape = [len(values) for values in axes.values()]
        times = np.array([next(rest) for _ in range(int(np.prod(shape)))]).reshape(shape)
        return SampledGrid(name, dict(axes), times)

    whole = sampled("model", {"embedding": stages[0]["embedding"]})
    grids = [
        {name: sampled(f"stage {i} {name}", axes) for name, axes in grids_of(row, timed.dense).items()}
        for i, row in enumerate(stages)
    ]
    return whole, grids, list(rest)


def _check_alike(architecture: Architecture) -> None:
    """Raises:
    UnsupportedModelError: a block of some sizes does not take the time of another, or the rest needs them all.
    """
    dense, name = Architecture.dense(architecture.config, architecture.task), architecture.model_type
    if dense.kinds != dense.stages:
        raise UnsupportedModelError(
            f"layers of the same sizes do not take the same time in a {name} (windows): take target_metric='macs'"
        )
    if dense.family.has_neck(dense.config, dense.task):
        raise UnsupportedModelError(
            f"a {name} {dense.task} reads the features of several layers and cannot be timed block by block: measure "
            "the table on the same layers under another head"
        )

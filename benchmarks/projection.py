"""Where the largest towers would stand on 8 GPUs: by calculation from counts, nothing of it measured.

Operations are counted as in the code: forward passes, products of the statistics, factorisations in double precision.
Seconds are operations over what a GPU is assumed to sustain; nothing is added for reading weights or for sending.
"""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table

#: ``PROBED``: images times layers that probes run, in each of ``PROBES`` sizes
GPUS, IMAGES, PROBES, PROBED = 8, 128, 6, 48
#: operations a second that a GPU is assumed to sustain: matrices in bf16, in single, and in double precision
HALF, SINGLE, DOUBLE = 350e12, 40e12, 30e12
GIB = 2**30


class Tower(NamedTuple):
    """A published shape, at one resolution; ``gated``: the MLP has two Linears into its hidden units."""

    name: str
    width: int
    layers: int
    mlp: int
    tokens: int
    gated: bool = False

    @property
    def weights(self) -> int:
        """Parameters of the layers."""
        return self.layers * self.width * (4 * self.width + (3 if self.gated else 2) * self.mlp)

    @property
    def forward(self) -> float:
        """Operations for one image."""
        return 2.0 * self.tokens * self.weights + 4.0 * self.layers * self.tokens**2 * self.width


TOWERS = (
    Tower("ViT-g/14, 224 x 224", 1408, 40, 6144, 257),
    Tower("DINOv2-giant, 518 x 518", 1536, 40, 4096, 1370, gated=True),
    Tower("InternViT-6B, 448 x 448", 3200, 45, 12800, 1025),
)


def score_seconds(tower: Tower) -> float:
    """One-shot scores from ``IMAGES`` images, split over the GPUs; every GPU solves every ``GPUS``-th layer."""
    rows, probes = IMAGES * tower.tokens, PROBES * PROBED / 2  # each runs half of the layers
    forward = (IMAGES + probes) * tower.forward
    moments = tower.layers * rows * (tower.mlp**2 + tower.width**2)  # of q and k, head by head, next to nothing
    solved = tower.layers * (2.0 * tower.mlp**3 + 3.0 * tower.width * tower.mlp**2 + 4.0 * tower.width**3)
    return (forward / HALF + moments / SINGLE + solved / DOUBLE) / GPUS


def compensation_seconds(tower: Tower, kept: float = 0.5) -> float:
    """New weights from as many images; each layer is solved by all, since the next one waits for it.

    Queries and keys are projected once more.
    """
    rows, mlp = IMAGES * tower.tokens, kept * tower.mlp
    forward = (1 + kept) * IMAGES * tower.forward
    moments = tower.layers * rows * (mlp**2 + 2.0 * tower.width * mlp + 7.0 * tower.width**2)
    solved = tower.layers * (mlp**3 / 3 + 8.0 * tower.width * mlp**2 + 8.0 * tower.width**3)
    return (forward / HALF + moments / SINGLE) / GPUS + solved / DOUBLE


def step_seconds(tower: Tower, batch: int = 8) -> float:
    """A VTP, NViT or SPViT step of ``batch`` images a GPU: forward twice (once to recompute) and backward."""
    return 4 * batch * tower.forward / HALF


def calibration_bytes(tower: Tower, kept: float = 0.5) -> float:
    """Of one GPU: dense weights, what is left of them, both streams of its images, ten covariances of one layer."""
    streams = 2 * IMAGES / GPUS * tower.tokens * tower.width * 2
    return 2 * tower.weights * (1 + kept) + streams + 10 * 8 * max(tower.mlp, tower.width) ** 2


def streamed_bytes(tower: Tower, kept: float = 0.5) -> float:
    """The same with dense layers on the disk."""
    return calibration_bytes(tower, kept) - 2 * tower.weights * (1 - 1 / tower.layers)


def training_bytes(tower: Tower, batch: int = 8) -> float:
    """Of one GPU, FSDP2: a share of bf16 weights and gradients and of AdamW's 12 bytes; the inputs of every layer."""
    inputs = 2 * batch * tower.layers * tower.tokens * tower.width
    return 16 * tower.weights / GPUS + inputs + 4 * tower.weights / tower.layers  # a layer's weights and gradients


def projections() -> Table:
    """One row a tower."""
    title = f"{GPUS} GPUs, {IMAGES} images, by calculation"
    headings = "scores, s", "compensation, s", "GPU memory, GiB", "streamed, GiB", "step, s", "in training, GiB"
    table = Table("", "parameters", *headings, title=title)
    for tower in TOWERS:
        seconds = score_seconds(tower), compensation_seconds(tower)
        sizes = calibration_bytes(tower), streamed_bytes(tower)
        table.add_row(
            tower.name,
            f"{tower.weights / 1e9:.2f}B",
            *(f"{value:.1f}" for value in seconds),
            *(f"{value / GIB:.1f}" for value in sizes),
            f"{step_seconds(tower):.2f}",
            f"{training_bytes(tower) / GIB:.1f}",
        )
    return table

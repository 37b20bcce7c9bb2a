"""Settings of VTP."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import InvalidConfigError
from ...gates import POINTS
from ..base import PruningConfig, check_open_interval


@dataclass
class VTPConfig(PruningConfig):
    """Visual transformer pruning with learned importance scores (Zhu et al., arXiv 2104.08500).

    Give a ``pruning_ratio`` (the paper's way) or a ``target`` cost; with a target the threshold is searched.

    Attributes:
        pruning_ratio: share of all gated channels that goes, ranked over the whole network, in (0, 1); None when
            ``target`` is given.
        sparsity_weight: lambda, weight of the sum of |score| in the loss (paper: 1e-3 to 1e-5).
        sparsity_warmup: share of the training over which lambda grows from 0; 0 starts at full weight.
        points: where features are gated: any of ``attention_in``, ``attention_out``, ``mlp_in``, ``mlp_hidden``.
        round_to: kept channels of a set are a multiple of this, and at least this many.
        uneven: heads of a layer may keep different numbers of channels (the paper's free choice); the shorter ones
            are padded with zeros. By default the layer's budget is split evenly over its heads.
        binarize: kept scores become 1, as in the paper; by default they are folded into the weights, so that the
            pruned model computes what the gated one did.
        target_modules: regular expression; only layers whose path matches (``re.search``) are gated. None: all.
        exclude_modules: regular expression of layer paths that are left alone.
    """

    pruning_ratio: float | None = None
    sparsity_weight: float = 1e-4
    sparsity_warmup: float = 0.0
    points: tuple[str, ...] = POINTS
    round_to: int = 8
    uneven: bool = False
    binarize: bool = False
    target_modules: str | None = None
    exclude_modules: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pruning_ratio is None) == (self.target is None):
            raise InvalidConfigError("give either pruning_ratio (share of channels that goes) or target (cost that stays)")
        if self.pruning_ratio is not None:
            check_open_interval("pruning_ratio", self.pruning_ratio)
        if not self.sparsity_weight >= 0:
            raise InvalidConfigError(f"sparsity_weight must not be negative, got {self.sparsity_weight!r}")
        if not 0 <= self.sparsity_warmup <= 1:
            raise InvalidConfigError(f"sparsity_warmup is a share of the training in [0, 1], not {self.sparsity_warmup!r}")
        self.points = tuple(self.points)
        if not self.points or set(self.points) - set(POINTS) or len(set(self.points)) < len(self.points):
            raise InvalidConfigError(f"points is a non-empty choice of {', '.join(POINTS)}, not {self.points!r}")
        if type(self.round_to) is not int or self.round_to < 1:
            raise InvalidConfigError(f"round_to is a whole number of at least 1, not {self.round_to!r}")
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise InvalidConfigError(f"{name} {pattern!r} is no regular expression: {error}") from error

    def gates_layer(self, path: str) -> bool:
        """Whether the layer at this path is gated."""
        if self.target_modules is not None and not re.search(self.target_modules, path):
            return False
        return self.exclude_modules is None or not re.search(self.exclude_modules, path)

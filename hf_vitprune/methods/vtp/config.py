"""Settings of VTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...errors import InvalidConfigError
from ...surgery import points
from ...utils.settings import check_counts, check_flags, check_number, check_open_interval, choice_of
from ..base import PruningConfig

#: of the paper: in front of every Linear, so that queries and keys keep their width
POINTS = tuple(name for name in points.POINTS if name != "queries")

#: where stock classes can hold fewer channels: of the values whole heads, and hidden neurons
UNIFORM_POINTS = ("attention_out", "mlp_hidden")


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
        uniform: the same number of heads and of hidden neurons in every layer, of those that a stock class can hold:
            whole heads and neurons go (``points`` are ``attention_out`` and ``mlp_hidden``), and the small model is a
            stock one, which loads without this library.
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
    uniform: bool = False
    binarize: bool = False
    target_modules: str | None = None
    exclude_modules: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.pruning_ratio is None) == (self.target is None):
            raise InvalidConfigError(
                "give either pruning_ratio (share of channels that goes) or target (cost that stays), not "
                + ("both" if self.target is not None else "none")
            )
        if self.pruning_ratio is not None:
            check_open_interval("pruning_ratio", self.pruning_ratio)
        check_number("sparsity_weight", self.sparsity_weight)
        check_number("sparsity_warmup", self.sparsity_warmup, highest=1)
        names = choice_of(self, "points", POINTS)
        if self.uniform is True:
            names = UNIFORM_POINTS if names == POINTS else names
            if self.uneven or not {*names} <= {*UNIFORM_POINTS}:
                raise InvalidConfigError(
                    "uniform=True cuts whole heads and hidden neurons, the same in every layer: leave uneven out, and "
                    f"of points all but {' and '.join(UNIFORM_POINTS)}"
                )
        self.points = names
        check_counts(self, "round_to")
        check_flags(self, "uneven", "uniform", "binarize")
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            try:
                re.compile(pattern or "")
            except (re.error, TypeError) as error:
                raise InvalidConfigError(f"{name} {pattern!r} is no regular expression: {error}") from error

    @classmethod
    def from_goal(cls, *goal: Any, **settings: Any) -> VTPConfig:
        return super().from_goal(*goal, **{"gate_learning_rate": 1e-2, **settings})

    @classmethod
    def published(cls, pruning_ratio: float = 0.4, **changes: Any) -> VTPConfig:
        """The paper's settings: lambda 1e-4, all four points, kept scores set to one, any number of channels a head.

        The rest of its recipe is the training's: ``examples/recipes/vtp-40.json``.

        Args:
            pruning_ratio: share of the channels that goes; the paper has 0.2 and 0.4.
            changes: further settings, or other values.
        """
        settings: dict[str, Any] = {"sparsity_weight": 1e-4, "binarize": True, "uneven": True, "round_to": 1}
        return cls(**{"pruning_ratio": pruning_ratio, **settings, **changes})

    def gates_layer(self, path: str) -> bool:
        """Whether the layer at this path is gated."""
        if self.target_modules is not None and not re.search(self.target_modules, path):
            return False
        return self.exclude_modules is None or not re.search(self.exclude_modules, path)

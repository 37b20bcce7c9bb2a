"""Settings of SPViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import InvalidConfigError
from ...utils.settings import check_count, check_counts, check_flags, check_number, check_one_of, check_positive
from ..base import PruningConfig
from .gates import GATE_GRADIENTS

#: settings that the paper searched its models with: (weight of the cost, 10^9 multiply-adds, learning rate of gates)
PUBLISHED = {
    "deit-tiny": (20.0, 1.0, 1e-3),
    "deit-small": (3.0, 3.2, 5e-4),
    "deit-base": (0.08, 6.0, 1e-3),
    "deit-base-10g": (0.06, 10.0, 1e-3),
    "swin-tiny": (2.8, 3.2, 5e-4),
    "swin-small": (0.4, 5.5, 5e-4),
    "swin-base": (0.1, 10.0, 5e-4),
}


@dataclass
class SPViTConfig(PruningConfig):
    """Self-attention pruned into convolution, in a single path (He et al., arXiv 2111.11802).

    While the model trains, three nested gates a layer choose what mixes its tokens (nothing < ``conv1x1`` <
    ``conv3x3`` < ``attention``), and one gate a neuron what stays of its MLP. The convolutions are made of the
    attention's own weights.

    Give ``target`` (a share of the dense model's cost: one ``cost_weight`` then suits every size) or
    ``target_gmacs`` (the paper's absolute form, of which :meth:`published` has the settings).

    Attributes:
        target_gmacs: 10^9 multiply-adds that may remain; the cost is then counted in that unit.
        cost_weight: lambda of the cost term ``lambda * (cost - target)^2``.
        cost_warmup: share of the search over which lambda grows from 0, in [0, 1]; 0 starts at full weight.
        temperature: of the logistic relaxation that gradients come from.
        final_temperature: temperature at the end of the search, which it moves to geometrically; None: constant.
        single_path: convolutions share the attention's weights. False is the paper's baseline: every candidate has
            weights of its own, drawn at random.
        gate_gradients: which of the three gates of a layer learn from mixers that are on. ``"shared"``: all gates of
            the most complex one, which needs them all, in the loss and in the cost (the authors' code).
            ``"topmost"``: its own gate alone, and those above it.
        enforce_target: a search that ends over the target gives the rest at once, so that the small model meets it.
            False: the target is what the cost term draws to, as in the paper, whose searches end above it.
        round_to: neurons that an MLP keeps are a multiple of this (none is one too).
        patience: the search stops once the target has been met (within 2 % of it) and no mixer has changed for so
            many steps; None: a twentieth of the planned ones. 0: it never stops early.
        gate_learning_rate: of the gates, constant and without weight decay (paper: 1e-3; 5e-4 for DeiT-S and Swin).
    """

    gate_learning_rate: float | None = 1e-3
    target_gmacs: float | None = None
    cost_weight: float = 40.0
    cost_warmup: float = 0.0
    temperature: float = 1.0
    final_temperature: float | None = None
    single_path: bool = True
    gate_gradients: str = "topmost"
    enforce_target: bool = True
    round_to: int = 8
    patience: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_target()
        check_number("cost_warmup", self.cost_warmup, highest=1)
        check_positive("cost_weight", self.cost_weight)
        check_positive("temperature", self.temperature)
        if self.final_temperature is not None:
            check_positive("final_temperature", self.final_temperature)
        check_flags(self, "single_path", "enforce_target")
        check_one_of(self, "gate_gradients", GATE_GRADIENTS)
        check_counts(self, "round_to")
        if self.patience is not None:
            check_count("patience", self.patience, 0)

    def _check_target(self) -> None:
        if (self.target is None) == (self.target_gmacs is None):
            raise InvalidConfigError(
                "give either target (share of the dense cost) or target_gmacs (10^9 multiply-adds), not "
                + ("both" if self.target is not None else "none")
            )
        if self.target_metric == "latency":
            raise InvalidConfigError(
                "SPViT learns by a cost that has a gradient: target_metric is macs or params, not latency"
            )
        if self.target_gmacs is not None:
            check_positive("target_gmacs", self.target_gmacs)
            if self.target_metric != "macs":
                raise InvalidConfigError("target_gmacs counts multiply-adds: leave target_metric at macs")

    @classmethod
    def published(cls, name: str, **changes: Any) -> SPViTConfig:
        """The settings of a model of the paper: ``deit-tiny``, ``deit-small``, ``deit-base``, ``deit-base-10g``
        (the larger of its two), ``swin-tiny``, ``swin-small`` or ``swin-base``.

        Their target is soft: the architecture is taken as the search finds it, and the rules of the released code
        say what the gates learn from. A search does not end before its last step.

        Args:
            name: of the model.
            changes: further settings, or other values.

        Raises:
            InvalidConfigError: there is no such model.
        """
        if name not in PUBLISHED:
            raise InvalidConfigError(f"no published settings for {name!r}; known: {', '.join(PUBLISHED)}")
        weight, gmacs, rate = PUBLISHED[name]
        settings: dict[str, Any] = {"cost_weight": weight, "target_gmacs": gmacs, "gate_learning_rate": rate}
        settings |= {"round_to": 1, "gate_gradients": "shared", "enforce_target": False, "patience": 0}
        return cls(**{**settings, **changes})

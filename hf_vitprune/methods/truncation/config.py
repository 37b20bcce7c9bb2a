"""Settings of truncation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import InvalidConfigError
from ..base import PruningConfig, check_number

VALIDATION = "validation"


@dataclass
class TruncationConfig(PruningConfig):
    """Keep the first layers: a given number, as many as a cost allows, or as few as the accuracy allows.

    Attributes:
        layers: how many stay; or ``"validation"``: as few as cost at most ``max_drop`` of the accuracy. None where
            ``target`` (fraction of the cost that may remain) is given instead.
        max_drop: with ``"validation"``: accuracy that may be lost against all layers, in [0, 1], without retraining.
        min_layers: with ``"validation"``: never keep fewer.
        batch_size: with ``"validation"``: images a forward pass.
    """

    layers: int | str | None = None
    max_drop: float = 0.01
    min_layers: int = 1
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.layers is None) == (self.target is None):
            raise InvalidConfigError(
                "give either layers (how many stay, or 'validation') or target (cost that stays), not "
                + ("both" if self.target is not None else "none")
            )
        if self.layers is not None and self.layers != VALIDATION and (type(self.layers) is not int or self.layers < 1):
            raise InvalidConfigError(f"layers is a whole number of at least 1 or 'validation', not {self.layers!r}")
        if self.gate_learning_rate is not None:
            raise InvalidConfigError("truncation has no gates: leave gate_learning_rate out")
        check_number("max_drop", self.max_drop, highest=1)
        for name in ("min_layers", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidConfigError(f"{name} is a whole number of at least 1, not {value!r}")

    @property
    def by_validation(self) -> bool:
        return self.layers == VALIDATION

    def to_dict(self) -> dict[str, Any]:
        """Without what says nothing for the way chosen."""
        without = {"gate_learning_rate"}
        if not self.by_validation:
            without |= {"max_drop", "min_layers", "batch_size"}
        if self.target is None:
            without |= {"target", "target_metric", "latency_table", "latency_batch_size", "allow_other_device"}
        return {name: value for name, value in super().to_dict().items() if name not in without}

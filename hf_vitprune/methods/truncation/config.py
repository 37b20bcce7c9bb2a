"""Settings of truncation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import InvalidConfigError
from ...utils.settings import check_counts, check_number
from ..base import PruningConfig

VALIDATION = "validation"
FEATURES = "features"
#: of the accuracy, and of the cosine of features
MAX_DROPS = {VALIDATION: 0.01, FEATURES: 0.05}


@dataclass
class TruncationConfig(PruningConfig):
    """Keep the first layers: a given number, as many as a cost allows, or as few as accuracy or features allow.

    Attributes:
        layers: how many stay; or ``"validation"``: as few as cost at most ``max_drop`` of the accuracy; or
            ``"features"``, without labels: as few as leave features from which a linear map regains those of all
            layers, but for ``max_drop``. None where ``target`` (fraction of the cost that may remain) is given.
        max_drop: with ``"validation"``: accuracy that may be lost against all layers, in [0, 1], without retraining
            (0.01 by default). With ``"features"``: one minus the mean cosine, CLS counting as much as all patches
            (0.05 by default).
        min_layers: with these two: never keep fewer.
        batch_size: with these two: images a forward pass.
    """

    layers: int | str | None = None
    max_drop: float = None  # type: ignore[assignment]  # see MAX_DROPS
    min_layers: int = 1
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.layers is None) == (self.target is None):
            raise InvalidConfigError(
                "give either layers (how many stay, or 'validation') or target (cost that stays), not "
                + ("both" if self.target is not None else "none")
            )
        named = self.layers in (VALIDATION, FEATURES)
        if self.layers is not None and not named and (type(self.layers) is not int or self.layers < 1):
            raise InvalidConfigError(
                f"layers is a whole number of at least 1, 'validation' or 'features', not {self.layers!r}"
            )
        if self.max_drop is None:
            self.max_drop = MAX_DROPS.get(str(self.layers), MAX_DROPS[VALIDATION])
        if self.gate_learning_rate is not None:
            raise InvalidConfigError("truncation has no gates: leave gate_learning_rate out")
        check_number("max_drop", self.max_drop, highest=1)
        check_counts(self, "min_layers", "batch_size")

    @property
    def by_validation(self) -> bool:
        return self.layers == VALIDATION

    @property
    def by_features(self) -> bool:
        return self.layers == FEATURES

    def to_dict(self) -> dict[str, Any]:
        """Without what says nothing for the way chosen."""
        without = {"gate_learning_rate"}
        if not (self.by_validation or self.by_features):
            without |= {"max_drop", "min_layers", "batch_size"}
        if self.target is None:
            without |= {"target", "target_metric", "latency_table", "latency_batch_size", "allow_other_device"}
        return {name: value for name, value in super().to_dict().items() if name not in without}

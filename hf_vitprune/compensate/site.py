"""One layer under compensation: the layer as it was, as it is kept, and what is written into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..plan.layer_plan import PAD, LayerPlan
from ..spec.layer_shape import LayerShape
from .fits import Fit
from .layer import Layer
from .moments import precise_device
from .settings import Compensation
from .streams import Streams


@dataclass
class Ledger:
    """What was done, for the plan.

    Attributes:
        lossy: something was lost so far, so that the two streams differ.
        rows: what was fitted, layer by layer, with errors before and after.
        notes: what could not be made up for, and why.
    """

    lossy: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass
class Site:
    """A kept layer.

    Attributes:
        small, dense: the layer as it is kept and as it was.
        entry: its part of the plan; reselection changes it.
        source: its dense sizes.
    """

    streams: Streams
    ledger: Ledger
    small: Layer
    dense: Layer
    entry: LayerPlan
    source: LayerShape

    @property
    def settings(self) -> Compensation:
        return self.streams.settings

    @property
    def device(self) -> torch.device:
        return self.streams.device

    # ------------------------------------------------------------------ indices
    @property
    def head_rows(self) -> torch.Tensor:
        """Rows of v (or columns of o) of the kept heads, all their channels."""
        return self._rows(self.source.v_dim)

    @property
    def qk_rows(self) -> torch.Tensor:
        return self._rows(self.source.qk_dim)

    def _rows(self, size: int) -> torch.Tensor:
        at = precise_device(self.device)
        return torch.tensor([h * size + c for h in self.entry.heads for c in range(size)], device=at)

    def kept_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """The rows of residual channels that stay."""
        kept = self.streams.kept
        return matrix if kept is None else matrix[kept.to(matrix.device)]

    def plain_qk(self) -> bool:
        """Whether only the product of q and k matters, as their Linears give them."""
        source = self.streams.plan.source
        family, plain = source.family, source.family.has_plain_qk(source.config)
        if not plain:
            self.ledger.note(
                f"qk: {family.model_type} turns or normalises queries and keys, so that they cannot be rotated; the "
                "plan's channels are kept as they are"
            )
        return plain

    # ------------------------------------------------------------------ weights
    def write(self, part: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Put new weights into a Linear of the small model."""
        linear = self.small.part(part)
        for parameter, new in ((linear.weight, weight), (linear.bias, bias)):
            if parameter is not None and new is not None:
                parameter.data.copy_(new)

    def record(self, part: str, fit: Fit) -> None:
        """One line of the report."""
        more = {"ridge": fit.ridge} if fit.ridge > self.settings.ridge else {}
        if fit.starved:
            self.ledger.note("there are fewer tokens than features: fits are damped strongly; more images would help")
        self.record_errors(part, fit.before, fit.after, **more)

    def record_errors(self, part: str, before: float, after: float, **more: float) -> None:
        """One line of the report: relative errors of plain slices and of the new weights."""
        row = {"layer": self.entry.index, "part": part, "before": before, "after": after, **more}
        self.ledger.rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})


def real(row: tuple[int, ...]) -> list[int]:
    """Positions in a row of channels that are no padding."""
    return [j for j, channel in enumerate(row) if channel != PAD]

"""Names and cuts of a tower's tensors, in the bigger model that it is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..surgery.cuts import Cut


def under(part: str, name: str) -> str:
    """The name in the whole model of what is called ``name`` in the tower at ``part`` ("": the model itself)."""
    return f"{part}.{name}" if part else name


def cuts_with_tower(whole: Any, cuts: Mapping[str, Cut], part: str) -> dict[str, Cut]:
    """Cuts of the tensors of a tower, as those of all tensors of the model that it is in."""
    inside = {under(part, name): Cut(under(part, cut.source), cut.index, cut.scale) for name, cut in cuts.items()}
    prefix = under(part, "")
    return inside | {name: Cut(name) for name in whole.state_dict() if not name.startswith(prefix)}

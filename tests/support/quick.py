"""Classes that stand for the others in the default tests, where only the layers or the kind of head matter."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

from tiny import EVERY_FAMILY, NECKS

#: columns, windows, a gated MLP, a tower beside another
FEW = {
    "ViTForImageClassification",
    "SwinForImageClassification",
    "Dinov2ForImageClassification-swiglu",
    "CLIPForImageClassification",
}
#: one class a family, and one of every kind of head
QUICK = {
    *EVERY_FAMILY,
    *NECKS,
    "DeiTForImageClassificationWithTeacher",
    "ViTForMaskedImageModeling",
    "SwinBackbone",
    "Dinov2Backbone",
}


def mostly_slow(rows: Iterable[Any], quick: Container[str] = QUICK) -> list[Any]:
    """Rows of a parametrization (a case, or a tuple that begins with one): slow but for those of ``quick`` cases."""
    values = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [pytest.param(*row, marks=() if row[0] in quick else pytest.mark.slow) for row in values]

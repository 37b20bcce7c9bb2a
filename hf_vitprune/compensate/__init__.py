"""New weights for a pruned shape, from unlabelled images: no labels, no gradients, the same size."""

from .run import compensate_plan
from .settings import PARTS, Compensation

__all__ = ["PARTS", "Compensation", "compensate_plan"]

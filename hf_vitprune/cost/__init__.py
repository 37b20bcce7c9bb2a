"""What a model costs: parameters and multiply-adds in closed form."""

from .closed_form import Cost, cost_parts, count
from .meter import ClosedFormMeter, CostMeter
from .skeleton import Part

__all__ = ["ClosedFormMeter", "Cost", "CostMeter", "Part", "cost_parts", "count"]

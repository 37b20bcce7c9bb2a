"""What a model costs: parameters and multiply-adds in closed form."""

from .closed_form import Cost, cost_parts, count
from .meter import ClosedFormMeter, CostMeter

__all__ = ["ClosedFormMeter", "Cost", "CostMeter", "cost_parts", "count"]

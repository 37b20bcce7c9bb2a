"""What a model costs: parameters and multiply-adds in closed form, and time as measured."""

from .closed_form import Cost, cost_parts, count

__all__ = ["Cost", "cost_parts", "count"]

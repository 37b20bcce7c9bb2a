"""What a model costs: parameters and multiply-adds in closed form, and time as measured."""

from .closed_form import Cost, cost_parts, count
from .latency import Timing, device_name, environment, measure_speed

__all__ = ["Cost", "Timing", "cost_parts", "count", "device_name", "environment", "measure_speed"]

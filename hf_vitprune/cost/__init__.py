"""What a model costs: parameters and multiply-adds in closed form, and time as measured."""

from .closed_form import Cost, cost_parts, count
from .latency import Timing, device_name, environment, measure_speed
from .latency_table import LatencyTable
from .meter import METRICS, ClosedFormMeter, CostMeter, LatencyMeter

__all__ = [
    "METRICS",
    "ClosedFormMeter",
    "Cost",
    "CostMeter",
    "LatencyMeter",
    "LatencyTable",
    "Timing",
    "cost_parts",
    "count",
    "device_name",
    "environment",
    "measure_speed",
]

"""What a model costs: parameters and multiply-adds in closed form, and time as measured."""

from ..latency.measure_time import Timing, device_name, environment, measure_speed
from ..latency.table import LatencyTable
from .closed_form import Cost, cost_parts, count
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

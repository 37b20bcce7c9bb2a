"""Scores of units: a number for every unit of a model, the lowest of which go first (``PruningPlan.from_scores``)."""

from .activation import activation
from .scores import UnitScores
from .weights import magnitude, random, taylor

__all__ = ["UnitScores", "activation", "magnitude", "random", "taylor"]

"""Scores of units: a number for every unit of a model, the lowest of which go first (``PruningPlan.from_scores``)."""

from .activation import activation
from .magnitude import magnitude
from .random import random
from .scores import UnitScores
from .taylor import taylor

__all__ = ["UnitScores", "activation", "magnitude", "random", "taylor"]

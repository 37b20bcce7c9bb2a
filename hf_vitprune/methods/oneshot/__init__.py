"""One-shot pruning: what every size of every layer costs in accuracy, from unlabelled images, and the best of them."""

from .choose import check_target
from .scores import OneShotScores
from .settings import OneShotSettings

__all__ = ["OneShotScores", "OneShotSettings", "check_target"]

"""Cost against error for every budget, from a file of one-shot scores."""

from __future__ import annotations

from typing import NamedTuple

from tqdm.auto import tqdm

from ...cost import count
from ...errors import UnreachableTargetError
from ...methods import OneShotScores

#: shares of the multiply-adds that are asked for
TARGETS = tuple(round(0.1 + 0.05 * i, 2) for i in range(18))


class Budget(NamedTuple):
    """The best plan of a budget.

    Attributes:
        share: of the dense multiply-adds that its model needs.
        error: relative squared error of the dense model's output that the scores predict, with compensation.
    """

    share: float
    error: float


def budgets_of(scores: OneShotScores, round_to: int = 8) -> list[Budget]:
    """What every budget costs in accuracy, from the smallest that can be reached on; 1.0 is the model as it is.

    Args:
        scores: of the dense model.
        round_to: as in ``OneShotScores.plan``.

    Raises:
        UnreachableTargetError: nothing under 95% can be reached.
    """
    whole = count(scores.architecture).macs
    found: dict[float, float] = {}
    refused: UnreachableTargetError | None = None
    for target in tqdm(TARGETS, "budgets", delay=3, leave=False):
        try:
            plan = scores.plan(target, round_to=round_to)
        except UnreachableTargetError as error:
            refused = error
            continue
        found[count(plan.architecture).macs / whole] = float(plan.info["error"])
    if not found and refused is not None:
        raise refused
    return [Budget(share, error) for share, error in sorted(found.items()) if error > 0]

"""The multiple-choice knapsack: one option of every group, least error in all, within a budget.

Solved to optimality, up to the tolerance that :func:`allocate` names.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from ...errors import SolverError, UnreachableTargetError

#: of scipy's milp
OPTIMAL, INFEASIBLE = 0, 2
#: shares of the budget that are left over, one after the other where the solver fails
SLACKS = (1e-6, 2e-6, 5e-6)


class Options(NamedTuple):
    """What a group may become: (n,) costs and (n,) errors, both finite."""

    costs: np.ndarray
    errors: np.ndarray


def undominated(options: Options) -> np.ndarray:
    """Positions of the options for which none is as cheap and as good, cheapest first."""
    order = np.lexsort((options.errors, options.costs))
    falling = np.minimum.accumulate(options.errors[order])
    return order[np.r_[True, falling[1:] < falling[:-1]]]


def allocate(groups: Sequence[Options], budget: float) -> list[int]:
    """An option of each group: the sum of costs within ``budget``, the sum of errors the least possible.

    A mixed-integer program (HiGHS), solved to its tolerance: a millionth of the largest choice. Costs and errors are
    brought to the scale of the budget and of the largest choice first. ``SLACKS`` of the budget are left over.

    Raises:
        UnreachableTargetError: the cheapest options cost more than the budget.
        SolverError: the solver failed, at every one of ``SLACKS``.
    """
    kept = [undominated(group) for group in groups]
    choices = [Options(g.costs[k], g.errors[k]) for g, k in zip(groups, kept, strict=True)]
    cheapest = sum(float(c.costs[0]) for c in choices)
    if cheapest > budget:
        raise UnreachableTargetError(f"the cheapest options cost {cheapest:.6g}, over the budget of {budget:.6g}")
    if sum(float(c.costs[-1]) for c in choices) <= budget:
        return [int(k[-1]) for k in kept]
    # what a group costs at the least is spent: only the rest is up for choice
    costs = np.concatenate([c.costs - c.costs[0] for c in choices]) / (budget - cheapest or 1.0)
    errors = np.concatenate([c.errors - c.errors[-1] for c in choices])
    sizes = [len(c.costs) for c in choices]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_matrix((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    # HiGHS fails now and then: on what it presolved and not without, or at one budget and not right beside it
    for slack, presolve in itertools.product(SLACKS, (True, False)):
        found = milp(
            errors / (errors.max() or 1.0),
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, np.where(costs > 1, 0, 1)),  # what does not fit on its own never does
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(csr_matrix(costs), -np.inf, 1 - slack)],
            options={"mip_rel_gap": 0.0, "presolve": presolve},
        )
        if found.status in (OPTIMAL, INFEASIBLE):
            break
    else:
        raise SolverError(f"the solver found no choice of sizes ({found.message}): try a slightly different target")
    if found.status == INFEASIBLE:  # within the solver's tolerance of the cheapest
        return [int(k[0]) for k in kept]
    chosen, start = [], 0
    for size, positions in zip(sizes, kept, strict=True):
        chosen.append(int(positions[found.x[start : start + size].argmax()]))
        start += size
    return chosen

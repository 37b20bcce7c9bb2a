"""The multiple-choice knapsack: one option of every group, least error in all, within a budget.

A price of cost (the best Lagrange multiplier) gives a bound that no choice beats, and how far each option is above
its group's share of it. A choice near the bound takes options near it, so that a search over those alone, group by
group, finds the best one (Sinha and Zoltners 1979; Pisinger 1995), to a tolerance that is stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import UnreachableTargetError

#: how far the sum of errors may be above the least one, as a share of the largest error of one choice
TOLERANCE = 1e-6
#: how many partial choices, and products of them with the next group's options, are looked at at once; with more, the
#: tolerance is widened, and the wider one reported
STATES, PRODUCTS = 20_000, 500_000
#: share of the budget that rounding may take
ROUNDING = 1e-9
#: of the price of cost
BISECTIONS = 60


class Options(NamedTuple):
    """What a group may become: (n,) costs and (n,) errors, both finite."""

    costs: np.ndarray
    errors: np.ndarray


class Allocation(NamedTuple):
    """An option of each group, and how far their errors may be above the least sum within the budget."""

    chosen: list[int]
    gap: float


def undominated(options: Options) -> np.ndarray:
    """Positions of the options for which none is as cheap and as good, cheapest first."""
    order = np.lexsort((options.errors, options.costs))
    falling = np.minimum.accumulate(options.errors[order])
    return order[np.r_[True, falling[1:] < falling[:-1]]]


def allocate(groups: Sequence[Options], budget: float) -> Allocation:
    """An option of each group: the sum of costs within ``budget``, the sum of errors the least possible.

    Least up to the returned gap: ``TOLERANCE`` of the largest error of one choice, or more where ``STATES`` and
    ``PRODUCTS`` are not enough.

    Raises:
        UnreachableTargetError: the cheapest options cost more than the budget.
    """
    kept = [undominated(group) for group in groups]
    choices = [Options(g.costs[k], g.errors[k]) for g, k in zip(groups, kept, strict=True)]
    cheapest = sum(float(c.costs[0]) for c in choices)
    if cheapest > budget:
        raise UnreachableTargetError(f"the cheapest options cost {cheapest:.6g}, over the budget of {budget:.6g}")
    if sum(float(c.costs[-1]) for c in choices) <= budget:
        return Allocation([int(k[-1]) for k in kept], 0.0)
    # what a group costs and loses at the least is settled: the rest is what there is to choose, on a scale of its own
    room, scale = budget - cheapest, max(float(c.errors[0] - c.errors[-1]) for c in choices)
    if room <= ROUNDING * abs(budget):
        return Allocation([int(k[0]) for k in kept], 0.0)
    choices = [Options((c.costs - c.costs[0]) / room, (c.errors - c.errors[-1]) / scale) for c in choices]
    best, price = _by_price(choices)
    search = _Search(choices, price)
    most, reach = search.excess(best), TOLERANCE
    while True:
        found = search.within(min(reach, most))
        if found is not None or reach >= most:
            break
        reach *= 8
    if found is not None and search.excess(found) < most:
        best = found
    gap = min(search.excess(best), search.tolerance)
    return Allocation([int(k[p]) for k, p in zip(kept, best, strict=True)], gap * scale)


def _by_price(choices: list[Options]) -> tuple[list[int], float]:
    """A good choice, and the price of cost by which it is found: the lowest at which the best options fit."""

    def cheapest_worth(price: float) -> list[int]:
        return [int((c.errors + price * c.costs).argmin()) for c in choices]

    def cost(at: list[int]) -> float:
        return sum(float(c.costs[p]) for c, p in zip(choices, at, strict=True))

    low, high = 0.0, 1.0
    while cost(cheapest_worth(high)) > 1.0 - ROUNDING:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(cheapest_worth(middle)) <= 1.0 - ROUNDING else (middle, high)
    at = cheapest_worth(high)
    room = 1.0 - ROUNDING - cost(at)
    for g, group in enumerate(choices):  # what is left over, group by group
        better = int(np.searchsorted(group.costs, group.costs[at[g]] + room, side="right")) - 1
        at[g], room = better, room - float(group.costs[better] - group.costs[at[g]])
    return at, high


class _Search:
    """All choices whose errors are within some reach of the bound that a price gives.

    The excess over the bound is the sum of what every option is above its group's best one, cost at its price
    included, and the price of the room that is left. ``tolerance``: how much better a choice in reach may be than the
    one that was found.
    """

    def __init__(self, choices: list[Options], price: float) -> None:
        self.choices, self.price = choices, price
        priced = [c.errors + price * c.costs for c in choices]
        self.above = [p - p.min() for p in priced]
        self.bound = sum(float(p.min()) for p in priced) - price * (1.0 - ROUNDING)
        self.tolerance = 0.0

    def excess(self, chosen: list[int]) -> float:
        """Of the errors of a choice over the bound; no choice within the budget has one under 0."""
        return sum(float(c.errors[p]) for c, p in zip(self.choices, chosen, strict=True)) - self.bound

    def within(self, reach: float) -> list[int] | None:
        """The best choice within ``reach``, or None; of partial ones of nearly the same error the cheapest stays."""
        count, merged = len(self.choices), TOLERANCE / len(self.choices)
        near = [np.flatnonzero(a <= reach + TOLERANCE) for a in self.above]
        order = sorted(range(count), key=lambda g: len(near[g]))
        costs = [self.choices[g].costs[near[g]] for g in order]
        least, most = (np.r_[np.cumsum([f(c) for c in costs[::-1]])[::-1][1:], 0.0] for f in (np.min, np.max))
        room, self.tolerance = 1.0 - ROUNDING, 0.0
        cost, above, trail = np.zeros(1), np.zeros(1), []
        for step, g in enumerate(order):
            wider = (cost[:, None] + costs[step]).ravel()
            higher = (above[:, None] + self.above[g][near[g]]).ravel()
            idle = np.maximum(room - wider - most[step], 0.0)  # what no choice of the others can use
            fits = (wider + least[step] <= room) & (higher + self.price * idle <= reach + self.tolerance)
            stay = np.flatnonzero(fits)
            stay = stay[np.argsort(wider[stay], kind="stable")]
            errors = higher[stay] - self.price * wider[stay]
            later = max(len(near[h]) for h in order[step:])
            while len(kept := _stairs(errors, merged)) > min(STATES, PRODUCTS // later):
                merged *= 2
            stay, self.tolerance = stay[kept], self.tolerance + merged
            if not len(stay):
                return None
            cost, above = wider[stay], higher[stay]
            trail.append(stay)
        position, chosen = int((above - self.price * cost).argmin()), [0] * count
        for g, stay in zip(reversed(order), reversed(trail), strict=True):
            position, option = divmod(int(stay[position]), len(near[g]))
            chosen[g] = int(near[g][option])
        return chosen


def _stairs(errors: np.ndarray, step: float) -> np.ndarray:
    """Positions, from the first on, of errors lower by ``step`` at least than all those kept before."""
    kept: list[int] = []
    lowest = np.inf
    candidates = np.flatnonzero(np.r_[True, errors[1:] < np.minimum.accumulate(errors)[:-1]][: len(errors)])
    for p in candidates.tolist():
        if errors[p] < lowest - step:
            lowest = errors[p]
            kept.append(p)
    return np.array(kept, dtype=int)

"""From scores to the units that stay: which are compared with each other, and how many go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..cost.meter import ClosedFormMeter, CostMeter
from ..criteria.scores import UnitScores
from ..errors import InvalidPlanError, ScoresError
from ..spec.architecture import Architecture
from ..spec.units import UnitSet, channels_per_unit, check_units, has_embedding_set, unit_sets
from .layer_plan import Indices
from .select import Ranking, best, keep_count, rounded
from .uniform import StockSizes

SCOPES = ("global", "local", "isomorphic", "uniform")


class MakesMeters(Protocol):
    """A latency table: it counts what a target of latency counts, seconds of architectures like ``reference``."""

    def meter(
        self, reference: Architecture, image_size: Any = None, *, allow_other_device: bool = False
    ) -> CostMeter: ...


class Selection:
    """Scores of the units that may go, in one order; arguments and errors as of :meth:`PruningPlan.from_scores`."""

    def __init__(
        self,
        source: Architecture,
        scores: Mapping[str, torch.Tensor],
        units: Sequence[str] | None,
        round_to: int,
        scope: str,
    ) -> None:
        if scope not in SCOPES:
            raise InvalidPlanError(f"scope is one of {', '.join(SCOPES)}, not {scope!r}")
        if type(round_to) is not int or round_to < 1:
            raise InvalidPlanError(f"round_to is a whole number of at least 1, got {round_to!r}")
        self.units = check_units(source, units)
        if "embedding" in self.units and not has_embedding_set(source):
            raise InvalidPlanError(
                "residual channels and the inputs of attention or MLP cannot be pruned together: leave embedding out "
                "of the units"
            )
        if not isinstance(scores, UnitScores):
            scores = UnitScores(source, scores)
        if not scores.architecture.fits(source):
            raise ScoresError(
                f"the scores are of another architecture ({scores.architecture.model_type} of "
                f"{len(scores.architecture.layers)} layers) than the model ({source.model_type} of "
                f"{len(source.layers)} layers): score this model"
            )
        self.source, self.scope, self.round_to = source, scope, round_to
        self.sets = {name: one for name, one in unit_sets(source).items() if one.unit in self.units}
        missing = [name for name in self.sets if name not in scores]
        if missing:
            raise ScoresError(f"there are no scores of {', '.join(missing)}: leave them out of units, or score them")
        self.stock = StockSizes(source, self.units, round_to) if scope == "uniform" else None
        self._parts = {part: (one, where, scores[one.name][where]) for part, one, where in self._split()}
        self.ranking = Ranking(self._keys())

    def _split(self) -> list[tuple[str, UnitSet, slice]]:
        """(name, set, places in it) of what must not come down to nothing: layers stage by stage, other sets whole."""
        parts = []
        for name, one in self.sets.items():
            if one.unit == "layers" and self.source.depths is not None:
                ends = torch.tensor(self.source.depths).cumsum(0).tolist()
                for stage, (end, depth) in enumerate(zip(ends, self.source.depths, strict=True)):
                    if depth:
                        parts.append((f"stage {stage} layers", one, slice(end - depth, end)))
            else:
                parts.append((name, one, slice(0, one.size)))
        return parts

    # ------------------------------------------------------------------ who is compared with whom
    def _keys(self) -> dict[str, torch.Tensor]:
        scores = {part: values.double() for part, (_, _, values) in self._parts.items()}
        if self.scope == "global":
            tiny = torch.finfo(torch.float64).tiny
            return {part: values / values.mean().clamp(min=tiny) for part, values in scores.items()}
        groups: dict[Any, list[str]] = {}
        for part, (one, _, _) in self._parts.items():
            like: Any = part  # compared with itself alone
            if self.scope == "isomorphic" and one.layer is not None:
                like = one.unit, self.source.stages[one.layer]
            groups.setdefault(like, []).append(part)
        keys: dict[str, torch.Tensor] = {}
        for members in groups.values():
            shares = _shares(torch.cat([scores[part] for part in members]))
            keys |= dict(zip(members, shares.split([len(scores[part]) for part in members]), strict=True))
        return {part: keys[part] for part in scores}

    # ------------------------------------------------------------------ what stays
    def at_ratio(self, ratio: float) -> dict[str, Indices]:
        """Without this share of the units; InvalidPlanError where that empties a set of which each loses the same."""
        if self.stock is not None:
            return self._uniform(self.stock, ratio)
        if self.scope != "local":
            return self.without(round(ratio * len(self.ranking)))
        counts = {
            part: keep_count(len(values), ratio, self._step(one), part)
            for part, (one, _, values) in self._parts.items()
        }
        return self._kept(counts)

    def without(self, dropped: int) -> dict[str, Indices]:
        """Without about this many units, in the order of the ranking; every set keeps some."""
        if self.stock is not None:
            return self._uniform(self.stock, dropped / len(self.ranking))
        kept = self.ranking.kept(dropped)
        return self._kept(
            {
                part: rounded(int(kept[part].sum()), len(values), self._step(one))
                for part, (one, _, values) in self._parts.items()
            }
        )

    def _uniform(self, stock: StockSizes, ratio: float) -> dict[str, Indices]:
        """Without this share of every set, or of what a stock class can hold next to it."""
        names = {"channels" if unit in ("qk", "v") else unit for unit in self.units}
        sizes = stock.nearest(dict.fromkeys(names, 1 - ratio))
        layers = max(1, round(len(self.source.layers) * (1 - ratio)))
        return self._kept(
            {
                part: layers
                if one.unit == "layers"
                else sizes.of(one.unit) // channels_per_unit(self.source, one.unit)
                for part, (one, _, _) in self._parts.items()
            }
        )

    def _step(self, one: UnitSet) -> int:
        if one.unit in ("heads", "layers"):
            return 1
        return max(1, self.round_to // channels_per_unit(self.source, one.unit))

    def _kept(self, counts: dict[str, int]) -> dict[str, Indices]:
        kept: dict[str, Indices] = {}
        for part, (one, where, values) in self._parts.items():
            units = tuple(where.start + unit for unit in best(values, counts[part]))
            kept[one.name] = kept.get(one.name, ()) + units
        return kept


def _shares(scores: torch.Tensor) -> torch.Tensor:
    """(units,) the share of the units that have gone when half of a unit has; of equal ones the last goes first."""
    order = torch.argsort(scores, descending=True, stable=True).flip(0)
    shares = torch.empty_like(scores)
    shares[order] = (torch.arange(len(scores), dtype=scores.dtype) + 0.5) / len(scores)
    return shares


def meter_of(
    source: Architecture, metric: str, image_size: Any, latency_table: MakesMeters | None, allow_other_device: bool
) -> CostMeter:
    """What a target counts; InvalidPlanError for an unknown metric, or a table too many or too few."""
    if metric not in ("macs", "params", "latency"):
        raise InvalidPlanError(f"target_metric is macs, params or latency, not {metric!r}")
    if (metric == "latency") != (latency_table is not None):
        raise InvalidPlanError(
            "target_metric='latency' and latency_table go together (LatencyTable.measure or LatencyTable.load give "
            f"one); got {metric!r} and {latency_table!r}"
        )
    if latency_table is None:
        return ClosedFormMeter(metric, source, image_size)
    make: Callable[..., CostMeter] | None = getattr(latency_table, "meter", None)
    if make is None:
        raise InvalidPlanError(f"latency_table is a LatencyTable (LatencyTable.load reads one), not {latency_table!r}")
    return make(source, image_size, allow_other_device=allow_other_device)

"""PruningPlan: which units of a model stay, by index, and the new weights that replace old ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import criteria
from ..errors import InvalidPlanError, VitPruneError
from ..spec.architecture import Architecture
from ..spec.units import check_units
from .from_scores import MakesMeters, Selection, meter_of
from .layer_plan import (
    PAD,
    Indices,
    LayerPlan,
    check_indices,
    check_layer,
    check_pairs,
    layer_from_dict,
    optional_whole_numbers,
)
from .select import check_ratio, check_share, plan_keeping, reach_target, say_if_far_under
from .uniform import check_stock

__all__ = ["PAD", "LayerPlan", "PruningPlan"]

PLAN_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """Which units of a model stay.

    Attributes:
        source: architecture of the model that the plan is for.
        layers: one entry a kept layer, bottom to top.
        embedding: kept residual channels, None for all.
        weights: new tensors for the small model, by its parameter names, in its shapes; they replace what slicing
            would give (a compensation step writes them).
        info: how the plan was made (method, settings); JSON only, shown in cards.
    """

    source: Architecture
    layers: tuple[LayerPlan, ...]
    embedding: Indices | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    info: dict[str, Any] = field(default_factory=dict, compare=False)

    # ------------------------------------------------------------------ making one
    @classmethod
    def dense(cls, model: Any, part: str | None = None) -> PruningPlan:
        """The plan that keeps all of a model (or Architecture): the start of every other one.

        ``part``, here and below: which tower of a bigger model (:func:`hf_vitprune.towers`); its only one by default.
        """
        source = Architecture.given(model, part)
        return cls(source, tuple(LayerPlan.dense(i, shape) for i, shape in enumerate(source.layers)))

    @classmethod
    def from_scores(
        cls,
        model: Any,
        scores: Mapping[str, torch.Tensor],
        target: float | None = None,
        target_metric: str = "macs",
        *,
        ratio: float | None = None,
        scope: str = "global",
        units: Sequence[str] | None = ("heads", "qk", "v", "mlp"),
        round_to: int = 8,
        image_size: int | tuple[int, int] | None = None,
        latency_table: MakesMeters | None = None,
        allow_other_device: bool = False,
        part: str | None = None,
    ) -> PruningPlan:
        """Keep the units with the highest scores: down to a cost, or all but a share of them.

        Args:
            model: the model to prune, or its Architecture.
            scores: of its units: what a function of :mod:`hf_vitprune.criteria` gives.
            target: fraction of the model's cost that may remain, in (0, 1); the weakest plan that gets there.
            target_metric: what ``target`` counts: ``macs``, ``params`` or ``latency``.
            ratio: share of the units to remove, in (0, 1), instead of ``target``.
            scope: which units are compared. ``local``: every set loses the same share. ``uniform``: so it does, with
                the sizes of every layer next to that share that a stock class can hold, so that the small model is a
                stock one, which loads without this library. ``isomorphic``: one ranking over the like sets of all
                layers (heads with heads), of which each loses the same share (Isomorphic Pruning, arXiv 2407.04616).
                ``global``: one ranking over all sets, scores divided by the mean of their set (Torch-Pruning's
                normalisation, arXiv 2301.12900).
            units: any of ``heads``, ``qk``, ``v``, ``mlp``, ``embedding``, ``layers``; None: the first five as far as
                the family has them.
            round_to: kept channels and neurons are a multiple of this (heads and layers are never rounded).
            image_size: side, or (height, width), in pixels at which cost is counted; the model's own by default.
            latency_table: a LatencyTable, for the metric ``latency``.
            allow_other_device: the table may be of another device than this machine's.

        Raises:
            InvalidPlanError: an impossible setting, or nothing would be removed.
            UnsupportedUnitError: the family has not got one of the units.
            ScoresError: the scores are of another architecture, or lack a set.
            UnreachableTargetError: the smallest sizes cost more than ``target``.
            LatencyTableError: the table is of another model, input or device.
        """
        source = Architecture.given(model, part)
        selection = Selection(source, scores, units, round_to, scope)
        info = {"method": f"{getattr(scores, 'criterion', 'own')} scores", "scope": scope, "round_to": round_to}

        def plan(kept: Mapping[str, Indices], **goal: Any) -> PruningPlan:
            return cls(source, *plan_keeping(source, kept), info={**info, **goal}).validated()

        if (target is None) == (ratio is None):
            raise InvalidPlanError("give either target (cost that stays) or ratio (share of units that goes)")
        if ratio is not None and (target_metric != "macs" or image_size or latency_table or allow_other_device):
            raise InvalidPlanError(
                "a ratio counts units: what settles cost (target_metric, image_size, ...) goes with target"
            )
        if target is not None:
            check_share("the target", target)
            meter = meter_of(source, target_metric, image_size, latency_table, allow_other_device)
            goal = {"target": target, "target_metric": target_metric}
            found = reach_target(lambda k: plan(selection.without(k), **goal), len(selection.ranking), target, meter)
            share = meter.ratio(found.architecture)
            say_if_far_under(share, target, target_metric, "Lower round_to, or leave out coarse units")
        else:
            found = plan(selection.at_ratio(check_ratio(ratio)), ratio=ratio)
            if found.removes_nothing:
                raise InvalidPlanError(
                    f"a ratio of {ratio} removes no unit of {', '.join(selection.units)} (round_to={round_to}): raise "
                    "the ratio or lower round_to"
                )
        if scope == "uniform":
            check_stock(found.architecture)
        return found

    @classmethod
    def random(
        cls,
        model: Any,
        ratio: float,
        units: Sequence[str] | None = None,
        round_to: int = 1,
        seed: int = 0,
        part: str | None = None,
        uniform: bool = False,
    ) -> PruningPlan:
        """Remove ``ratio`` of the units of every set, at random: the baseline of every method.

        :meth:`from_scores` of :func:`hf_vitprune.criteria.random`, ``scope="local"`` (``"uniform"`` if ``uniform``).
        """
        check_ratio(ratio)
        source = Architecture.given(model, part)
        scores = criteria.random(source, seed, check_units(source, units))
        scope = "uniform" if uniform else "local"
        return cls.from_scores(source, scores, ratio=ratio, scope=scope, units=units, round_to=round_to)

    @classmethod
    def magnitude(
        cls,
        model: Any,
        ratio: float,
        units: Sequence[str] | None = None,
        round_to: int = 1,
        part: str | None = None,
        uniform: bool = False,
    ) -> PruningPlan:
        """Remove the ``ratio`` of units with the smallest weights (L2 norm) from every set.

        :meth:`from_scores` of :func:`hf_vitprune.criteria.magnitude`, ``scope`` as in :meth:`random`.
        """
        check_ratio(ratio)
        scores = criteria.magnitude(model, part=part)
        scope = "uniform" if uniform else "local"
        return cls.from_scores(model, scores, ratio=ratio, scope=scope, units=units, round_to=round_to, part=part)

    # ------------------------------------------------------------------ what follows from it
    @property
    def part(self) -> str | None:
        """The tower of a bigger model that the plan is for; None: the whole model."""
        return self.source.part

    def of_part(self, part: str | None) -> PruningPlan:
        """The same plan for a tower of that part (None: for the tower by itself)."""
        return replace(self, source=replace(self.source, part=part))

    @property
    def architecture(self) -> Architecture:
        """The shape of the pruned model; InvalidArchitectureError where it is impossible."""
        source = self.source
        shapes = tuple(entry.shape(source.layers[entry.index]) for entry in self.layers)
        kept = [source.stages[entry.index] for entry in self.layers]
        depths = None if source.depths is None else tuple(map(kept.count, range(len(source.depths))))
        width = source.hidden_size if self.embedding is None else len(self.embedding)
        return replace(source, layers=shapes, hidden_size=width, depths=depths).validated()

    @property
    def removes_nothing(self) -> bool:
        return self.architecture == self.source

    def validated(self) -> PruningPlan:
        """Itself, when every index exists, no set is empty, and the shape is possible; else InvalidPlanError."""
        if not self.layers:
            raise InvalidPlanError("the plan keeps no layer")
        order = [entry.index for entry in self.layers]
        if (
            any(type(i) is not int for i in order)
            or order != sorted(set(order))
            or not 0 <= order[0] <= order[-1] < len(self.source.layers)
        ):
            raise InvalidPlanError(
                f"kept layers {order} are not an ascending part of 0..{len(self.source.layers) - 1}"
            )
        if len(self.layers) < len(self.source.layers):
            check_units(self.source, ["layers"])
        if self.embedding is not None:
            check_units(self.source, ["embedding"])
            check_indices("embedding", self.embedding, self.source.hidden_size)
            if list(self.embedding) != sorted(self.embedding):
                raise InvalidPlanError("embedding: kept residual channels are given in ascending order")
        for entry in self.layers:
            check_layer(entry, self.source.layers[entry.index], self.source.width(entry.index), self.embedding is None)
            if self.source.family.qk_pairs:
                check_pairs(entry, self.source.layers[entry.index])
        self.architecture  # noqa: B018  raises when the shape is impossible
        return self

    def keep_layers(self, layers: Iterable[int]) -> PruningPlan:
        """Keep only these layers (positions in the source model)."""
        chosen = set(layers)
        foreign = chosen - set(range(len(self.source.layers)))
        if foreign:
            raise InvalidPlanError(
                f"the model has layers 0..{len(self.source.layers) - 1}, not {sorted(foreign, key=str)}"
            )
        return replace(self, layers=tuple(e for e in self.layers if e.index in chosen))

    def with_layers(self, layers: Iterable[LayerPlan]) -> PruningPlan:
        return replace(self, layers=tuple(layers))

    def summary(self) -> dict[str, float]:
        """Share of units that stays, by unit, over all layers of the source."""
        entries = {entry.index: entry for entry in self.layers}
        gone = LayerPlan(-1, "none", (), (), (), ())
        kept: Counter[str] = Counter()
        full: Counter[str] = Counter()
        for i, shape in enumerate(self.source.layers):
            entry = entries.get(i, gone)
            qk, v = sum(map(len, entry.qk)), sum(map(len, entry.v))
            kept.update(layers=int(i in entries), heads=len(entry.heads), qk=qk, v=v, mlp=len(entry.mlp))
            qk, v = shape.heads * shape.qk_dim, shape.heads * shape.v_dim
            full.update(layers=1, heads=shape.heads, qk=qk, v=v, mlp=shape.mlp)
        full["embedding"] = self.source.hidden_size
        kept["embedding"] = full["embedding"] if self.embedding is None else len(self.embedding)
        return {unit: kept[unit] / size for unit, size in full.items() if size}

    # ------------------------------------------------------------------ JSON
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; new weights become nested lists (``save`` keeps them in a safetensors file instead)."""
        record = self._record()
        record["weights"] = {
            name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "data": t.flatten().tolist()}
            for name, t in self.weights.items()
        }
        return record

    def _record(self) -> dict[str, Any]:
        layers = []
        for entry in self.layers:
            row = {k: v for k, v in asdict(entry).items() if v not in (None, {})}
            for name in ("qk", "v"):
                rows = row[name]
                row[name] = list(rows[0]) if len(set(rows)) == 1 else [list(r) for r in rows]
            layers.append(row)
        embedding = list(self.embedding) if self.embedding is not None else None
        record = {"version": PLAN_VERSION, "source": self.source.to_dict(), "layers": layers}
        return {**record, "embedding": embedding, "info": self.info}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_dict`; InvalidPlanError where something is missing, unknown or impossible."""
        if not isinstance(record, dict) or record.get("version") != PLAN_VERSION:
            version = record.get("version") if isinstance(record, dict) else record
            raise InvalidPlanError(f"not a plan of format version {PLAN_VERSION}: {version!r}")
        known = set(LayerPlan.__dataclass_fields__)
        try:
            layers = []
            for row in record["layers"]:
                if set(row) - known:
                    raise InvalidPlanError(f"unknown fields {sorted(set(row) - known)} in a layer of the plan")
                layers.append(layer_from_dict(row))
            weights = {
                name: torch.tensor(t["data"], dtype=getattr(torch, t["dtype"])).reshape(t["shape"])
                for name, t in record.get("weights", {}).items()
            }
            embedding = optional_whole_numbers(record.get("embedding"))
            source, info = Architecture.from_dict(record["source"]), dict(record.get("info", {}))
            plan = cls(source, tuple(layers), embedding, weights, info)
        except VitPruneError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidPlanError(f"damaged plan: {error!r}") from error
        return plan.validated()

    def save(self, path: str | Path) -> None:
        """Write JSON; new weights, if any, go to a safetensors file of the same name beside it."""
        path = Path(path)
        if path.suffix == ".safetensors":
            raise InvalidPlanError(f"a plan is JSON, and its new weights get {path.name}: save it as {path.stem}.json")
        record = self._record()
        if self.weights:
            record["weights_file"] = path.with_suffix(".safetensors").name
            save_file({k: t.contiguous() for k, t in self.weights.items()}, path.with_suffix(".safetensors"))
        path.write_text(json.dumps(record))

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read what :meth:`save` wrote; InvalidPlanError where the file is no plan."""
        path = Path(path)
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise InvalidPlanError(f"{path} is not JSON: {error}") from error
        plan = cls.from_dict(record)
        if "weights_file" not in record:
            return plan
        try:
            return replace(plan, weights=load_file(path.with_name(record["weights_file"])))
        except (SafetensorError, TypeError, ValueError, AttributeError) as error:
            raise InvalidPlanError(
                f"the weights of {path} ({record['weights_file']!r}) are damaged: {error}"
            ) from error


def check_plan(plan: Any) -> None:
    """Refuse what is no plan, naming what makes one of it (InvalidPlanError)."""
    if not isinstance(plan, PruningPlan):
        cures = {
            dict: "PruningPlan.from_dict",
            str: "PruningPlan.load",
            Path: "PruningPlan.load",
            criteria.UnitScores: "PruningPlan.from_scores",
        }
        cure = next((f": {cure} makes one of it" for kind, cure in cures.items() if isinstance(plan, kind)), "")
        raise InvalidPlanError(f"plan is a PruningPlan, not a {type(plan).__name__}{cure}")

"""PruningPlan: which units of a model stay, by index, and the new weights that replace old ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..errors import InvalidPlanError, UnsupportedUnitError, VitPruneError
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from .layer_plan import PAD, Indices, LayerPlan, check_indices, layer_from_dict, optional_whole_numbers
from .select import Scores, check_units, cut_every_set, l2_scores

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
    def dense(cls, model: Any) -> PruningPlan:
        """The plan that keeps everything: the start of every other one. ``model``: a model or an Architecture."""
        source = model if isinstance(model, Architecture) else Architecture.of(model)
        return cls(source, tuple(LayerPlan.dense(i, shape) for i, shape in enumerate(source.layers)))

    @classmethod
    def random(
        cls,
        model: Any,
        ratio: float,
        units: Sequence[str] | None = None,
        round_to: int = 1,
        seed: int = 0,
    ) -> PruningPlan:
        """Remove ``ratio`` of the units of every set, at random: the baseline of every method.

        Args:
            model: the model to prune, or its Architecture.
            ratio: share of units removed from every set, in (0, 1).
            units: any of ``heads``, ``qk``, ``v``, ``mlp``, ``embedding``, ``layers``; by default the first five
                as far as the family has them.
            round_to: kept channels and neurons are a multiple of this (heads and layers are never rounded).
            seed: of the draw.

        Raises:
            InvalidPlanError: a ratio outside (0, 1), that empties a set, or that removes nothing.
            UnsupportedUnitError: the family has not got one of the units.
        """
        generator = torch.Generator().manual_seed(seed)
        return cls._cut(model, ratio, units, round_to, lambda name, count: torch.rand(count, generator=generator))

    @classmethod
    def magnitude(cls, model: Any, ratio: float, units: Sequence[str] | None = None, round_to: int = 1) -> PruningPlan:
        """Remove the ``ratio`` of units with the smallest weights (L2 norm) from every set; see :meth:`random`."""
        return cls._cut(model, ratio, units, round_to, l2_scores(model))

    @classmethod
    def _cut(cls, model: Any, ratio: float, units: Sequence[str] | None, round_to: int, scores: Scores) -> PruningPlan:
        source = model if isinstance(model, Architecture) else Architecture.of(model)
        plan = cls(source, *cut_every_set(source, ratio, units, round_to, scores)).validated()
        if plan.removes_nothing:
            raise InvalidPlanError(
                f"a ratio of {ratio} removes no unit of {', '.join(check_units(source, units))} "
                f"(round_to={round_to}): raise the ratio or lower round_to"
            )
        return plan

    # ------------------------------------------------------------------ what follows from it
    @property
    def architecture(self) -> Architecture:
        """The shape of the pruned model.

        Raises:
            InvalidArchitectureError: the plan leaves an impossible shape.
        """
        source = self.source
        shapes = tuple(entry.shape(source.layers[entry.index]) for entry in self.layers)
        depths = None
        if source.depths is not None:
            stages = source.stages
            kept = [stages[entry.index] for entry in self.layers]
            depths = tuple(kept.count(s) for s in range(len(source.depths)))
        width = source.hidden_size if self.embedding is None else len(self.embedding)
        return replace(source, layers=shapes, hidden_size=width, depths=depths).validated()

    @property
    def removes_nothing(self) -> bool:
        return self.architecture == self.source

    def validated(self) -> PruningPlan:
        """Itself, when every index exists, no set is empty, and the shape is possible.

        Raises:
            InvalidPlanError: naming the layer and the set.
        """
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
        if self.embedding is not None:
            if "embedding" not in self.source.family.units:
                raise UnsupportedUnitError(f"{self.source.model_type} has no prunable embedding")
            check_indices("embedding", self.embedding, self.source.hidden_size)
            if list(self.embedding) != sorted(self.embedding):
                raise InvalidPlanError("embedding: kept residual channels are given in ascending order")
        for entry in self.layers:
            self._check_layer(entry, self.source.layers[entry.index])
        self.architecture  # noqa: B018  raises when the shape is impossible
        return self

    def _check_layer(self, entry: LayerPlan, source: LayerShape) -> None:
        where = f"layer {entry.index}"
        if entry.replaces_mixer(source) and (entry.mixer == "attention" or source.mixer == "none"):
            raise InvalidPlanError(f"{where}: mixer {entry.mixer!r} cannot be made from {source.mixer!r}")
        if entry.mixer not in ("attention", "none") and (
            entry.heads or entry.qk or entry.v or entry.attention_in is not None
        ):
            raise InvalidPlanError(
                f"{where}: a layer whose mixer is {entry.mixer!r} keeps no heads, channels of heads or inputs"
            )
        if entry.mixer == "attention":
            check_indices(f"{where}: heads", entry.heads, source.heads)
            for name, rows, size in (("qk", entry.qk, source.qk_dim), ("v", entry.v, source.v_dim)):
                if len(rows) != len(entry.heads) or len({len(row) for row in rows}) != 1:
                    raise InvalidPlanError(f"{where}: {name} needs one list of one length for each kept head")
                for row in rows:
                    check_indices(
                        f"{where}: {name}", tuple(c for c in row if c != PAD), size, may_be_empty=len(row) > 0
                    )
        if entry.mlp:
            check_indices(f"{where}: mlp", entry.mlp, source.mlp)
        width = self.source.width(entry.index)
        for name in ("attention_in", "mlp_in"):
            kept = getattr(entry, name)
            if kept is not None:
                check_indices(f"{where}: {name}", kept, getattr(source, name) or width)
        if self.embedding is not None and (
            entry.attention_in is not None or entry.mlp_in is not None or source.attention_in or source.mlp_in
        ):
            raise InvalidPlanError(
                f"{where}: residual channels and the inputs of attention or MLP cannot be pruned together; "
                "prune one, then the other"
            )
        lengths = {
            "attention_in": len(entry.attention_in)
            if entry.attention_in is not None
            else source.attention_in or width,
            "mlp_in": len(entry.mlp_in) if entry.mlp_in is not None else source.mlp_in or width,
            "v": sum(map(len, entry.v)),
            "mlp": len(entry.mlp),
        }
        for name, scale in entry.scales.items():
            if any(not isinstance(factor, (int, float)) or not math.isfinite(factor) for factor in scale):
                raise InvalidPlanError(f"{where}: scales of {name!r} are finite numbers")
            if lengths.get(name) != len(scale):
                raise InvalidPlanError(f"{where}: {len(scale)} scales for {lengths.get(name)} units of {name!r}")

    def keep_layers(self, layers: Iterable[int]) -> PruningPlan:
        """Keep only these layers (positions in the source model)."""
        chosen = set(layers)
        return replace(self, layers=tuple(e for e in self.layers if e.index in chosen))

    def with_layers(self, layers: Iterable[LayerPlan]) -> PruningPlan:
        return replace(self, layers=tuple(layers))

    def summary(self) -> dict[str, float]:
        """Share of units that stays, by unit, over all layers of the source."""
        totals: dict[str, list[int]] = {}

        def add(unit: str, kept: int, full: int) -> None:
            row = totals.setdefault(unit, [0, 0])
            row[0] += kept
            row[1] += full

        plans = {entry.index: entry for entry in self.layers}
        for i, shape in enumerate(self.source.layers):
            entry = plans.get(i)
            add("layers", int(entry is not None), 1)
            add("heads", len(entry.heads) if entry else 0, shape.heads)
            add("qk", sum(map(len, entry.qk)) if entry else 0, shape.heads * shape.qk_dim)
            add("v", sum(map(len, entry.v)) if entry else 0, shape.heads * shape.v_dim)
            add("mlp", len(entry.mlp) if entry else 0, shape.mlp)
        add(
            "embedding",
            self.source.hidden_size if self.embedding is None else len(self.embedding),
            self.source.hidden_size,
        )
        return {unit: kept / full for unit, (kept, full) in totals.items() if full}

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
        return {
            "version": PLAN_VERSION,
            "source": self.source.to_dict(),
            "layers": layers,
            "embedding": embedding,
            "info": self.info,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> PruningPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            InvalidPlanError: something is missing, unknown or impossible.
        """
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
            embedding = record.get("embedding")
            plan = cls(
                Architecture.from_dict(record["source"]),
                tuple(layers),
                optional_whole_numbers(embedding),
                weights,
                dict(record.get("info", {})),
            )
        except VitPruneError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidPlanError(f"damaged plan: {error!r}") from error
        return plan.validated()

    def save(self, path: str | Path) -> None:
        """Write JSON; new weights, if any, go to a safetensors file of the same name beside it."""
        path = Path(path)
        record = self._record()
        if self.weights:
            record["weights_file"] = path.with_suffix(".safetensors").name
            save_file({k: t.contiguous() for k, t in self.weights.items()}, path.with_suffix(".safetensors"))
        path.write_text(json.dumps(record))

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read what :meth:`save` wrote.

        Raises:
            InvalidPlanError: the file is not a plan.
        """
        path = Path(path)
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InvalidPlanError(f"{path} is not JSON: {error}") from error
        plan = cls.from_dict(record)
        if "weights_file" in record:
            plan = replace(plan, weights=load_file(path.with_name(record["weights_file"])))
        return plan

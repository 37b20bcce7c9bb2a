"""VTP: L1-trained scores at four points of every layer, one global threshold (arXiv 2104.08500, sections 3.2-3.3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ...errors import InvalidConfigError, InvalidPlanError, UnsupportedUnitError
from ...modeling.structure import layer_paths
from ...plan.layer_plan import PAD, LayerPlan
from ...plan.plan import PruningPlan
from ...plan.select import Ranking, best, reach_target, rounded
from ...plan.uniform import Sizes, StockSizes
from ...surgery.gates import Gate
from ...surgery.points import POINTS, attach, point_name, point_sizes
from ...utils.batches import ImageBatches
from ..contract import PruningMethod
from .config import VTPConfig

_Sets = dict[str, torch.Tensor]
#: points on the way from nothing removed to all
PATH = 64


class VTP(PruningMethod):
    """Scores, decision and folding of VTP."""

    config: VTPConfig

    def __init__(self, config: VTPConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        if "attention_out" in config.points and "v" not in self.architecture.units:
            raise UnsupportedUnitError(
                f"VTP removes v channels, which a {self.architecture.model_type} model cannot lose: leave "
                "'attention_out' out of points=(...)"
            )
        self.stock = self._stock_sizes() if config.uniform else None
        device = next(model.parameters()).device
        for i, paths in enumerate(layer_paths(model, self.architecture)):
            for point, size in point_sizes(self.architecture, i).items():
                if point in config.points and config.gates_layer(paths.layer):
                    self.gates[point_name(i, point)] = Gate(size, device)
        if not self.gates:
            raise InvalidConfigError(
                f"no layer path matches target_modules={config.target_modules!r} without matching "
                f"exclude_modules={config.exclude_modules!r}; paths look like {paths.layer!r}"
            )
        if config.target is not None:
            self.choose()  # an unreachable target says so before any training

    def _stock_sizes(self) -> StockSizes:
        if self.config.target_modules is not None or self.config.exclude_modules is not None:
            raise InvalidConfigError("uniform=True cuts every layer: leave target_modules and exclude_modules out")
        units = {"attention_out": "heads", "mlp_hidden": "mlp"}
        return StockSizes(self.architecture, [units[point] for point in self.config.points], self.config.round_to)

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        return attach(model, self.architecture, self.gates)

    # ------------------------------------------------------------------ training
    def before_step(self, model: Any, progress: float, gradient_scale: float) -> torch.Tensor | None:
        """lambda * sum |score| over all gates (equation 5), lambda growing over the warm-up."""
        warmup = self.config.sparsity_warmup
        weight = self.config.sparsity_weight * (min(1.0, progress / warmup) if warmup else 1.0)
        if self.decided or weight == 0:
            return None
        return weight * torch.cat([gate.score for gate in self._gates().values()]).abs().sum()

    def logs(self) -> dict[str, float]:
        scores = torch.cat([gate.factors().detach().abs() for gate in self._gates().values()])
        return {
            "gates_mean": scores.mean().item(),
            "gates_min": scores.min().item(),
            **self.ratios(self.choose().architecture),
        }

    def _gates(self) -> dict[str, Gate]:
        return {name: gate for name, gate in self.gates.items() if isinstance(gate, Gate)}

    def reference(self) -> PruningPlan:
        """All channels, each times its score: the model in training."""
        plan = PruningPlan.dense(self.architecture)
        return plan.with_layers(self._all_scores(entry) for entry in plan.layers)

    def _all_scores(self, entry: LayerPlan) -> LayerPlan:
        for place, unit in POINTS.items():
            name = point_name(entry.index, place)
            if name in self.gates:
                entry = self._with_scores(entry, unit, name, range(len(self._gates()[name].score)))
        return entry

    # ------------------------------------------------------------------ decision
    def choose(self, weights: PreTrainedModel | None = None) -> PruningPlan:
        """Rank |score| over the whole network and keep the highest (section 3.3)."""
        if self.decided:  # what was decided stays, however the scores went on
            scores = {name: gate.mask.double().cpu() for name, gate in self._gates().items()}
            plan = self._plan({name: mask > 0 for name, mask in scores.items()}, scores)
        else:
            scores = {name: gate.score.detach().abs().double().cpu() for name, gate in self._gates().items()}
            plan = self._plan_for_goal(scores)
        return replace(plan, info={**self.config.to_dict(), **plan.info})

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Set the masks to what :meth:`choose` says."""
        if not all(gate.score.isfinite().all() for gate in self._gates().values()):
            raise InvalidPlanError(
                "there are scores that are not finite: the training diverged; lower the learning rate"
            )
        scores = torch.cat([gate.score.detach() for gate in self._gates().values()])
        if not self.decided and bool((scores == scores[0]).all()):
            raise InvalidPlanError(
                "VTP has learned no scores yet, all are alike: train the PruningModel first, with PruningTrainer or "
                "PruningCallback. Without training, PruningPlan.magnitude(model, ...) is what there is"
            )
        kept = self.kept_at_points(self.choose())
        for name, gate in self._gates().items():
            gate.decide(kept[name].to(gate.mask.device), self.config.binarize)

    def _plan_for_goal(self, scores: _Sets) -> PruningPlan:
        config = self.config
        ranking = Ranking(scores)
        if config.pruning_ratio is not None:
            return self._plan(ranking.kept(round(len(ranking) * config.pruning_ratio)), scores)
        assert config.target is not None
        if self.stock is not None:
            return self._best_alike(scores, self.stock, config.target)
        return reach_target(
            lambda dropped: self._plan(ranking.kept(dropped), scores),
            len(ranking),
            config.target,
            config.meter(self.architecture),
        )

    def _plan(self, above: _Sets, scores: _Sets) -> PruningPlan:
        plan = PruningPlan.dense(self.architecture)
        if self.stock is not None:
            sizes = self.stock.nearest({"heads": _share(above, "attention_out"), "mlp": _share(above, "mlp_hidden")})
            return plan.with_layers(self._alike(entry, sizes, scores) for entry in plan.layers).validated()
        return plan.with_layers(self._layer(entry, above, scores) for entry in plan.layers).validated()

    def _best_alike(self, scores: _Sets, stock: StockSizes, target: float) -> PruningPlan:
        """Of the largest sizes within the target that all layers can have, those next to what the ranking keeps."""
        meter, dense, ranking = (
            self.config.meter(self.architecture),
            PruningPlan.dense(self.architecture),
            Ranking(scores),
        )
        path = []
        for step in range(PATH + 1):
            kept = ranking.kept(round(len(ranking) * step / PATH))
            path.append((_share(kept, "attention_out"), _share(kept, "mlp_hidden")))

        def nearness(sizes: Sizes) -> float:
            heads, neurons = sizes.heads / stock.whole.heads, sizes.mlp / stock.whole.mlp
            return -min(abs(heads - h) + abs(neurons - m) for h, m in path)

        def fits(sizes: Sizes) -> bool:
            shapes = (replace(shape, heads=sizes.heads, mlp=sizes.mlp) for shape in self.architecture.layers)
            return meter.ratio(replace(self.architecture, layers=tuple(shapes))) <= target

        sizes = stock.best(nearness, fits) or stock.smallest()
        plan = dense.with_layers(self._alike(entry, sizes, scores) for entry in dense.layers).validated()
        return reach_target(lambda strength: plan, 1, target, meter)

    def _alike(self, entry: LayerPlan, sizes: Sizes, scores: _Sets) -> LayerPlan:
        """The heads with the highest sums of scores, and the best neurons: as many as in every layer."""
        name = point_name(entry.index, "mlp_hidden")
        if name in scores:
            kept = best(scores[name], sizes.mlp)
            entry = self._scaled(replace(entry, mlp=kept), "mlp", name, kept)
        name = point_name(entry.index, "attention_out")
        if name in scores:
            v_dim = self.architecture.layers[entry.index].v_dim
            entry = entry.keep_heads(best(scores[name].view(-1, v_dim).sum(1), sizes.heads))
            flat = tuple(h * v_dim + c for h in entry.heads for c in range(v_dim))
            entry = self._scaled(entry, "v", name, flat)
        return entry

    def _layer(self, entry: LayerPlan, above: _Sets, scores: _Sets) -> LayerPlan:
        for point in ("attention_in", "mlp_in", "mlp_hidden"):
            name, target = point_name(entry.index, point), POINTS[point]
            if name in above:
                count = rounded(int(above[name].sum()), len(above[name]), self.config.round_to)
                kept = best(scores[name], count)
                dense_input = target != "mlp" and count == len(above[name])
                changes: dict[str, Any] = {target: None if dense_input else kept}
                entry = replace(entry, **changes)
                entry = self._scaled(entry, target, name, kept)
        name = point_name(entry.index, "attention_out")
        if name in above:
            entry = self._heads(entry, above[name], scores[name])
            rows = [h * self.architecture.layers[entry.index].v_dim for h in entry.heads]
            flat = tuple(PAD if c == PAD else r + c for r, row in zip(rows, entry.v, strict=True) for c in row)
            entry = self._scaled(entry, "v", name, flat)
        return entry

    def _heads(self, entry: LayerPlan, above: torch.Tensor, scores: torch.Tensor) -> LayerPlan:
        """Heads whose channels all fall under the threshold go; the rest share the layer's budget."""
        shape = self.architecture.layers[entry.index]
        kept = above.view(shape.heads, shape.v_dim)
        table = scores.view(shape.heads, shape.v_dim)
        heads = kept.any(1).nonzero().squeeze(1).tolist() or [int(table.sum(1).argmax())]
        counts = [int(kept[h].sum()) for h in heads]
        if self.config.uneven:
            width = rounded(max(counts), shape.v_dim, self.config.round_to, up=True)
            rows = [best(table[h], max(n, 1)) for h, n in zip(heads, counts, strict=True)]
            v = tuple(row + (PAD,) * (width - len(row)) for row in rows)
        else:
            width = rounded(round(sum(counts) / len(heads)), shape.v_dim, self.config.round_to)
            v = tuple(best(table[h], width) for h in heads)
        return replace(entry.keep_heads(heads), v=v)

    def _scaled(self, entry: LayerPlan, target: str, name: str, kept: tuple[int, ...]) -> LayerPlan:
        """Fold the kept scores: surgery multiplies them into the columns behind the gate."""
        if self.config.binarize:
            return entry
        return self._with_scores(entry, target, name, kept)

    def _with_scores(self, entry: LayerPlan, target: str, name: str, kept: Iterable[int]) -> LayerPlan:
        factors = self._gates()[name].score.detach().double().cpu().tolist()
        return replace(entry, scales={**entry.scales, target: tuple(0.0 if c == PAD else factors[c] for c in kept)})


def _share(kept: _Sets, point: str) -> float:
    """Of the channels of a point, over all layers; 1 where there are none."""
    there = [units for name, units in kept.items() if name.endswith(point)]
    return float(torch.cat(there).double().mean()) if there else 1.0

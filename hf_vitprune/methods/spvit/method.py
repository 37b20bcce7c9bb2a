"""SPViT: gates over mixers and neurons that learn with the weights (arXiv 2111.11802)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ...cost.closed_form import removed_macs
from ...errors import InvalidConfigError, InvalidPlanError, UnreachableTargetError, UnsupportedModelError
from ...families import LayerPaths
from ...modeling.structure import layer_paths
from ...plan.layer_plan import LayerPlan
from ...plan.plan import PruningPlan
from ...plan.select import reach_target
from ...spec.architecture import Architecture
from ...spec.layer_shape import KERNELS
from ...utils.batches import ImageBatches
from ...utils.processes import mean_statistics
from ..contract import PruningMethod, Stage, Traits
from .branches import Attention, OwnBranches, SharedBranches, checked_linear, refuse_zero
from .config import SPViTConfig
from .gates import INITIAL_SCORE, LEVELS, MixerGates, NeuronGates, SearchCost
from .hooks import GatedColumns, attach_mixers
from .mixing import MixerSearch, with_convolutions

logger = logging.get_logger(__name__)

#: a search counts as having met the target within this fraction of it; what it is over then goes from the MLPs
TOLERANCE = 0.02


class SPViT(PruningMethod):
    """Search, decision and convolutions of SPViT; ``searches``: what layers of attention may mix their tokens with."""

    config: SPViTConfig
    # a search may end in a model whose layers only change their kind
    traits = Traits(adapters="none", constant_gate_rate=True, may_keep_everything=True)

    def __init__(self, config: SPViTConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        family = self.architecture.family
        if not family.convolutions:
            raise UnsupportedModelError(
                f"SPViT turns attention into convolutions, and the grid of patches of {family.model_type} models is "
                "not known: set convolutions in their family"
            )
        # named as gates are, so without weight decay, which would draw the mixing tables towards equal shares
        self.branches_norm = nn.ModuleDict()
        self.branches = nn.ModuleDict()
        self._device = next(model.parameters()).device
        self._paths = layer_paths(model, self.architecture)
        self.searches: dict[int, MixerSearch] = {}
        self._columns: dict[int, GatedColumns] = {}
        for i, paths in enumerate(self._paths):
            self._add_layer(model, i, paths)
        if not self.gates:
            raise InvalidConfigError("no layer has attention or an MLP: there is nothing to search")
        mixers = {i: search.gates for i, search in self.searches.items()}
        neurons = {i: columns.gates for i, columns in self._columns.items()}
        self._meter = config.meter(self.architecture)
        self.cost = SearchCost(self.architecture, mixers, neurons, self._meter, config.gate_gradients)
        unit = 1e9 / self.cost.total
        self.target = config.target if config.target is not None else (config.target_gmacs or 0.0) * unit
        # the weight of a squared difference: in units of the whole model, or of 10^9 multiply-adds
        self._weight = config.cost_weight / (1.0 if config.target_gmacs is None else unit**2)
        if self.target >= 1:
            raise InvalidConfigError(
                f"target_gmacs={config.target_gmacs} is not under the {self.cost.total / 1e9:.3f} of the model"
            )
        if self.cost.lowest > self.target:
            raise UnreachableTargetError(
                f"a target of {self.target:.3f} of the {config.target_metric} cannot be reached: with every "
                f"mixer skipped and every MLP gone, {self.cost.lowest:.3f} remains. Raise the target"
            )
        self._step = self._steps = self._stable = 0
        self._anneal()
        self._levels = [-1] * len(self.searches)  # of the step before; sharded checkpoints want one size
        self._searched: PruningPlan | None = None

    def _add_layer(self, model: PreTrainedModel, i: int, paths: LayerPaths) -> None:
        config, shape = self.config, self.architecture.layers[i]
        if shape.mixer == "attention":
            attention = Attention.of(model, self.architecture, i, paths)
            special = self.architecture.family.extra_tokens_of(self.architecture.config)
            gates = MixerGates(self._device)
            branches = (SharedBranches if config.single_path else OwnBranches)(
                self.architecture, i, next(model.parameters())
            )
            self.searches[i] = MixerSearch(gates, branches, attention, special, config.gate_gradients)
            self.gates[f"layer{i}_mixer"] = gates
            (self.branches_norm if config.single_path else self.branches)[f"layer{i}"] = branches
        if shape.mlp:
            neurons = NeuronGates(shape.mlp, self._device, config.round_to)
            self.gates[f"layer{i}_neurons"] = neurons
            self._columns[i] = GatedColumns(checked_linear(model, paths.fc2), neurons)

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        handles: list[Any] = list(attach_mixers(model, self.architecture, self.searches, self._paths))
        return handles + [columns.attach() for columns in self._columns.values()]

    # ------------------------------------------------------------------ training
    def check_training(self, args: TrainingArguments, max_steps: int) -> None:
        """Refuse a search that is too short for any gate to turn over."""
        config = self.config
        rate = args.learning_rate if config.gate_learning_rate is None else config.gate_learning_rate
        bounded = str(getattr(args.optim, "value", args.optim)).startswith("adamw")
        if bounded and not self.decided and rate * max_steps < INITIAL_SCORE:
            raise InvalidConfigError(
                f"gates start at {INITIAL_SCORE} and AdamW moves them by about {rate:g} a step: in {max_steps} "
                f"steps none turns over. Raise gate_learning_rate (to {4 * INITIAL_SCORE / max_steps:.2g}, "
                "say), or train longer"
            )

    def check_sharded(self, how: str) -> None:
        refuse_zero(how)

    def before_step(self, model: Any, progress: float, gradient_scale: float) -> torch.Tensor | None:
        """lambda * (cost - target)^2, lambda growing over the warm-up."""
        if self.decided:
            return None
        warmup = self.config.cost_warmup
        weight = self._weight * (min(1.0, progress / warmup) if warmup else 1.0)
        return weight * (self.cost.expected() - self.target).square()

    def after_step(self, model: Any, step: int, max_steps: int) -> None:
        """Anneal, and see whether the architecture still changes."""
        if self.decided:
            return
        mean_statistics(self.modules())
        self._step, self._steps = step, max_steps
        self._anneal()
        levels = self._levels_now()
        self._stable = self._stable + 1 if self._met and levels == self._levels else 0
        self._levels = levels

    def _anneal(self) -> None:
        first, last = self.config.temperature, self.config.final_temperature
        progress = self._step / max(self._steps, 1)
        for gates in self.gates.values():
            gates.temperature = first if last is None else first * (last / first) ** progress  # type: ignore[assignment]

    def _cost_now(self) -> float:
        counts = [columns.gates.count() for columns in self._columns.values()]
        return self.cost.at(self._levels_now(), counts)

    @property
    def _met(self) -> bool:
        return abs(self._cost_now() - self.target) <= TOLERANCE * self.target

    @property
    def stage(self) -> Stage:
        if self.finished:
            return Stage.FINISHED
        return Stage.ON_TARGET if self.decided or self._met else Stage.REMOVING

    @property
    def finished(self) -> bool:
        """Whether the target is met and the architecture has been stable: the search need not go on."""
        patience = self.config.patience
        if patience is None:
            patience = max(1, self._steps // 20)
        ramped = self._step >= self.config.cost_warmup * self._steps
        return not self.decided and 0 < patience <= self._stable and ramped

    def logs(self) -> dict[str, float]:
        """Chance of every mixer gate, mean chance of every MLP's, and the cost.

        Once decided: the share of the multiply-adds that is gone from attention and from MLPs, and attention's part.
        """
        numbers = {}
        for i, search in self.searches.items():
            for kind, chance in zip(LEVELS[1:], search.gates.probabilities().tolist(), strict=True):
                numbers[f"gate_layer{i}_{kind}"] = chance
        for i, columns in self._columns.items():
            numbers[f"gate_layer{i}_mlp"] = columns.gates.probabilities().mean().item()
        now = self._shapes().architecture
        numbers |= {**self.ratios(now), "stable_steps": self._stable}
        if self.decided:
            mixers, mlps, part = removed_macs(now, self.config.image_size).values()
            numbers |= {"attention_removed": mixers, "mlp_removed": mlps, "attention_part_of_removed": part}
        return numbers

    # ------------------------------------------------------------------ decision
    undershoot = (
        "The search has switched gates off faster than the cost could call them back: lower gate_learning_rate or "
        "cost_weight, or train longer"
    )

    def against_target(self) -> tuple[float, float, str]:
        """As the parent's; of the paper's absolute targets, too."""
        return self._meter.ratio(self._shapes().architecture), self.target, self._meter.metric

    @property
    def decided(self) -> bool:
        return any(gates.decided for gates in self._all_gates())

    def choose(self, weights: PreTrainedModel | None = None) -> PruningPlan:
        """The architecture that the gates say now, with its convolutions made of the wrapped model's weights."""
        if weights is not None and not self.architecture.fits(Architecture.of(weights)):
            raise InvalidPlanError("the architecture was searched for a model of another shape")
        return with_convolutions(self._shapes(), self.searches, self._paths, weights)

    def reference(self) -> PruningPlan | str:
        """What the gates had come to in training, where the decision took more away to reach the target."""
        if self._searched is None or self._searched == self._shapes():
            return "SPViT has switched gates off while the model trained: it is without those units already"
        return with_convolutions(self._searched, self.searches, self._paths)

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Fix the gates at their likelier values.

        Where these cost more than the target, and ``enforce_target``, the least likely ones that are on go as well;
        within the tolerance of it, neurons only.
        """
        if self.decided:
            return
        scores = torch.cat([gates.score.detach() for gates in self._all_gates()])
        if not scores.isfinite().all():
            raise InvalidPlanError("there are gates that are not finite: the training diverged; lower its rates")
        if bool((scores == scores[0]).all()):
            raise InvalidPlanError("SPViT has not searched yet, all gates are alike: train the PruningModel first")
        self._searched = self._shapes()
        plan = self._plan_for_goal(scores)
        for entry in plan.layers:
            i = entry.index
            if i in self.searches:
                self.searches[i].gates.decide_level(LEVELS.index(entry.mixer))
            if i in self._columns:
                gates = self._columns[i].gates
                gates.decide(torch.isin(torch.arange(len(gates.kept)), torch.tensor(entry.mlp, dtype=torch.long)))

    def _plan_for_goal(self, scores: torch.Tensor) -> PruningPlan:
        """What the gates say, or with the lowest threshold of scores under which the cost is the target's."""
        plan = self._shapes()
        found = self._meter.ratio(plan.architecture)
        if found <= self.target or not self.config.enforce_target:
            return plan
        close = found <= self.target * (1 + TOLERANCE)
        if not close:
            logger.warning(
                f"the search ended at {found:.3f} of the {self._meter.metric}, over the target of {self.target:.3f}: "
                "the gates least likely to be on go at once. A longer search, a higher gate_learning_rate or "
                "cost_weight comes closer by itself; enforce_target=False takes the architecture as it was found"
            )
        elif self.cost.at(self._levels_now(), [0] * len(self._columns)) > self.target:
            close = False
        # a search that is as good as there gives some neurons, and keeps its mixers
        if close:
            scores = torch.cat([columns.gates.score.detach() for columns in self._columns.values()])
        thresholds = [0.0, *scores[scores > 0].unique().tolist()]
        return reach_target(
            lambda strength: self._shapes(thresholds[strength], 0.0 if close else thresholds[strength]),
            len(thresholds) - 1,
            self.target,
            self._meter,
        )

    def _levels_now(self) -> list[int]:
        return [search.gates.level() for search in self.searches.values()]

    def _shapes(self, neurons: float = 0.0, mixers: float = 0.0) -> PruningPlan:
        """The plan without the weights of its convolutions, of the gates over these thresholds."""
        plan = replace(PruningPlan.dense(self.architecture), info=self.config.to_dict())
        return plan.with_layers(self._layer(entry, neurons, mixers) for entry in plan.layers)

    def _layer(self, entry: LayerPlan, neurons: float, mixers: float) -> LayerPlan:
        i = entry.index
        if i in self._columns:
            on = self._columns[i].gates.on(neurons)
            entry = replace(entry, mlp=tuple(on.nonzero().squeeze(1).tolist()))
            if not entry.mlp:
                entry = replace(entry, mlp_in=None)
        if i in self.searches:
            kind = LEVELS[self.searches[i].gates.level(mixers)]
            if kind != "attention":
                channels = self.architecture.layers[i].v_dim if kind in KERNELS else None
                entry = entry.with_mixer(kind, channels)
        return entry

    def _all_gates(self) -> Iterator[Any]:
        yield from self.gates.values()

    # ------------------------------------------------------------------ checkpoints
    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self._step, self._steps, self._stable, *self._levels])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self._step, self._steps, self._stable, *self._levels = state.tolist()
        self._anneal()

"""NViT: groups of all kinds in one ranking, removed a few at a time while the model trains (arXiv 2110.04869)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ...errors import InvalidConfigError, MissingGradientsError, UnreachableTargetError
from ...losses.distillation import DistillationConfig
from ...modeling.peft_twin import is_peft
from ...plan.plan import PruningPlan
from ...surgery.gates import UnitMask
from ...surgery.points import attach, make_masks
from ...utils.batches import ImageBatches
from ...utils.processes import broadcast, is_first_process
from ..contract import PruningMethod, Stage, Traits
from .config import NViTConfig, Schedule
from .groups import Moment, Removal, Sizes, Trajectory, fewest_groups, grouped_sets, plan_of, removals, smallest_ratio
from .masking import ZeroedWeights
from .scores import ActivationSums, RunningScores, WeightSums, divisors, magnitudes, random_scores
from .snapshots import save_run, save_snapshot

logger = logging.get_logger(__name__)


class NViT(PruningMethod):
    """Scores, ranking, masks and trajectory of NViT.

    Attributes:
        groups: removed so far.
        ratio: cost of what is left, as a fraction of the unpruned model's.
    """

    config: NViTConfig
    divisors: torch.Tensor
    distillation = DistillationConfig(kind="kl", weight=100.0, temperature=3.0)
    traits = Traits(decides_by="gradients", zeroes_weights=True, distillation=distillation)

    def __init__(self, config: NViTConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        device = next(model.parameters()).device
        self.sets = grouped_sets(self.architecture, config)
        self.trajectory = Trajectory(self.sets, device)
        if config.criterion not in ("squared_taylor", "taylor"):
            self.traits = replace(self.traits, decides_by="steps")
        self.scores = RunningScores(len(self.trajectory.order), config.momentum, config.reference, device)
        self.masks = make_masks(self.architecture, self.sets[0].layer is None, device)
        parts = divisors(self.architecture, self.sets, config.reference)
        self.register_buffer("divisors", parts.to(device), persistent=False)
        self._meter = config.meter(self.architecture)
        self._sums: WeightSums | ActivationSums | None = None
        self._zeroed: ZeroedWeights | None = None
        self._decided = False
        self._step = 0
        self._logged = 0
        self._trained_without: int | None = None
        assert config.target is not None
        self.target = config.target
        lowest = smallest_ratio(self.architecture, self.sets, self._meter)
        if lowest > self.target:
            raise UnreachableTargetError(
                f"a target of {self.target:.3f} of the {self._meter.metric} cannot be reached: with one group left of "
                f"every set, {lowest:.3f} remains. Raise the target, or lower group_sizes"
            )
        self.refresh()
        self.register_load_state_dict_post_hook(lambda method, _: method.refresh())

    @property
    def narrows(self) -> bool:
        return self.sets[0].layer is None

    def at_full_width(self) -> NViTConfig | None:
        if self.config.units is not None:
            return None
        return replace(self.config, units=tuple(dict.fromkeys(one.unit for one in self.sets if one.layer is not None)))

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        handles = attach(model, self.architecture, self.masks)
        if self.traits.decides_by == "gradients":
            self._sums = WeightSums(model, self.architecture, self.sets)
            if not self._sums.trained:
                self._sums = ActivationSums(model, self.architecture, self.sets)
                handles += self._sums.attach(model)
        return handles

    # ------------------------------------------------------------------ training
    def check_training(self, args: TrainingArguments, max_steps: int) -> None:
        """Refuse a training in which the schedule cannot reach the target."""
        if self.decided or self.reached:
            return
        if isinstance(self._sums, ActivationSums) and args.fp16:
            raise InvalidConfigError(
                "NViT scores frozen weights by the gradients of activations, which fp16 scales by a factor that only "
                "the optimizer undoes: train in bf16=True or full precision, or merge the adapters first"
            )
        schedule = Schedule.of(self.config, max_steps)
        if schedule.groups is None:
            return
        most = schedule.cumulative(schedule.count)
        fewest = fewest_groups(self.architecture, self.sets, self._meter, self.target)
        if most < fewest:
            raise InvalidConfigError(
                f"the schedule removes {most} groups in {max_steps} steps, and the target of {self.target:.3f} takes "
                f"{fewest} at the least: train longer, lower interval, raise groups_per_step, or leave it out (then "
                "as many groups go at a time as it takes)"
            )

    def check_sharded(self, how: str) -> None:
        if how in ("zero1", "zero2"):
            return
        if self.config.criterion == "magnitude":
            raise InvalidConfigError(
                "criterion='magnitude' reads whole weights, and these are sharded: use another one"
            )
        if self.config.snapshots:
            raise InvalidConfigError("snapshots save whole models on the way, and this one is sharded: leave them out")

    def before_step(self, model: Any, progress: float, gradient_scale: float) -> None:
        """Take in the Taylor sums of an update."""
        if self._sums is None or self.decided or self.reached:
            return
        sums = self._sums.take(gradient_scale)
        sums = sums / self.divisors.to(sums.dtype)
        self.scores.add(sums.square() if self.config.criterion == "squared_taylor" else sums.abs())

    def after_step(self, model: Any, step: int, max_steps: int) -> None:
        """Remove groups where the schedule says so, and keep removed weights at zero."""
        self._step = step
        if not self.decided and not self.reached:
            schedule = Schedule.of(self.config, max_steps)
            number = schedule.prune_step(step)
            if number:
                self._prune(model, schedule, number)
        if self.groups and not is_peft(model):  # weights under adapters are not this training's
            if self._zeroed is None:
                self._zeroed = ZeroedWeights(model, self.choose())
            self._zeroed.apply()

    def _prune(self, model: Any, schedule: Schedule, number: int) -> None:
        order = self._to_target(model)
        listed = list(order) if schedule.groups is None else []
        due = schedule.due(number, self.groups, len(listed))
        self._remove(model, itertools.islice(listed or order, max(0, due)))
        self.scores.roll()
        self._settle()

    def logs(self) -> dict[str, float]:
        ratios = self.ratios(self.choose().architecture)
        counts = self.trajectory.counts(self._logged), self.trajectory.counts()
        self._logged = self.groups
        taken = {  # units that have gone since the row before
            f"taken_{one.name.replace('layer ', 'layer').replace(' ', '_')}": before - left
            for one, before, left in zip(self.sets, *counts, strict=True)
            if before > left
        }
        return {"groups_removed": self.groups, "scores_not_finite": int(self.scores.spoiled), **ratios, **taken}

    # ------------------------------------------------------------------ removing groups
    def current_scores(self, model: Any) -> torch.Tensor:
        """(units,) importance by which groups are ranked now, on the CPU."""
        if self.config.criterion == "random":
            return random_scores(self.sets, self.config.seed)
        if self.config.criterion == "magnitude":
            return magnitudes(model, self.sets, self.trajectory.alive())
        if self.scores.empty:
            raise MissingGradientsError(
                "no gradients were scored yet: train the PruningModel first, with PruningTrainer or PruningCallback; "
                "without training, criterion='magnitude' is what there is"
            )
        return self.scores.current().cpu()

    def _to_target(self, model: Any) -> Iterator[Removal]:
        """Removals up to the first that reaches the target."""
        sizes = self._sizes()
        if sizes.ratio <= self.target:
            return
        for removal in removals(sizes, self.trajectory.alive(), self.current_scores(model), self.config.eta):
            yield removal
            if removal.ratio <= self.target:
                return
        raise UnreachableTargetError(
            f"every set is down to one group at {sizes.ratio:.3f} of the {self._meter.metric}, over the target of "
            f"{self.target:.3f}: raise the target, or lower group_sizes"
        )

    def _remove(self, model: Any, order: Iterable[Removal]) -> None:
        """Note removals, and save the model where it passes a budget that was asked for."""
        before = self.ratio
        for removal in order:
            self.trajectory.add([removal], self._step)
            passed = [budget for budget in self.config.snapshots if removal.ratio <= budget < before]
            before = removal.ratio
            for budget in passed if is_first_process() else ():
                assert self.config.snapshot_folder is not None
                save_snapshot(model, self.choose(), self.config.snapshot_folder, budget)

    def _settle(self) -> None:
        """Every process takes the first one's state; masks follow."""
        broadcast(self)
        self.refresh()

    def _sizes(self) -> Sizes:
        return Sizes(self.architecture, self.sets, self.trajectory.counts(), self._meter)

    def refresh(self) -> None:
        """Make masks, cost and counts follow the trajectory."""
        self.groups = self.trajectory.groups
        self.ratio = self._sizes().ratio
        kept = self.kept_at_points(self.choose())
        for name, mask in self.masks.items():
            assert isinstance(mask, UnitMask)
            mask.set(kept[name])
        self._zeroed = None

    # ------------------------------------------------------------------ decision
    undershoot = "A group is more than was missing: lower group_sizes"

    @property
    def decided(self) -> bool:
        return self._decided

    @property
    def stage(self) -> Stage:
        if self.reached:
            return Stage.ON_TARGET
        return Stage.REMOVING if self.groups else Stage.WHOLE

    @property
    def reached(self) -> bool:
        """Whether the target is reached."""
        return self.ratio <= self.target

    def decide(self, model: Any, images: ImageBatches | None = None) -> None:
        """Remove what is still missing to the target, all at once: nothing after a training of the planned length."""
        if not self.decided:
            missing = list(self._to_target(model))
            if missing and self._step:
                logger.warning(
                    f"the training ended at {self.ratio:.3f} of the {self._meter.metric}: {len(missing)} groups, "
                    f"beside {self.groups} so far, go at once to reach {self.target:.3f}. A longer training removes "
                    "them one by one"
                )
            self._trained_without = self.groups
            self._remove(model, missing)
            self._decided = True
            self._settle()
            if self.config.snapshot_folder is not None and is_first_process():
                save_run(self.trajectory, self.moments(), self.config.snapshot_folder)

    def choose(self, weights: PreTrainedModel | None = None) -> PruningPlan:
        """The plan of the current masks."""
        return self._plan(self.trajectory.groups)

    def reference(self) -> PruningPlan | str:
        """The model with the masks of the training, where the decision removed more groups after it."""
        if self._trained_without in (None, self.groups):
            return "NViT removed all groups in the training and has tuned what stays: their weights are zero by now"
        return self._plan(self._trained_without)

    def moments(self) -> list[Moment]:
        """Cost after every removal so far, and the step of it: the run's trajectory."""
        return self.trajectory.moments(self.architecture, self._meter)

    def plan_at(self, target: float) -> PruningPlan:
        """The plan of the moment when the cost first was at most ``target``; weights of that moment are in a snapshot.

        Raises:
            UnreachableTargetError: the run has not come down to it.
        """
        moments = self.moments()
        if moments[-1].ratio > target:
            raise UnreachableTargetError(
                f"the run is at {moments[-1].ratio:.3f} of the {self._meter.metric}, over the target of {target:.3f}"
            )
        return self._plan(next(moment.groups for moment in moments if moment.ratio <= target))

    def _plan(self, groups: int) -> PruningPlan:
        plan = plan_of(self.architecture, self.sets, self.trajectory.alive(groups))
        return replace(plan, info={**self.config.to_dict(), **plan.info, "groups_removed": groups})

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([int(self._decided), self._step])

    def set_extra_state(self, state: torch.Tensor) -> None:
        decided, self._step = state.tolist()
        self._decided = bool(decided)

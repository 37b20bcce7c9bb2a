"""Models saved on the way to the target, and any budget between them.

Removed weights are zero from then on, so a model of an earlier moment needs the weights of that moment: they are
saved as the run passes. A budget between two snapshots is cut out of the larger one, in the order of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ...errors import InvalidPlanError, UnreachableTargetError
from ...modeling.peft_twin import is_peft
from ...modeling.registry import class_for_task, stock_model_class
from ...plan.plan import PruningPlan
from ...plan.select import plan_keeping
from ...pruning import prune
from ...spec.architecture import Architecture
from ...spec.units import set_name
from .groups import GroupedSet, Moment, Trajectory

RUN_FILE = "run.json"
PLAN_FILE = "plan.json"


def snapshot_path(folder: str | Path, target: float) -> Path:
    """Folder of the snapshot for a target."""
    return Path(folder) / f"{target:g}"


def save_snapshot(model: Any, plan: PruningPlan, folder: str | Path, target: float) -> Path:
    """Write the pruned model (of a PeftModel: with its adapters merged) and its plan."""
    path = snapshot_path(folder, target)
    small = prune(model, plan)
    if is_peft(small):
        small = small.merge_and_unload()
    path.mkdir(parents=True, exist_ok=True)
    small.save_pretrained(path)
    plan.save(path / PLAN_FILE)
    return path


def save_run(trajectory: Trajectory, moments: list[Moment], folder: str | Path) -> None:
    """Write what :func:`model_at` needs besides the snapshots: the order of removals and the costs."""
    record = {
        "sets": [[one.unit, one.layer, one.start, one.size, one.group] for one in trajectory.sets],
        "order": trajectory.order.tolist(),
        "steps": [moment.step for moment in moments],
        "ratios": [moment.ratio for moment in moments],
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RUN_FILE).write_text(json.dumps(record))


def model_at(folder: str | Path, target: float) -> Any:
    """The model of a run when its cost first was at most ``target`` of the unpruned one's.

    Loads the snapshot of the same or the next larger budget out of the run's ``snapshot_folder`` and cuts it further,
    in the order in which the run removed groups: the shape is exactly the run's, the weights are those of the
    snapshot.

    Raises:
        UnreachableTargetError: the run has no snapshot at or above the target, or never came down to it.
        InvalidPlanError: the folder holds no run.
    """
    run = Path(folder) / RUN_FILE
    if not run.is_file():
        raise InvalidPlanError(f"{folder} has no {RUN_FILE}: it is no snapshot_folder of a run that ended")
    record = json.loads(run.read_text())
    ratios = record["ratios"]
    if min(ratios) > target:
        raise UnreachableTargetError(
            f"the run ended at {min(ratios):.3f} of the cost, over the target of {target:.3f}"
        )
    budgets = sorted(float(path.parent.name) for path in Path(folder).glob(f"*/{PLAN_FILE}"))
    larger = [budget for budget in budgets if budget >= target]
    if not larger:
        raise UnreachableTargetError(
            f"no snapshot at or above {target:.3f} of the cost, only {', '.join(map(str, budgets))}: weights of that "
            "moment were not kept. Run again with a larger one in snapshots"
        )
    path = snapshot_path(folder, larger[0])
    plan = PruningPlan.load(path / PLAN_FILE)
    pruned: Any = class_for_task(plan.source.family, plan.source.task)
    is_pruned = isinstance(AutoConfig.from_pretrained(path), pruned.config_class)
    model = (pruned if is_pruned else stock_model_class(pruned)).from_pretrained(path)
    sets = [
        GroupedSet(set_name(unit, layer), unit, layer, size, start=start, group=group)
        for unit, layer, start, size, group in record["sets"]
    ]
    groups = next(i for i, ratio in enumerate(ratios) if ratio <= target)
    order = torch.tensor(record["order"])
    further = _relative(plan, sets, (order == 0) | (order > groups), Architecture.of(model))
    return model if further.removes_nothing else prune(model, replace(further, info=plan.info))


def _relative(
    big: PruningPlan, sets: list[GroupedSet], alive: torch.Tensor, architecture: Architecture
) -> PruningPlan:
    """The plan for the model that ``big`` gave, with only the units that are ``alive`` in ``big``'s source."""
    kept = {}
    for one in sets:
        living = set(alive[one.places].nonzero().squeeze(1).tolist())
        if one.layer is None:
            before: Sequence[int] = big.embedding or range(one.size)
        else:
            entry = big.layers[one.layer]
            before = {"heads": entry.heads, "qk": entry.qk[0], "v": entry.v[0], "mlp": entry.mlp}[one.unit]
        kept[one.name] = tuple(i for i, unit in enumerate(before) if unit in living)
    return PruningPlan(architecture, *plan_keeping(architecture, kept)).validated()

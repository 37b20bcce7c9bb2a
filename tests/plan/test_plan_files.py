"""Plans on disk: what is saved comes back, damaged files are refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune.errors import (
    InvalidPlanError,
    VitPruneError,
)
from hf_vitprune.plan.plan import PruningPlan
from plans import plan_named
from tiny import make

VIT = "ViTForImageClassification"


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("plan_name", ["padded values", "removed branches", "narrow inputs", "scaled", "layers"])
def test_saved_plans_come_back(plan_name: str, tmp_path: Path) -> None:
    plan = plan_named(plan_name, make("SwinForImageClassification"))
    plan = replace(plan, info={"method": "test", "ratio": 0.5})
    plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan and loaded.info == plan.info
    assert loaded.architecture == plan.architecture and loaded.source.config.to_dict() == plan.source.config.to_dict()


def test_damaged_plan_files(tmp_path: Path) -> None:
    """Any single value of a plan's JSON replaced by nonsense: refused, or still a plan for the same model."""
    plan = replace(plan_named("narrow inputs", make(VIT)), weights={"classifier.bias": torch.zeros(5)})
    record = json.loads(json.dumps(plan.to_dict()))
    refused = 0
    for path in paths_in(record):
        for junk in (None, -3, 2.5, "x", [], {}, [[]], 10**9, True):
            damaged = copy.deepcopy(record)
            parent: Any = damaged
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = junk
            try:
                PruningPlan.from_dict(damaged)
            except VitPruneError as error:
                assert len(str(error)) > 20
                refused += 1
    assert refused > 300
    (tmp_path / "plan.json").write_text("{not json")
    with pytest.raises(InvalidPlanError, match="not JSON"):
        PruningPlan.load(tmp_path / "plan.json")


def test_damaged_weights_of_a_plan(tmp_path: Path) -> None:
    plan = replace(plan_named("narrow inputs", make(VIT)), weights={"classifier.bias": torch.ones(5)})
    file, weights = tmp_path / "plan.json", tmp_path / "plan.safetensors"
    plan.save(file)
    assert PruningPlan.load(file).weights["classifier.bias"].tolist() == [1.0] * 5
    with pytest.raises(InvalidPlanError, match=r"save it as plan\.json"):  # its own weights would be written over
        plan.save(weights)
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(InvalidPlanError, match="plan.safetensors.*damaged"):
        PruningPlan.load(file)
    for junk in (5, "", "../other.safetensors", None, []):
        file.write_text(json.dumps({**json.loads(file.read_text()), "weights_file": junk}))
        with pytest.raises(InvalidPlanError, match="damaged"):
            PruningPlan.load(file)
    file.write_bytes(bytes(range(256)))
    with pytest.raises(InvalidPlanError, match="not JSON"):
        PruningPlan.load(file)


def paths_in(record: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to the values of a plan's JSON; of lists the first element only, and nothing below the dense config."""
    items = list(record.items()) if isinstance(record, dict) else list(enumerate(record))[:1]
    found = []
    for key, value in items:
        found.append((*before, key))
        if isinstance(value, (dict, list)) and key not in ("config", "info"):
            found += paths_in(value, (*before, key))
    return found

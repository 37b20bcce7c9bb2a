"""Training with gates on two processes ends like on one with the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import two_processes
from hf_vitprune import SLSConfig, select_layers
from processes import SUPPORT, run_on_two
from pruning_runs import VIT, Patterns, assert_close, gated, nvit, scatter_scores
from tiny import make


def kept_units(plan: dict[str, Any]) -> list[dict[str, Any]]:
    layers = json.loads(json.dumps(plan["layers"]))
    return [{k: v for k, v in layer.items() if k != "scales"} for layer in layers]


@pytest.mark.parametrize("speed", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
def test_two_processes_end_like_one(speed: str, tmp_path: Path) -> None:
    """Same weights, gates, masks and plan, on both ranks, for all kinds of run (one launch: starting is slow)."""
    run_on_two(str(SUPPORT / "two_processes.py"), str(tmp_path), speed)
    plans = [json.loads((tmp_path / f"plans.{rank}.json").read_text()) for rank in (0, 1)]
    assert plans[0] == plans[1]
    alone = [kept_units(scatter_scores(gated(), seed=seed).plan().to_dict()) for seed in (0, 1)]
    assert kept_units(plans[1]["apart"]) == alone[0] != alone[1]
    alone = [
        json.loads(json.dumps(nvit(criterion="random", seed=s, eta=0).plan().to_dict()["layers"])) for s in (0, 1)
    ]
    assert plans[1]["NViT apart"] == alone[0] != alone[1]
    runs = two_processes.runs(slow=speed == "slow")
    for name, case in runs.items():
        state, plan = two_processes.train(case, tmp_path / "one", processes=1)
        for rank in (0, 1):
            theirs = load_file(tmp_path / f"{name}.{rank}.safetensors")
            assert_close(theirs, state)
        assert kept_units(plans[0][name]) == kept_units(plan)
    config = SLSConfig(iterations=250, perplexity=3.0)
    kept = [select_layers(make(VIT), Patterns(noise=noise), config).kept_layers for noise in (0.1, 5.0)]
    assert len(plans[1]["SLS apart"]["layers"]) == kept[0] != kept[1]
    assert plans[0].keys() == {*runs, "apart", "NViT apart", "SLS apart"}

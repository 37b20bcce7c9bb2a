"""FSDP2 on two processes ends like one process with the same global batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

import two_shards
from processes import SUPPORT, run_on_two
from pruning_runs import VIT, state_of
from tiny import make


def launch(folder: Path, *runs: str) -> None:
    make(VIT).double().save_pretrained(folder / "dense")
    run_on_two(str(SUPPORT / "two_shards.py"), str(folder), *runs)


def close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        torch.testing.assert_close(
            actual[name],
            tensor,
            rtol=1e-5,
            atol=1e-5 if tensor.dtype == torch.float32 else 1e-7,
            check_dtype=False,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def kept_units(layers: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in layer.items() if k != "scales"} for layer in json.loads(json.dumps(layers))]


def check(folder: Path, name: str, way: str) -> None:
    """Plan, gates and small model of both processes, against those of one; saved ones load.

    All but running statistics: one process has seen the micro-batches one after the other.
    """
    single = way.startswith("zero")
    model = two_shards.pruning_model(folder, name, dtype=torch.float32 if single else torch.float64)
    changes = two_shards.SINGLE_PRECISION if single else {}
    two_shards.train(model, folder / "one", name, processes=1, **changes)
    small = model.export(compensate=False)
    for part in ("through",) if way == "native" else ("through", "resumed"):
        stem = f"{name}.{way}.{part}"
        for rank in (0, 1):
            plan = json.loads((folder / f"{stem}.{rank}.json").read_text())
            assert kept_units(plan) == kept_units(model.plan().to_dict()["layers"])
            close(load_file(folder / f"{stem}.gates.{rank}.safetensors"), state_of(model.method))
        close(load_file(folder / f"{stem}.safetensors"), state_of(small))
        if name != "sls":
            loaded = AutoModelForImageClassification.from_pretrained(folder / stem)
            assert {n: t.shape for n, t in loaded.state_dict().items()} == {
                n: t.shape for n, t in small.state_dict().items()
            }


def test_vtp_on_a_model_that_is_loaded_sharded(tmp_path: Path) -> None:
    launch(tmp_path, "vtp:native")
    check(tmp_path, "vtp", "native")


@pytest.mark.slow
def test_every_method_on_both_kinds_of_sharding(tmp_path: Path) -> None:
    runs = [(name, way) for name in two_shards.RUNS for way in ("native", "plugin")]
    launch(tmp_path, *(f"{name}:{way}" for name, way in runs))
    for name, way in runs:
        check(tmp_path, name, way)

"""A measured latency as a target: reached, noted, and refused before any training where the table does not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vitprune import Architecture, VTPConfig, get_pruning_model
from hf_vitprune.errors import InvalidConfigError, LatencyTableError, UnreachableTargetError
from latency_tables import LINEAR, made_table
from pruning_runs import scatter_scores
from tiny import make

VIT = "ViTForImageClassification"


def config(table: Any, target: float = 0.6, **settings: Any) -> VTPConfig:
    settings = {"round_to": 1, **settings}
    return VTPConfig(target=target, target_metric="latency", latency_table=table, **settings)


@pytest.mark.parametrize("case", [VIT, "SwinForImageClassification", "Dinov2ForImageClassification-swiglu"])
@pytest.mark.parametrize("target", [0.4, 0.7])
def test_vtp_reaches_a_latency(case: str, target: float, tmp_path: Path) -> None:
    model = make(case)
    table = made_table(model)
    file = table.save(tmp_path / "table.json")
    pruning = get_pruning_model(model, config(file, target))
    for gate in pruning.method.gates.values():
        torch.nn.init.uniform_(gate.score)
    plan = pruning.plan()
    ratio = table.predict(plan.architecture) / table.predict(plan.source)
    assert target - 0.05 < ratio <= target
    small = pruning.export()
    assert table.predict(Architecture.of(small)) == table.predict(plan.architecture)
    again = get_pruning_model(make(case), config(table, target))
    assert again.pruning_config.to_dict() == pruning.pruning_config.to_dict()  # by file or by object


def test_the_table_decides_how_much_goes() -> None:
    """Where more of the time is spent outside the layers, reaching the same share takes a deeper cut into them."""
    slow_outside = {**LINEAR, "model": lambda embedding: 5e-3 + 1e-5 * embedding}
    kept = []
    for parts in (LINEAR, slow_outside):
        pruning = get_pruning_model(make(VIT), config(made_table(make(VIT), parts=parts), 0.7))
        torch.manual_seed(0)
        for gate in pruning.method.gates.values():
            torch.nn.init.uniform_(gate.score)
        kept.append([s.heads * s.v_dim + s.mlp for s in pruning.plan().architecture.layers])
    assert sum(kept[1]) < sum(kept[0])


def test_the_log_has_the_latency_too() -> None:
    pruning = get_pruning_model(make(VIT), config(made_table(make(VIT))))
    logs = pruning.method.logs()
    assert {"macs_ratio", "params_ratio", "latency_ratio"} <= logs.keys()
    assert logs["latency_ratio"] <= 0.6
    assert "latency_ratio" not in get_pruning_model(make(VIT), VTPConfig(target=0.6)).method.logs()


def test_settings_are_json_and_tell_the_table_but_no_folder(tmp_path: Path) -> None:
    table = made_table(make(VIT))
    settings = config(table.save(tmp_path / "table.json"))
    record = json.loads(json.dumps(settings.to_dict()))
    assert record["latency_table"] == table.summary() and str(tmp_path) not in json.dumps(record)
    assert record["latency_table"].keys() == {"device", "dtype", "batch_size", "image_size", "date", "digest"}
    assert copy.deepcopy(settings).to_dict() == settings.to_dict()
    assert VTPConfig(target=0.5).to_dict()["latency_table"] is None
    plan = scatter_scores(get_pruning_model(make(VIT), settings)).plan()
    assert plan.info["latency_table"]["digest"] == table.summary()["digest"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_metric": "latency"}, "go together.*hf-vitprune latency.*None"),
        ({"latency_table": "table.json"}, "go together.*'macs'"),
        ({"target_metric": "latency", "latency_table": "nowhere.json"}, "LatencyTable or a file.*nowhere.json"),
        ({"target_metric": "latency", "latency_table": 3}, "LatencyTable or a file"),
        ({"latency_batch_size": 0}, "latency_batch_size"),
        ({"latency_batch_size": 8.0}, "latency_batch_size"),
        ({"allow_other_device": "yes"}, "allow_other_device"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        VTPConfig(target=0.5, **settings)


def test_a_damaged_table_is_refused_with_the_settings(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(LatencyTableError, match="no usable latency table"):
        config(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ({"device": "a toaster"}, {}, "measured on a toaster"),
        ({}, {"latency_batch_size": 32}, "batches of 32, the table 8"),
        ({"image_size": [32, 32]}, {}, r"images of \(16, 16\), the table \(32, 32\)"),
        ({}, {"image_size": 32}, r"images of \(32, 32\), the table \(16, 16\)"),
        ({"grid": {"mlp": [40]}}, {}, "mlp .* is not covered, the table spans 40 to 48"),
    ],
)
def test_tables_that_do_not_fit_are_refused_before_training(
    table: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(LatencyTableError, match=message):
        get_pruning_model(make(VIT), config(made_table(make(VIT), **table), **settings))


def test_a_table_of_another_model_is_refused_before_training() -> None:
    with pytest.raises(LatencyTableError, match="model_type 'vit', the table 'deit'"):
        get_pruning_model(make(VIT), config(made_table(make("DeiTForImageClassification"))))


def test_a_table_of_the_device_that_the_model_is_for() -> None:
    table = made_table(make(VIT), device="a toaster")
    pruning = scatter_scores(get_pruning_model(make(VIT), config(table, allow_other_device=True)))
    assert table.predict(pruning.plan().architecture) <= 0.6 * table.predict(pruning.plan().source)


def test_a_latency_under_the_floors_is_refused_before_training() -> None:
    with pytest.raises(UnreachableTargetError, match=r"0\.010 of the latency cannot be reached.*has 0\.[0-9]+"):
        get_pruning_model(make(VIT), config(made_table(make(VIT)), target=0.01))

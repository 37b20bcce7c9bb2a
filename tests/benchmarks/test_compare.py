"""The comparison of methods: budgets are met with rounded sizes, runs are kept and not repeated, tables are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from benchmarks.compare import layers, methods, models, runs, scratch
from benchmarks.compare.cli import app
from benchmarks.compare.methods import METHODS, method_named, plan_of_budget
from benchmarks.compare.report import costs_of, table_of
from benchmarks.compare.tasks import Examples, Task, Unlabelled
from hf_vitprune import PruningPlan, count, prune, register_method
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.methods import registry
from toy_method import Toy, ToyConfig


def tiny_task(name: str = "tiny") -> Task:
    generator = np.random.default_rng(0)
    labels = np.arange(64) % 4
    parts = [Examples(generator.standard_normal((64, 1, 16, 16)), labels) for _ in range(3)]
    return Task(name, 4, 16, *parts)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("budget", [0.5, pytest.param(0.3, marks=pytest.mark.slow)])
def test_rounded_plans_land_on_the_budget(family: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForImageClassification.from_config(models.FAMILIES[family](tiny_task()))
    monkeypatch.setattr(methods, "tune", lambda small, *rest: small)
    names = ("random", "magnitude", "taylor", "taylor-global")
    smalls = [METHODS[name](model, tiny_task(), budget, 0, 0) for name in names]
    smalls.append(prune(model, plan_of_budget(model, budget, lambda ratio: PruningPlan.magnitude(model, ratio))))
    for small in smalls:
        assert count(small).macs / count(model).macs == pytest.approx(budget, rel=runs.TOLERANCE)


@pytest.mark.slow
def test_runs_are_done_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_task", tiny_task)
    monkeypatch.setattr(models, "STEPS", 2)
    methods = [name for name in METHODS if name in ("magnitude", "nvit", "nvit-features")]
    arguments = ["run", "--tasks", "tiny", "--methods", ",".join(methods), "--budgets", "0.5", "--steps", "4"]
    arguments += ["--seeds", "0", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "runs").iterdir()}
    assert {record["method"] for record in records.values()} == {"dense", *methods}
    for record in records.values():
        assert record["macs_ratio"] == pytest.approx(record["budget"], rel=runs.TOLERANCE)
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"{len(records)} of {len(records)} runs are done already" in again.output
    shown = CliRunner().invoke(app, ["report", "--markdown", "--output", str(tmp_path)], catch_exceptions=False)
    assert all(name in shown.output for name in methods)
    drawn = CliRunner().invoke(app, ["draw", "--methods", "nvit", "--output", str(tmp_path)], catch_exceptions=False)
    (picture,) = (tmp_path / "figures").iterdir()
    assert picture.name in drawn.output and picture.stat().st_size > 5000 and "attention" in drawn.output


def test_shapes_are_trained_from_scratch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "load_task", tiny_task)
    command = ["scratch", "--layers", "4", "--steps", "1", "--batch-size", "4", "--seeds", "0", "-o", str(tmp_path)]
    first, again = (CliRunner().invoke(app, command, catch_exceptions=False) for _ in range(2))
    assert again.output in first.output  # which has progress bars beside it
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in again.output.splitlines()[2:]]
    assert [row[1:3] for row in rows] == [["1", "deit-t"], ["1", "revit-t"]]
    # 4 x 12 x 192^2, the patches of 16 numbers and four classes; 17 tokens see each other
    weights = 48 * 192**2 + 16 * 192 + 4 * 192
    assert rows[0][3] == f"{weights / 1e6:.2f}M"
    ends, middle = 2 * 192 * (10 * 80 + 3 * 192), 2 * 192 * (4 * 80 + 6 * 192)
    assert rows[1][3] == f"{(2 * ends + 2 * middle + 20 * 192) / 1e6:.2f}M"
    with pytest.raises(InvalidConfigError, match="shapes are deit-t"):
        scratch.Training("deit-b", "digits", 4, 1, 4, 0)


@pytest.mark.slow
def test_layers_of_dense_models_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "load_task", tiny_task)
    monkeypatch.setattr(models, "STEPS", 1)
    command = ["layers", "--tasks", "tiny", "--images", "40", "--seeds", "0", "-o", str(tmp_path)]
    shown: list[str] = []
    again: list[str] = []
    for row in (shown, again):
        output = CliRunner().invoke(app, command, catch_exceptions=False).output
        row += [cell.strip() for cell in output.strip().splitlines()[-1].split("|")[1:-1]]
        (path,) = (tmp_path / "layers").iterdir()
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "correlation": None}))
    assert len(record["scores"]) == 6
    assert shown[8] == f"{record['scores']['6']:.2f} / {100 * record['probe_accuracy']['6']:.1f}"
    assert again == [*shown[:-1], "–"]  # it was read


def test_registered_methods_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfigError, match="methods are random, .*truncation; not toy"):
        method_named("toy")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register_method(ToyConfig, Toy)
    model = AutoModelForImageClassification.from_config(models.FAMILIES["vit"](tiny_task()))
    small = method_named("toy")(model, tiny_task(), 0.6, 2, 0)
    assert count(small).macs / count(model).macs == pytest.approx(0.6, rel=runs.TOLERANCE)


def test_table_has_mean_and_deviation_over_seeds() -> None:
    def record(method: str, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
        base = {"family": "vit", "task": "t", "method": method, "budget": 0.5, "steps": 9, "seed": seed}
        return {**base, "accuracy": accuracy, **changes}

    rows = table_of(
        [
            record("dense", 0, 0.9, budget=1.0, steps=0),
            record("nvit", 0, 0.5),
            record("nvit", 1, 0.7),
            record("magnitude", 0, 0.25),
        ]
    )
    assert rows == [
        ["model, steps", "method", "t, 50%"],
        ["vit, 9", "dense", "90.0"],
        ["vit, 9", "magnitude", "25.0"],
        ["vit, 9", "nvit", "60.0 ± 14.1"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vtp-features", "magnitude-features"])
def test_labels_are_thrown_away_where_features_are_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    original = Unlabelled.__getitem__
    monkeypatch.setattr(Unlabelled, "__getitem__", lambda *args: (seen.append({*original(*args)}), original(*args))[1])
    monkeypatch.setattr(Examples, "__getitem__", lambda *args: pytest.fail("a labelled example was read"))
    model = AutoModelForImageClassification.from_config(models.FAMILIES["vit"](tiny_task()))
    head = model.classifier.weight.clone()
    small = method_named(name)(model, tiny_task(), 0.5, 16, 0)
    assert count(small).macs / count(model).macs == pytest.approx(0.5, rel=runs.TOLERANCE)
    assert seen and all(names == {"pixel_values"} for names in seen)
    kept = (small.classifier.weight.cpu().T[:, None] == head.T).all(-1)  # of the head, too
    assert kept.any(1).all() and kept.sum() == small.classifier.in_features


def test_costs_are_means_over_seeds() -> None:
    base = {"family": "vit", "task": "t", "budget": 0.5, "steps": 9, "method": "spvit"}
    one = {**base, "accuracy": 0.5, "validation": 0.6, "params_ratio": 0.4, "search_seconds": 3.0}
    other = {**one, "accuracy": 0.7, "params_ratio": 0.42, "search_seconds": 4.0}
    nvit = {**one, "method": "nvit", "search_seconds": None}
    heads, *rows = costs_of([one, nvit, other])
    assert heads[-3:] == ["accuracy", "parameters", "search, s"]
    assert rows == [
        ["vit", "t", "50%", "9", "nvit", "1", "50.0", "40.0", "–"],
        ["vit", "t", "50%", "9", "spvit", "2", "60.0 ± 14.1", "41.0 ± 1.4", "3.5"],
    ]
    assert costs_of([one], "validation")[1][6] == "60.0"

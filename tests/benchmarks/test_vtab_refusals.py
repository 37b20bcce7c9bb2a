"""VTAB-1k: what a sweep refuses before it starts, and what it says of runs that cannot be done."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.vtab.adapters import load_pretrained
from benchmarks.vtab.pruning import Choice
from benchmarks.vtab.settings import Recipe, Settings
from benchmarks.vtab.store import Store
from benchmarks.vtab.sweep import run_sweep, runs_of
from hf_vitprune.errors import InvalidConfigError, InvalidDataError, InvalidPlanError, MissingExtraError
from vtab_runs import MACHINE, sweep


# ---------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune", "no pruning 'prune'; there are none, sls, truncate"),
        ("sls:beta=1", "sls has no option 'beta'; it has alpha"),
        ("sls:alpha=1", "alpha of sls is a number between 0 and 1, not '1'"),
        ("truncate:k=0", "k of truncate is a number of layers, random or sls"),
        ("depgraph:ratio=x", "ratio of depgraph"),
        ("none:k=1", "none has no option 'k'; it has none"),
    ],
)
def test_choices_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        Choice.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, "alpha must lie strictly between 0 and 1"),
        ({"preprocessing": "none"}, "preprocessing is one of literature, checkpoint"),
        ({"preprocessing": "checkpoint", "image_size": 32}, "leave image_size out"),
        ({"retraining": "lrr"}, "retraining is one of clr, ft, tfs"),
        ({"test_limit": 0}, "test_limit is at least 1"),
    ],
)
def test_settings_that_are_impossible(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        Settings(**changes)
    with pytest.raises(InvalidConfigError, match="10 warm-up epochs do not fit into 10"):
        Recipe(epochs=10)


def test_what_a_sweep_refuses_before_it_starts(
    root: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_of(["kitti"], ["lora"], ["none"], [0])
    with pytest.raises(InvalidDataError, match="--any-size"):
        sweep(replace(settings, any_size=False), runs, root, tmp_path)
    with pytest.raises(InvalidConfigError, match="no adaptation 'bitfit'; there are lora, dora"):
        runs_of(["kitti"], ["bitfit"], ["none"], [0])
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match="pip install torch-pruning"):
        sweep(settings, runs_of(["kitti"], ["lora"], ["none", "depgraph"], [0]), root, tmp_path)
    assert not list(tmp_path.iterdir())


def test_results_of_other_settings_are_not_mixed(root: Path, settings: Settings, tmp_path: Path) -> None:
    Store(tmp_path).claim(settings)
    Store(tmp_path).claim(settings)
    other = replace(settings, rank=4, recipe=replace(settings.recipe, epochs=3))
    with pytest.raises(InvalidConfigError, match=r"rank was 2 and is 4; recipe was .*'epochs': 2.*Use another --out"):
        sweep(other, runs_of(["kitti"], ["lora"], ["none"], [0]), root, tmp_path)
    assert Store(tmp_path).settings() == settings


def test_a_run_that_cannot_be_done_does_not_stop_the_others(root: Path, settings: Settings, tmp_path: Path) -> None:
    settings = replace(settings, retraining_epochs=0)
    runs = runs_of(["kitti"], ["linear"], ["truncate:k=3", "truncate:k=1"], [0])
    failed = run_sweep(settings, runs, root, tmp_path, MACHINE, Console(file=StringIO()))
    ((run, error),) = failed
    assert (
        run == runs[0] and isinstance(error, InvalidPlanError) and "not among the depths of this model" in str(error)
    )
    assert [Store(tmp_path).finished(run) for run in runs] == [False, True]


def test_models_that_are_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="does not take images of 32 x 32"):
        load_pretrained(str(source), 4, 0, image_size=32)
    shutil.copytree(source, tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper" / "config.json").read_text())
    (tmp_path / "deeper" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(InvalidConfigError, match="no whole pretrained model: it lacks vit.layers.3"):
        load_pretrained(str(tmp_path / "deeper"), 4, 0)


def test_a_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="batch of 64 cannot be shared by 3 processes"):
        MACHINE.arguments(Recipe(), 0, str(tmp_path), processes=3)

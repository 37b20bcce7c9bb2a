"""The report on VTAB-1k runs, from records whose numbers are known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.vtab.cli import app
from benchmarks.vtab.plots import points_of
from benchmarks.vtab.report import means_of, report_markdown, rows_of, stored_in_all
from benchmarks.vtab.settings import Run, Settings
from benchmarks.vtab.store import Store
from benchmarks.vtab.tasks import TASKS, VTAB
from hf_vitprune.errors import InvalidDataError


def record(task: str = "digits", pruning: str = "none", seed: int = 42, accuracy: float = 0.9, **cost: Any) -> dict:
    """What a run writes, with round numbers."""
    pruned = pruning != "none"
    result = {"accuracy_before": 0.95, "accuracy": accuracy, "kept_layers": 6 if pruned else 12, "layers": 12}
    cost = {
        "params": 600 if pruned else 1000,
        "dense_params": 1000,
        "backbone_params": 900,
        "macs": 500,
        "dense_macs": 1000,
        "stored": {"params": 50, "bytes": 2000, "shared_backbone": True},
        "images_per_second": 10.0,
        "speedup": 2.0 if pruned else 1.0,
        **cost,
    }
    result["cost"] = cost
    if pruned:
        result["accuracy_truncated"] = 0.5
    return {
        "task": task,
        "peft": "lora",
        "pruning": pruning,
        "seed": seed,
        "group": TASKS[task].group,
        "reported_as": task,
        "settings": Settings(model="a/model").to_dict(),
        "data": {"source": "here", "deviations": [], "test_images": 100, "of_test_images": 100},
        "results": {"last_epoch": result, "best_on_val200": {**result, "accuracy": accuracy - 0.01}},
        "environment": {"device": "an abacus"},
    }


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the markdown table under a heading, the rule left out."""
    lines = text.partition(f"## {heading}")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_means_are_of_groups_then_of_tasks() -> None:
    accuracies = {task.name: {"natural": 0.7, "specialized": 0.8, "structured": 0.3}[task.group] for task in VTAB}
    means = means_of({**accuracies, "cifar": 1.4, "digits": 0.0})
    assert means["natural"] == pytest.approx(0.8)
    assert means["group mean"] == pytest.approx((0.8 + 0.8 + 0.3) / 3)
    assert means["mean of 19"] == pytest.approx((0.8 * 7 + 0.8 * 4 + 0.3 * 8) / 19)
    partly = means_of({**accuracies, "eurosat": None})
    assert partly["specialized"] is partly["group mean"] is partly["mean of 19"] is None
    assert partly["structured"] == pytest.approx(0.3)


def test_all_nineteen_as_papers_have_it() -> None:
    records = [record(task.name, "sls", accuracy=0.5 + 0.01 * i) for i, task in enumerate(VTAB)]
    cells = table(report_markdown(records), "Last epoch")
    row = dict(zip(cells[0], cells[1], strict=True))
    assert row[""] == "lora, sls"
    assert (row["cifar"], row["smallnorb_ele"]) == ("50.00", "68.00")
    assert (row["natural"], row["specialized"], row["structured"]) == ("53.00", "58.50", "64.50")
    assert (row["group mean"], row["mean of 19"]) == ("58.67", "59.00")
    assert (row["stored a task"], row["stored in all"]) == ("50", "1.85k")  # 900 + 19 x 50
    assert (row["throughput"], row["layers kept"]) == ("2.00x", "6 of 12")
    best = table(report_markdown(records), "Best epoch on val200")
    assert best[1][1] == "49.00" and len(best[0]) == 1 + 19 + 5 + 4


def test_seeds_are_averaged_and_spread_is_shown() -> None:
    records = [record(seed=seed, accuracy=accuracy) for seed, accuracy in ((1, 0.8), (2, 0.9), (3, 1.0))]
    text = report_markdown(records)
    assert table(text, "Last epoch")[1][1] == "90.00 ± 10.00" and "seeds 1, 2, 3" in text


def test_steps_of_every_run() -> None:
    records = [record(), record(pruning="sls", accuracy=0.94), record("dsprites_loc", "sls")]
    records[2]["reported_as"] = "dSprites (re-rendered) location"
    records[2]["results"]["last_epoch"].update(kept_layers=3, accuracy=0.7)
    cells = table(report_markdown(records), "Step by step")
    assert [row[:2] for row in cells[1:]] == [
        ["dSprites (re-rendered) location, lora", "sls"],
        ["digits, lora", "none"],
        ["digits, lora", "sls"],
    ]
    assert cells[3][2:] == ["95.00", "50.00", "94.00", "6", "0.50", "50", "2.00kB", "2.00x"]
    assert cells[2][3] == "–" and cells[1][5] == "3"


def test_a_model_of_its_own_for_every_task_counts_in_full() -> None:
    own = {"params": 600, "bytes": 2400, "shared_backbone": False}
    rows = rows_of([record(task, "depgraph:ratio=sls", stored=own) for task in ("digits", "cifar", "svhn")])
    assert stored_in_all(rows[0], "last_epoch") == 1800
    shared = rows_of([record(task, "sls") for task in ("digits", "cifar", "svhn")])
    assert stored_in_all(shared[0], "last_epoch") == 1050


def test_what_a_reader_has_to_know() -> None:
    part = record()
    part["data"].update(test_images=10, deviations=["train800 has 6 images instead of 800"])
    text = report_markdown([part])
    assert "digits: tested on 10 of 100 test images" in text
    assert "digits is **not VTAB-1k's split**: train800 has 6" in text
    assert "Published" not in text
    default = copy.deepcopy(part)
    default["settings"] = Settings().to_dict()
    assert table(report_markdown([default]), "Published")[1] == ["LoRA, r = 8", "74.60", "72.25"]


def test_points_of_the_figure_are_means_over_the_same_tasks() -> None:
    records = [
        record("digits", accuracy=0.8),
        record("cifar", accuracy=0.4),
        record("digits", "sls", accuracy=0.7),
        record("cifar", "sls", accuracy=0.5, speedup=3.0),
        record("digits", "truncate:k=2", accuracy=0.1, speedup=5.0),
    ]
    tasks, points = points_of(rows_of(records))
    assert tasks == ["digits"]
    assert points == [("lora, none", 1.0, 0.8), ("lora, sls", 2.0, 0.7), ("lora, truncate:k=2", 5.0, 0.1)]
    tasks, points = points_of(rows_of(records[:4]))
    assert sorted(tasks) == ["cifar", "digits"] and points[1] == ("lora, sls", 2.5, pytest.approx(0.6))


def test_the_command_reads_finished_runs_and_writes_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for made in (record(), record(pruning="sls")):
        store.write(Run(made["task"], made["peft"], made["pruning"], made["seed"]), made)
    (tmp_path / "runs" / ".unfinished.json.abc").write_text("{")
    result = CliRunner().invoke(app, ["report", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.md").read_text()
    assert "lora, sls" in text and "an abacus" in text and text in result.output
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_and_missing_records_are_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", "--output", str(tmp_path), "--debug"])
    assert isinstance(result.exception, InvalidDataError) and "no finished runs" in str(result.exception)
    run = Run("digits", "lora", "none", 42)
    store = Store(tmp_path)
    store.write(run, record())
    assert store.finished(run)
    whole = store.path(run).read_text()
    for damaged in (whole[:-20], json.dumps({"format": 0}), "[]"):
        store.path(run).write_text(damaged)
        assert not store.finished(run)
        with pytest.raises(InvalidDataError, match="digits--lora--none--seed42.json is no complete record"):
            list(store.records())

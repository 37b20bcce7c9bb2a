"""The SLS example as users run it; what it saves loads on the full backbone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

import hf_vitprune  # noqa: F401  makes PEFT know adapters of truncated models
from processes import ROOT

SCRIPT = ROOT / "examples" / "run_sls_peft.py"
ARGUMENTS = [
    *("--max_train_samples", "200", "--max_eval_samples", "64", "--source_epochs", "6", "--num_train_epochs", "4"),
    *("--retrain_epochs", "1", "--per_device_train_batch_size", "16", "--learning_rate", "3e-3", "--use_cpu", "True"),
    *("--report_to", "none", "--disable_tqdm", "True", "--save_steps", "10", "--sls_config", '{"iterations": 300}'),
]


def summary_of(folder: Path, *more: str, launcher: tuple[str, ...] = ()) -> dict:
    command = [sys.executable, *launcher, str(SCRIPT), *ARGUMENTS, "--output_dir", str(folder), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"kept_layers"') == 1
    return json.loads(done.stdout[done.stdout.index('{\n  "kept_layers"') :])


@pytest.mark.slow
def test_it_saves_the_adapter_of_the_kept_layers(tmp_path: Path) -> None:
    summary = summary_of(tmp_path)
    assert 1 <= summary["kept_layers"] <= summary["layers"] == 6 and summary["reason"]
    assert set(summary["accuracy"]) == {"adapted", "truncated", "retrained"}
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert len(model.vit.layers) == summary["kept_layers"]
    again = summary_of(tmp_path, "--resume_from_checkpoint", "True")
    assert again == summary


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["FT", "TFS", "none"])
def test_schedules(schedule: str, tmp_path: Path) -> None:
    summary = summary_of(tmp_path, "--schedule", schedule)
    assert ("retrained" in summary["accuracy"]) == (schedule != "none")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert summary_of(tmp_path, launcher=launcher)["layers"] == 6

"""Sweeps of VTAB-1k in a test: on the CPU, and what they say."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.vtab.settings import Machine, Run, Settings
from benchmarks.vtab.sweep import run_sweep

MACHINE = Machine(cpu=True)


def sweep(settings: Settings, runs: list[Run], root: Path, output: Path) -> str:
    """What the console was told."""
    text = StringIO()
    assert not run_sweep(settings, runs, root, output, MACHINE, Console(file=text, width=200))
    return text.getvalue()


def results(output: Path) -> dict[str, Any]:
    """Name of a run -> what does not depend on the clock."""
    timed = ("cost", "seconds_to_prune", "seconds_to_retrain", "decision")
    return {
        path.stem: {k: v for k, v in json.loads(path.read_text())["results"]["last_epoch"].items() if k not in timed}
        for path in (output / "runs").glob("*.json")
    }

"""benchmarks.gpu runs through at small sizes on a CPU; what it says of a GPU has to be seen there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_runs_at_small_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--small", "--out", str(tmp_path)]) == 0, (tmp_path / "gpu.json").read_text()
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts.keys() == gpu.PARTS.keys() and all(parts.values())
    assert {row["macs"] for row in parts["speed"]} >= {1.0} and len(parts["speed"]) == 6
    assert all(row["macs"] <= 0.51 for row in parts["speed"] if row["macs"] < 1)
    assert all(row["error"] < 1e-4 for row in parts["compiled"])
    assert all(row["difference"] < 1e-4 for row in parts["attention"])
    assert [row["method"] for row in parts["training"]] == ["plain", "vtp", "nvit", "spvit"]
    assert "## one_shot" in capsys.readouterr().out


def test_a_part_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: Any) -> Any:
        yield {"fine": 1}
        raise ValueError("no kernel")

    monkeypatch.setattr(gpu, "PARTS", {"broken": broken, "late": broken})
    assert gpu.main(["--small", "--out", str(tmp_path)]) == 1
    assert "ValueError: no kernel" in (tmp_path / "gpu.md").read_text()
    gpu.main(["--small", "--out", str(tmp_path), "--budget", "-1"])
    assert "no time left" in (tmp_path / "gpu.md").read_text()

"""The benchmarks of big towers run through at small sizes; what they say of large ones has to be seen there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import big_tower, scaling
from benchmarks.scaling import TOWERS, calibration_bytes, projections, streamed_bytes, training_bytes


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["one-shot", "magnitude"])
def test_a_small_tower_is_written_and_pruned(choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = big_tower.main(
        ["--tiny", "--image-size", "28", "--images", "8", "--threads", "1", "--target", "0.6", "--choice", choice]
    )
    scored = ["score"] if choice == "one-shot" else []
    assert list(row["seconds"]) == ["read", *scored, "choose", "compensate", "save"]
    assert 0.3 < row["left"] / row["weights"] < 0.75 and max(row["peak"].values()) > row["imported"] / 2
    assert "1.3 x the weights" in capsys.readouterr().out


def test_every_operation_is_measured_once_a_shape() -> None:
    found = scaling.measure(width=64, depth=1, side=32, images=2)
    assert list(found) == list(scaling.OPERATIONS)
    assert all(row["seconds"] > 0 and row["bytes"] >= 0 for row in found.values())


def test_exponents_of_known_laws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results of an earlier run are read, not measured again."""
    for _, sizes in scaling.shapes(scaling.SMALL):
        tokens = (sizes["side"] // scaling.PATCH) ** 2 + 1
        seconds = 1e-9 * sizes["width"] ** 2 * sizes["depth"] * tokens * sizes["images"] ** 0.5
        found = {name: {"seconds": seconds, "bytes": 8.0 * sizes["width"]} for name in scaling.OPERATIONS}
        name = "-".join(f"{key}{size}" for key, size in sizes.items())
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert scaling.main(["--small", "--out", str(tmp_path)]) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "VTP step" in line]
    rows = [[float(cell) for cell in line[2:-1]] for line in lines]
    assert rows == [[2.0, 1.0, 1.0, 0.5], [1.0, 0.0, 0.0, 0.0]]


def test_projections_are_counted() -> None:
    by_name = {tower.name.partition(",")[0]: tower for tower in TOWERS}
    assert by_name["DINOv2-giant"].weights == pytest.approx(1.13e9, rel=0.01)
    assert by_name["InternViT-6B"].weights == pytest.approx(5.5e9, rel=0.01)
    for tower in TOWERS:
        assert streamed_bytes(tower) < calibration_bytes(tower) and training_bytes(tower) > 2 * tower.weights
    assert projections().row_count == len(TOWERS)

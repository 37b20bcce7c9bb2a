"""The measurements of several processes run, at sizes of seconds."""

from __future__ import annotations

import json

import pytest

from processes import run, run_on_two

pytestmark = pytest.mark.slow


def test_images_split_over_processes() -> None:
    printed = run("-m", "benchmarks.split_images", "--shape", "64x2", "--images", "8,16")
    rows = [line.split("│")[1:3] for line in printed.splitlines() if line.startswith("│")]
    parts = ("scores", "compensation", "both")
    assert [[cell.strip() for cell in row] for row in rows] == [[part, n] for part in parts for n in ("1", "2")]


@pytest.mark.parametrize("way", ["fsdp2", "zero2", "zero3"])
def test_sharded_steps(way: str) -> None:
    if way != "fsdp2":
        pytest.importorskip("deepspeed")
    options = ("--small", "--rounds", "1", "--steps", "6")
    printed = run_on_two("-m", "benchmarks.sharded_step", "--way", way, *options)
    found = json.loads(printed[printed.index('{\n "plain"') :])
    assert found.keys() == {"plain", "VTP", "NViT", *(["SPViT"] if way == "fsdp2" else [])}
    assert all(row["ratios"][0] > 0 for name, row in found.items() if name != "plain")

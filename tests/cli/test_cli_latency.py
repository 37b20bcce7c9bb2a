"""``hf-vitprune latency``, and the options of ``prune`` that use what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import VIT, call, misused, printed, refused, saved
from hf_vitprune import Architecture, LatencyTable
from hf_vitprune.latency import grid as latency_grid
from hf_vitprune.latency import measure
from hf_vitprune.latency.report import curves, parts, plot_latency
from latency_tables import made_table
from tiny import make

SWIN = "SwinForImageClassification"


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "sample", lambda *_: 1e-3)
    monkeypatch.setattr(measure, "warm_up", lambda *_: 1)
    monkeypatch.setitem(latency_grid.NAMED, "coarse", dict.fromkeys(latency_grid.COARSE, 2))


def test_makes_a_table_and_shows_it(tmp_path: Path, instant: None) -> None:
    model = saved(tmp_path / "model")
    out, plot = tmp_path / "table.json", tmp_path / "plots" / "table.png"
    text = printed(
        "latency", tmp_path / "model", "--out", out, "--rounds", 1, "--batch-size", 2, "--dtype", "bfloat16",
        "--image-size", 32, "--no-monotone", "--show", plot,
    )  # fmt: skip
    table = LatencyTable.load(out)
    assert table.provenance.items() >= {"batch_size": 2, "dtype": "bfloat16", "image_size": [32, 32]}.items()
    assert not table.monotone and table.predict(Architecture.of(model)) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "dense model, predicted" in text and "vit on" in text and "batch 2, images of 32x32, bfloat16" in text
    assert str(out) in text and str(plot) in text
    assert not list(tmp_path.glob("*.partial"))
    again = printed("latency", out)
    assert again.splitlines() == text.splitlines()[1:-1]


def test_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: None) -> None:
    saved(tmp_path / "model")
    arguments = ("latency", tmp_path / "model", "--out", tmp_path / "t.json", "--rounds", 2)
    taken = 0

    def breaks(*_: object) -> float:
        nonlocal taken
        taken += 1
        if taken > 70:
            raise KeyboardInterrupt
        return 1e-3

    monkeypatch.setattr(measure, "sample", breaks)
    assert call(*arguments).exit_code != 0
    assert (tmp_path / "t.json.partial").exists() and not (tmp_path / "t.json").exists()
    taken = 0
    printed(*arguments)
    assert (tmp_path / "t.json").exists() and not (tmp_path / "t.json.partial").exists()


def test_refusals_are_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    taken = tmp_path / "table.json"
    taken.write_text("{")
    assert "--force" in refused("latency", tmp_path / "model", "--out", taken)
    assert "no usable latency table" in refused("latency", taken)
    assert "'float32', 'bfloat16'" in misused("latency", "model", "--out", tmp_path / "t", "--dtype", "int8")
    assert "'coarse', 'fine'" in misused("latency", "model", "--out", tmp_path / "t", "--grid", "huge")
    assert "no folder" in refused("latency", tmp_path / "nothing", "--out", tmp_path / "t")
    assert taken.read_text() == "{" and not (tmp_path / "t").exists()


def test_prune_takes_a_table_that_fits_and_no_other(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "table.json"
    saved(folder)
    command = ("prune", folder, tmp_path / "out", "--data", "digits", "--new-head", "--target-metric")
    assert "LatencyTable or a file" in refused(*command, "latency")
    assert "LatencyTable or a file" in refused(*command, file)
    made_table(make(VIT), device="a toaster").save(file)
    assert "a toaster" in refused(*command, file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [VIT, SWIN])
def test_reports(case: str, tmp_path: Path) -> None:
    model = make(case)
    table = made_table(model, dense_seconds=0.25)
    rows = dict(parts(table))
    assert rows["dense model, predicted"] == pytest.approx(table.predict(Architecture.of(model)))
    assert rows["dense model, measured"] == 0.25
    drawn = curves(table)
    sizes = {"heads", "qk", "v", "mlp"} | ({"embedding"} if case == VIT else set())
    assert {curve.size for curve in drawn} == sizes
    assert {curve.stage for curve in drawn} == set(range(len(table.stages)))
    for curve in drawn:
        assert curve.seconds == sorted(curve.seconds) and len(curve.values) == len(curve.seconds)
    assert plot_latency(table, tmp_path / "p.svg").read_text().count("stage") >= (case == SWIN)

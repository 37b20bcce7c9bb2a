"""``hf-vitprune bench`` and ``export``: forms of two models side by side, and what is refused before any work."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from command_line import misused, printed, refused, saved
from hf_vitprune.cost import count
from hf_vitprune.errors import BenchError, MissingExtraError
from hf_vitprune.publish.bench import bench
from hf_vitprune.publish.bench import run as benching
from hf_vitprune.publish.bench.run import bench_table
from hf_vitprune.publish.exporters import formats
from image_folders import image_folder
from tiny import make

VIT = "ViTForImageClassification"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "dense")
    saved(folder / "small", units=["heads", "qk", "mlp"])
    return folder / "dense", folder / "small"


@pytest.mark.slow
def test_eager_and_onnx_take_turns(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    plot = tmp_path / "bench.svg"
    text = printed(
        "bench",
        *pair,
        "--forms",
        "eager,onnx",
        "--batch-size",
        2,
        "--threads",
        1,
        "--rounds",
        3,
        "--json",
        "--plot",
        plot,
    )
    found = json.loads(text)
    assert found["setting"]["threads"] == 1 and found["setting"]["image_size"] == [16, 16]
    rows = {(row["form"], row["name"]): row for row in found["rows"]}
    assert set(rows) == {(form, name) for form in ("eager", "onnx") for name in ("dense", "small")}
    dense, small = make(VIT), saved(tmp_path / "again", units=["heads", "qk", "mlp"])
    for (_, name), row in rows.items():
        assert len(row["samples"]) == 3 and row["seconds"] == sorted(row["samples"])[1] > 0
        assert row["batch_size"] == 2 and row["against_dense"] == row["speedup"]
        assert row["macs_ratio"] == (1 if name == "dense" else count(dense).macs / count(small).macs)
        assert row["speedup"] == 1 or name == "small"
    # a process with a graph holds no torch
    assert 20 < rows["onnx", "small"]["megabytes"] < rows["eager", "small"]["megabytes"]
    assert rows["onnx", "small"]["file_megabytes"] < rows["onnx", "dense"]["file_megabytes"]
    drawn = plot.read_text()
    assert drawn.startswith("<?xml") and "small" in drawn


def test_ratios_are_of_rounds_and_sizes() -> None:
    """The dense model slows down in the second round, and so does the other one: the ratio does not."""
    samples = {
        ("dense", "onnx"): [1.0, 3.0, 1.0],
        ("small", "onnx"): [0.5, 1.0, 0.5],
        ("dense", "onnx-int8"): [0.5, 1.0, 0.5],
        ("small", "onnx-int8"): [0.25, 0.5, 0.25],
        ("dense", "openvino-int8"): [0.1, 0.1, 0.1],
    }
    of = {key: float(number) for number, key in enumerate(samples)}
    macs = {"dense": 400, "small": 100}
    rows = benching._summary(2, samples, of, macs, dict.fromkeys(samples), of)
    found = {(row.name, row.form): row for row in rows}
    small, int8 = found["small", "onnx"], found["small", "onnx-int8"]
    assert (small.seconds, small.speedup, small.against_dense, small.macs_ratio) == (0.5, 2, 2, 4)
    assert (int8.seconds, int8.speedup, int8.against_dense, int8.megabytes) == (0.25, 2, 4, 3)
    assert found["dense", "openvino-int8"].against_dense is None  # float32 was not timed
    setting = {"image_size": [16, 16], "device": "a processor", "threads": 1, "rounds": 3}
    console = Console(width=200, file=StringIO())
    console.print(bench_table(rows, setting))
    line = next(line for line in console.file.getvalue().splitlines() if "onnx-int8" in line and "small" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        *("2", "onnx-int8", "small", "250.0", "2.00", "0.50", "4.00", "3", "3.0"),
    ]


@pytest.mark.slow
def test_every_form(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for package in ("onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    pictures = image_folder(tmp_path / "pictures")
    text = printed("bench", *pair, "--batch-size", 1, "--rounds", 2, "--images", pictures, "--image-size", 16)
    for form in benching.FORMS:
        assert form in text
    assert "cosine" in text and "vs MACs" in text


@pytest.mark.slow
def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "_made", lambda *args: None)  # no files
    with pytest.raises(BenchError, match="eager does not run: .*inputs|eager does not run: .*0-eager"):
        bench({"dense": make(VIT)}, ["eager"], batch_sizes=[1], rounds=1, progress=False)


def test_missing_runtimes(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = formats.importlib.util.find_spec
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    assert "openvino needs openvino: pip install 'hf_vitprune[openvino]'" in refused(
        "bench", *pair, "--forms", "eager,openvino"
    )
    there, reasons = benching.installed_forms()
    assert "eager" in there and not {"openvino", "openvino-int8"} & {*there}
    assert [reason.split()[0] for reason in reasons] == ["openvino", "openvino-int8"]
    with pytest.raises(MissingExtraError):
        bench({}, ["openvino"])
    assert "there is no form tflite" in refused("bench", *pair, "--forms", "tflite")


# ---------------------------------------------------------------------- export
@pytest.mark.slow
def test_export_int8_on_labelled_images(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pictures = image_folder(tmp_path / "pictures", classes=("LABEL_0", "LABEL_1"))
    said = printed(
        "export", pair[1], tmp_path / "out", "--to", "onnx", "--int8", "--data", pictures, "--image-size", 16
    )
    record = json.loads((tmp_path / "out" / "checked.json").read_text())
    assert record["int8"] and record["agreement"]["accuracy"] is not None
    assert f"accuracy {record['agreement']['accuracy']:.1%} -> " in said
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_export_is_asked_for_what_it_needs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--to" in misused("export", pair[1], out)
    assert "add --images or --data" in misused("export", pair[1], out, "--to", "onnx", "--int8")
    assert "int8 is for onnx" in refused("export", pair[1], out, "--to", "native", "--int8", "--images", pair[0])
    assert not out.exists()

"""The benchmark on a pretrained tower, at a tiny size: no network, random weights, drawings made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from benchmarks.pretrained import cli, composite, drawings, figure, measures, runs, tower


def tiny() -> tuple[Dinov2Model, tower.Decoder]:
    torch.manual_seed(0)
    config = Dinov2Config(  # type: ignore[call-arg]
        hidden_size=32, num_attention_heads=4, num_hidden_layers=3, patch_size=14, image_size=28
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():  # stronger than at the start of a training: every branch counts
        if parameter.ndim == 2:
            parameter.data *= 10
    return model, tower.Decoder([32, 8, 8, 4]).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two folders of ten drawings each: bars, one way or the other, of many colours."""
    for kind in range(2):
        (tmp_path / f"bars {kind}").mkdir()
        for i in range(10):
            image = Image.new("RGBA", (60, 40) if i % 2 else (40, 60), (0, 0, 0, 0))
            image.paste((25 * i, 255 - 25 * i, 90, 255), (10, 10, 15, 35) if kind else (10, 10, 35, 15))
            image.save(tmp_path / f"bars {kind}" / f"{i}.png")
    return tmp_path


def test_sets_of_drawings_have_no_image_in_common(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = drawings.split(folder, 28, calibration=8, classes=2, each=2)
    chosen_by = drawings.split(folder, 28, calibration=8, classes=2, each=2, part="validation", draw=1)
    assert [len(one.pixels) for one in split] == [8, 4, 4]
    assert split.gallery.labels.tolist() == split.queries.labels.tolist() == [0, 0, 1, 1]
    every = torch.cat([*(one.pixels for one in split), chosen_by.queries.pixels]).flatten(1)
    assert len(every.unique(dim=0)) == len(every) == 20
    assert torch.equal(split.gallery.pixels, chosen_by.gallery.pixels)  # the draw is of calibration images
    assert not torch.equal(split.calibration.pixels, chosen_by.calibration.pixels)
    assert torch.allclose(every.view(20, 3, 28, 28)[:, :, 0, 0], (1 - drawings.MEAN[:, 0, 0]) / drawings.STD[:, 0, 0])
    with pytest.raises(ValueError, match="too few drawings"):
        drawings.split(folder, 28, calibration=9, classes=2, each=2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # the drawings have 2,400
    with pytest.raises(ValueError, match="too few drawings"):
        drawings.split(folder, 28, calibration=8, classes=2, each=2)


def test_measures_of_what_is_known() -> None:
    tokens, decoder = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(0)), tiny()[1]
    assert measures.cosines(tokens, 3 * tokens) == pytest.approx((1, 1))
    assert measures.cosines(tokens, -tokens) == pytest.approx((-1, -1))
    assert measures.saliency(decoder, tokens, tokens, (28, 28)) == pytest.approx((1, 1))
    assert measures.saliency(decoder, tokens, -tokens, (28, 28))[0] < 1
    labels = torch.tensor([0, 1, 2]).repeat_interleave(10)
    seen = torch.zeros(30, 2, 4)
    seen[:, 0] = torch.eye(4)[labels] + 0.1 * torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    for accuracy in (measures.neighbours, measures.probe):
        assert accuracy(seen, labels, seen, labels) == 100
        assert accuracy(seen, labels, seen, (labels + 1) % 3) == 0


def test_parts_of_photographs(tmp_path: Path) -> None:
    """Every photograph in turn, other parts each time, the same at every call."""
    for i in range(2):
        Image.fromarray(np.full((60, 90, 3), 100 + 100 * i, np.uint8)).save(tmp_path / f"{i}.jpg")
    found = drawings.photographs(tmp_path, 28, 5)
    values = found * drawings.STD + drawings.MEAN
    expected = torch.tensor([100, 200, 100, 200, 100]) / 255
    assert found.shape == (5, 3, 28, 28) and (values - expected.view(5, 1, 1, 1)).abs().max() < 0.01
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)).save(tmp_path / "0.jpg")
    one, other = drawings.photographs(tmp_path, 28, 5), drawings.photographs(tmp_path, 28, 5)
    assert torch.equal(one, other) and not torch.equal(one[0], one[2])


def test_rows_are_kept_and_read_again(folder: Path, tmp_path: Path) -> None:
    split = drawings.split(folder, 28, calibration=8, classes=2, each=2)
    told = {"part": "test", "draw": 0, "round": 1, "ridge": 1e-3, "views": 2, "source": "drawings"}
    wanted = cli.NAMES.split(";")
    output = tmp_path / "results"
    found = list(runs.rows(*tiny(), split, wanted, [0.7], told, output))
    assert [row["method"] for row in found] == ["dense", *wanted]
    dense, *others = found
    assert dense["macs"] == dense["iou"] == 1 and dense["cls"] == pytest.approx(1)
    assert all(row["macs"] <= 0.7 and row["cls"] < 1 - 1e-6 and row["latency"] > 0 for row in others)
    assert found[2]["cls"] > 0.99 > found[3]["cls"]  # compensated, and not
    files = {path: path.read_text() for path in output.iterdir()}
    assert list(runs.rows(*tiny(), split, wanted, [0.7], told, output)) == found
    assert {path: path.read_text() for path in output.iterdir()} == files
    table = CliRunner().invoke(cli.app, ["report", "--output", str(output), "--markdown"]).stdout
    assert len(table.splitlines()) == 2 + len(found)
    assert {json.loads(text)["method"] for text in files.values()} <= {*wanted, "dense"}


def test_tower_and_decoder_as_one_model(folder: Path) -> None:
    model, decoder = tiny()
    whole = composite.composite(model, decoder)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = decoder(model(pixel_values=pixels).last_hidden_state[:, 1:], (28, 28))
        assert torch.equal(whole(pixel_values=pixels).predicted_depth, expected)
    split = drawings.split(folder, 28, calibration=8, classes=2, each=2)
    untrained, trained = composite.rows(whole, split, composite.Goal(0.4, steps=60, rate=3e-4, batch=8))
    assert untrained["steps"] == 0 and trained["steps"] == 60
    assert untrained["correlation"] < trained["correlation"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "multiple of 14"),
        (["--methods", "luck"], "methods are"),
        (["--part", "train"], "part is one of"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_fetched(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["run", "--cache", "/nowhere", *arguments])
    assert done.exit_code == 2 and message in done.output


def test_the_rebuilt_tower_is_the_packages() -> None:
    graph = cli.CACHE / tower.GRAPH
    if not graph.exists():
        pytest.skip(f"{tower.PACKAGE} is not in {cli.CACHE}: python -m benchmarks.pretrained run fetches it")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert runs.check(graph, *tower.rebuild(graph)) < 1e-4


def test_the_figure_has_a_row_of_drawings_and_one_a_tower(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, decoder = tiny()
    split = drawings.split(folder, 28, calibration=8, classes=2, each=2)
    pixels = figure.one_a_class(split.queries, 2)
    assert torch.equal(pixels[1], split.queries.pixels[2])
    figure.draw(tmp_path / "two.png", {"dense": model, "again": model}, decoder, pixels)
    with Image.open(tmp_path / "two.png") as image:
        assert image.size == (240, 375)  # two columns, three rows
        rows = torch.from_numpy(np.array(image.convert("RGB"))).float()
    assert (
        (rows[125:250, 40:] - rows[250:375, 40:]).abs().mean()
        < 5
        < (rows[:125, 40:] - rows[125:250, 40:]).abs().mean()
    )

"""The pretrained tower in a folder that travels, and its recovery: a tiny tower, images of four squares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from benchmarks.pretrained import cli, drawings, payload, tower


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dinov2Model, tower.Decoder, drawings.Split]:
    torch.manual_seed(0)
    config = Dinov2Config(  # type: ignore[call-arg]
        hidden_size=128, num_attention_heads=2, num_hidden_layers=2, patch_size=14, image_size=28
    )
    model, decoder = Dinov2Model(config).eval(), tower.Decoder([128, 8, 8, 4]).eval()
    for parameter in model.parameters():  # stronger than at the start of a training: every branch counts
        if parameter.ndim == 2:
            parameter.data *= 5
    generator = torch.Generator().manual_seed(0)
    split = drawings.Split(
        *(
            drawings.Drawings(
                torch.randint(0, 256, (count, 3, 2, 2), generator=generator)
                .byte()
                .repeat_interleave(14, 2)
                .repeat_interleave(14, 3),
                torch.arange(count) % classes,
            )
            for count, classes in ((24, 1), (8, 2), (8, 2))
        )
    )
    folder = tmp_path_factory.mktemp("packed")
    assert payload.pack(folder, model, decoder, split, quality=100) < 1e6
    return folder, model, decoder, split


def test_what_is_packed_comes_out_again(packed: tuple[Path, Dinov2Model, tower.Decoder, drawings.Split]) -> None:
    folder, model, decoder, split = packed
    again, saliency, images = payload.unpack(folder)
    for one, other in ((model, again), (decoder, saliency)):
        theirs = other.state_dict()
        for name, tensor in one.state_dict().items():
            error = (theirs[name] - tensor).abs().float().max()
            assert error <= (0.006 * tensor.std() * 3 if tensor.ndim > 1 else 0), name
    for mine, found in zip(split, images, strict=True):
        assert torch.equal(mine.labels, found.labels) and mine.pixels.shape == found.pixels.shape
        assert (mine.pixels.float() - found.pixels.float()).abs().mean() < 15
    assert drawings.normalised(images.queries.pixels).shape == (8, 3, 28, 28)


@pytest.mark.slow
def test_rows_of_recoveries(packed: tuple[Path, Dinov2Model, tower.Decoder, drawings.Split], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = ["recover", str(packed[0]), "--device", "cpu", "--steps", "4", "--round-to", "1", "--size", "28"]
    done = CliRunner().invoke(cli.app, [*arguments, "--jobs", "plain;stock", "--output", str(rows)])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["name"] for row in found] == [
        *(f"long magnitude 0.5, rate {rate}" for rate in ("0.0003", "0.0001")),
        "long stock 0.5, random, rate 0.0005",
        "long stock 0.5, every other layer, rate 0.0003",
    ]
    for row in found:
        assert row["losses"][str(row["best"])] == min(row["losses"].values()) < row["losses"]["0"]
        assert row["curve"]["0"][0] == pytest.approx(row["start"]["cls"], abs=1e-5)
        assert len(row["curve"]) == 5 and row["settings"]["steps"] == 4 and row["seconds_a_step"] > 0
    assert found[0]["start"]["macs"] <= 0.5
    late = CliRunner().invoke(cli.app, [*arguments, "--jobs", "plain", "--budget", "0", "--output", str(rows)])
    assert late.exit_code == 0 and "skipped" in late.output
    assert len(rows.read_text().splitlines()) == len(found)
    unknown = CliRunner().invoke(cli.app, [*arguments, "--jobs", "luck"])
    assert unknown.exit_code == 2 and "jobs are" in unknown.output


@pytest.mark.slow
def test_fits_to_all_drawings_are_kept_and_trained_on(
    packed: tuple[Path, Dinov2Model, tower.Decoder, drawings.Split], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = ["recover", str(packed[0]), "--device", "cpu", "--steps", "4", "--round-to", "1", "--size", "28"]
    done = CliRunner().invoke(cli.app, [*arguments, "--jobs", "refit;trained", "--output", str(rows)])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    names = [f"refitted {share}" for share in (0.5, 0.35)]
    assert [row["name"] for row in found] == [*names, *(f"{name}, then trained" for name in names)]
    for fitted, trained in zip(found[:2], found[2:], strict=True):
        assert fitted["cpu_seconds"] > 0 and trained["settings"]["steps"] == 4
        assert fitted["end"] == pytest.approx(trained["start"], abs=1e-4)


@pytest.mark.slow
def test_a_curve_has_a_row_a_number_of_images(
    packed: tuple[Path, Dinov2Model, tower.Decoder, drawings.Split], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = ["recover", str(packed[0]), "--device", "cpu", "--round-to", "1", "--size", "28"]
    done = CliRunner().invoke(cli.app, [*arguments, "--jobs", "images", "--output", str(rows)])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["images"] for row in found] == [1024, 256, 128, 2048]
    assert all(row["end"]["macs"] <= 0.5 and row["cpu_seconds"] > 0 for row in found)

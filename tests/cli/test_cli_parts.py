"""Towers of bigger models on the command line: inspected, pruned without labels, compared by zero-shot accuracy."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, pipeline

import words
from command_line import misused, printed, refused
from hf_vitprune import PruningPlan, count, prune
from hf_vitprune.errors import InvalidDataError, UnsupportedModelError
from hf_vitprune.evaluation.zero_shot import zero_shot_accuracy
from hf_vitprune_cli import evaluated
from processes import run_python
from tiny_composites import dual, pixels, upernet

tokenizer = partial(words.tokenizer, "red", "blue")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    dual("CLIP")()[0].save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images a class."""
    root, noise = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir()
        for i in range(10):
            image = noise.integers(0, 60, (16, 16, 3)).astype("uint8")
            image[..., channel] += 150
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def test_inspect_and_prune(clip: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vitprune_cli.workflow.plot_kept", lambda *_: None)
    out = tmp_path / "small"
    printed("prune", clip, out, "--part", "vision", "--images", colours, "--target", 0.6, "--round-to", 1)
    before, after = (json.loads(printed("inspect", p, "--part", "vision", "--json")) for p in (clip, out))
    model = CLIPModel.from_pretrained(clip)
    assert before["macs"] == count(model, part="vision").macs == after["dense"]["macs"]
    assert 0.5 * before["macs"] < after["macs"] <= 0.6 * before["macs"]
    assert "no part 'wings'" in refused("inspect", clip, "--part", "wings")
    assert "--part is for a tower" in misused("prune", clip, out, "--force", "--part", "vision", "--data", colours)
    assert 'pipeline("zero-shot-image-classification"' in (out / "README.md").read_text()  # it has its tokenizer
    rows = json.loads(printed("report", clip, out, "--part", "vision", "--classes", colours, "--json"))
    assert [row["zero-shot accuracy"] for row in rows] == [
        json.loads(printed("inspect", p, "--part", "vision", "--classes", colours, "--json"))["zero_shot_accuracy"]
        for p in (clip, out)
    ]


@pytest.mark.slow
def test_zero_shot_pipeline_in_a_fresh_process(clip: Path, tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(clip).eval()
    small = prune(model, PruningPlan.random(model, 0.4, ["heads", "qk", "v", "mlp"], part="vision"))
    small.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.full((16, 16, 3), 120, dtype="uint8"))
    image.save(tmp_path / "image.png")
    found = run_python(
        "import sys, json, hf_vitprune; from transformers import pipeline; from PIL import Image;"
        "pipe = pipeline('zero-shot-image-classification', model=sys.argv[1]);"
        "image = Image.open(sys.argv[1] + '/image.png');"
        "rows = pipe(image, candidate_labels=['red', 'blue'], hypothesis_template='a photo of a {}');"
        "print(json.dumps([type(pipe.model).__name__, {r['label']: r['score'] for r in rows}]))",
        str(tmp_path),
    )
    name, scores = json.loads(found.splitlines()[-1])
    here = pipeline("zero-shot-image-classification", model=small, tokenizer=tokenizer(), image_processor=processor)
    rows: Any = here(image, candidate_labels=["red", "blue"], hypothesis_template="a photo of a {}")
    assert name == "PrunedCLIPModel"
    assert scores == {row["label"]: row["score"] for row in rows}  # bit for bit


def test_zero_shot_accuracy_at_chance_is_told(
    clip: Path, colours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for accuracy in (0.5, 1.0):
        monkeypatch.setattr(evaluated, "zero_shot_accuracy", lambda *_, accuracy=accuracy: accuracy)
        assert evaluated.accuracy_of_saved(str(clip), str(colours)) == accuracy
        told = capsys.readouterr().err
        assert ("right on 50.0% of 4 evaluation images, no better than chance" in told) == (accuracy == 0.5)
        assert ("captions like 'a photo of a blue'" in told) == (accuracy == 0.5)


def test_accuracy_is_that_of_the_closest_caption() -> None:
    model = dual("CLIP")()[0]
    words = tokenizer()(["a photo of a red.", "a photo of a blue."], return_tensors="pt")
    inputs = {name: words[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        right = model(pixel_values=pixels(6), **inputs).logits_per_image.argmax(-1)
    rows = {"pixel_values": pixels(6), "labels": right}
    assert zero_shot_accuracy(model, tokenizer(), rows, ["red", "blue"], batch_size=4) == 1
    rows["labels"] = torch.tensor([1 - right[0], *right[1:]])
    assert zero_shot_accuracy(model, tokenizer(), rows, ["red", "blue"]) == pytest.approx(5 / 6)
    with pytest.raises(InvalidDataError, match="numbers of the 1 classes"):
        zero_shot_accuracy(model, tokenizer(), {**rows, "labels": torch.ones(6).long()}, ["red"])
    with pytest.raises(InvalidDataError, match="has none"):
        zero_shot_accuracy(model, tokenizer(), rows, ["red", "blue"], template="a photo")
    with pytest.raises(UnsupportedModelError, match="dual encoders"):
        zero_shot_accuracy(upernet()[0], tokenizer(), rows, ["red", "blue"])

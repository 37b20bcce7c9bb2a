"""The demo and `hf-vitprune prune`, shortened: real data, real training, real files."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from typer.testing import CliRunner

import hf_vitprune
from hf_vitprune import PruningPlan, count, register_method
from hf_vitprune.methods import registry
from hf_vitprune.utils.data import load_images
from hf_vitprune_cli import digits as demo
from hf_vitprune_cli.main import app
from hf_vitprune_cli.workflow import Schedule
from image_folders import image_folder
from toy_method import Toy, ToyConfig


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """(rows, folder, printed text) of a demo on half of the images, of eight epochs, then of one a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_images", lambda *args, **kwargs: load_images(*args, **kwargs).at_most(train=720))
        for name, epochs in (("PRETRAIN", 8), ("LEARN", 1), ("TUNE", 1)):
            patch.setattr(demo, name, Schedule(epochs=epochs, learning_rate=2e-3))
        patch.setattr(demo, "METHODS", tuple(_shortened(method) for method in demo.METHODS))
        console = Console(record=True, width=120)
        folder = tmp_path_factory.mktemp("demo")
        rows = demo.run_demo(folder, console=console)
        yield rows, folder, console.export_text()


def _shortened(method):
    """SLS with fewer samples, whose t-SNE takes half of the time of a short demo; gates that turn over in an epoch."""
    changes = {"SLS": {"max_samples": 120}, "SPViT": {"gate_learning_rate": 0.24}}.get(method.name, {})
    config = replace(method.config(), **changes)
    return method._replace(config=lambda: config)


def test_the_demo_prints_what_it_measured(short_demo):
    rows, _, text = short_demo
    by_name = {row["name"]: row for row in rows}
    dense = by_name["dense"]
    assert dense["accuracy"] > 0.3  # eight epochs; guessing gives 0.1
    for method in ("VTP", "NViT", "SPViT"):
        pruned = by_name[f"{method}, final"]
        assert pruned["macs"] <= 0.5 * dense["macs"] and pruned["params"] < 0.6 * dense["params"]
    assert by_name["SLS, final"]["macs"] <= dense["macs"]
    assert {"VTP, just pruned", "VTP, compensated"} <= by_name.keys()
    assert "SLS, compensated" not in by_name  # adapters on a backbone that other tasks share
    one_shot = by_name["one-shot, without fine-tuning"]
    assert one_shot["macs"] <= 0.5 * dense["macs"] and one_shot["accuracy"] > dense["accuracy"] - 0.02
    for row in (dense, pruned, by_name["SLS, final"], one_shot):
        assert f"{row['accuracy']:.1%}" in text and row["latency_ms"] > 0


def test_the_demo_leaves_a_complete_model_folder(short_demo):
    _, folder, _ = short_demo
    files = {path.name for path in (folder / "vtp").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "README.md",
        "plan.json",
        "kept.png",
    } <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    model = AutoModelForImageClassification.from_pretrained(folder / "vtp")
    assert hf_vitprune.Architecture.of(model) == PruningPlan.load(folder / "vtp" / "plan.json").architecture
    made = {method.name.lower() for method in demo.METHODS} | {"one-shot", "dense"}
    assert {path.name for path in folder.iterdir()} == made


def test_the_demo_ends_with_what_was_made_and_the_next_command(short_demo):
    _, folder, text = short_demo
    made, after = text.replace("\n", " ").split("Made in ")[1].split("Next: hf-vitprune ")
    assert made.startswith(f"{folder}: dense, vtp, nvit, ")
    result = CliRunner().invoke(app, after.split())
    assert result.exit_code == 0 and "MACs" in result.output


def test_every_stage_of_the_demo_trains():
    """No schedule may be empty, or a row would show an untrained model."""
    assert min(s.epochs for s in (demo.PRETRAIN, demo.LEARN, demo.TUNE)) > 0
    assert {method.name for method in demo.METHODS} >= {"VTP", "NViT", "SLS"}


@pytest.fixture
def classifier_folder(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run_prune(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


@pytest.mark.parametrize(("method", "target"), [("VTP", 0.6), ("NViT", 0.6), ("Toy", 0.75)])  # Toy: somebody else's
def test_prune_makes_a_loadable_folder_from_a_folder_of_images(
    method, target, classifier_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    register_method(ToyConfig, Toy)
    images = image_folder(tmp_path / "pets")
    out = tmp_path / "small"
    options = ["--steps", 10, "--target", target, "--train", "labels,batch_size=4", "--method", method.lower()]
    result = run_prune(classifier_folder, out, "--data", images, *options)
    assert result.exit_code == 0, result.output
    model = AutoModelForImageClassification.from_pretrained(out)
    dense = AutoModelForImageClassification.from_pretrained(classifier_folder)
    assert count(model).macs <= target * count(dense).macs
    assert json.loads((out / "config.json").read_text())["pruning_config"]["info"]["method"] == method
    card = (out / "README.md").read_text()
    assert "before" in card and f"- method: `{method}`" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "magic"), "unknown method 'magic'"),
        (("--target", 1.5), "target must lie strictly between 0 and 1"),
        (("--target", 0.001), "cannot be reached"),
    ],
)
def test_bad_requests_are_one_line(classifier_folder, tmp_path, arguments, message):
    data = image_folder(tmp_path / "pets")
    result = run_prune(classifier_folder, tmp_path / "out", "--data", data, *arguments)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_classifier_for_other_classes_is_refused_unless_replaced(classifier_folder, tmp_path):
    images = image_folder(tmp_path / "pets", classes=("a", "b", "c"))
    result = run_prune(classifier_folder, tmp_path / "out", "--data", images)
    assert result.exit_code == 1 and "--new-head" in result.output
    options = ["--steps", 10, "--new-head", "--target", 0.6, "--train", "labels,batch_size=4"]
    result = run_prune(classifier_folder, tmp_path / "out", "--data", images, *options)
    assert result.exit_code == 0, result.output
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {
        0: "a",
        1: "b",
        2: "c",
    }

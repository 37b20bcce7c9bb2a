"""``hf-vitprune prune`` without labels: unlabelled images or stored scores in, a model folder out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    TrainerState,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from command_line import call, misused, printed, refused
from hf_vitprune import PruningPlan, count
from hf_vitprune.errors import InvalidDataError
from hf_vitprune.utils.data import read_folder
from hf_vitprune_cli import from_images, workflow
from hf_vitprune_cli.progress import NamedProgress
from processes import ROOT, run, run_on_two
from tiny import make, reset_weights

PAGE = ROOT / "docs" / "compensation.md"
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=16, patch_size=8
    )
    folder = tmp_path_factory.mktemp("models") / "digits"
    reset_weights(ViTForImageClassification(config)).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits, at several depths, and a file that is no image."""
    root = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(load_digits().images[:40]):
        path = root / ("a" if i % 2 else "b/c") / f"{i}.{'png' if i % 3 else 'JPG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9375).astype("uint8")).save(path)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plot and one round of timing: both are tested elsewhere."""
    monkeypatch.setattr("hf_vitprune_cli.workflow.plot_kept", lambda *_: None)
    monkeypatch.setattr(workflow, "measure_speed", partial(workflow.measure_speed, rounds=1))


def ratio(small: Path, dense: Path) -> float:
    models = (AutoModelForImageClassification.from_pretrained(path) for path in (small, dense))
    a, b = (count(model).macs for model in models)
    return a / b


def test_the_commands_of_the_documentation(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order: a model from images, the same with its scores kept, another one from the scores alone."""
    monkeypatch.chdir(tmp_path)
    commands = [
        line.split("#")[0].split()[1:] for line in PAGE.read_text().splitlines() if line.startswith("hf-vitprune ")
    ]
    assert len(commands) == 3
    written: list[set[str]] = []
    for command in commands:
        before = {path.name for path in tmp_path.iterdir()}
        names = {"MODEL": model, "FOLDER": folder}
        force = ["--force"] if "small" in command and (tmp_path / "small").exists() else []
        if "--images" not in command:
            monkeypatch.setattr("hf_vitprune.utils.images.open_image", None)  # no image is read
        text = printed(*(names.get(word, word) for word in command), *force)
        assert "speed-up" in text and "from 40 unlabelled images" in text
        written.append({path.name for path in tmp_path.iterdir()} - before)
    assert written == [{"small"}, {"scores.safetensors"}, {"smaller"}]
    for name, target in (("small", 0.6), ("smaller", 0.4)):
        assert target - 0.15 < ratio(tmp_path / name, model) <= target
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files >= {"model.safetensors", "preprocessor_config.json", "README.md", "plan.json", "kept.png"}
        plan = PruningPlan.load(tmp_path / name / "plan.json")
        assert plan.info["target"] == target and plan.info["method"] == "OneShot"
    assert "OneShot" in (tmp_path / "small" / "README.md").read_text()
    assert "small is there already" in refused("prune", model, "small", "--scores", "scores.safetensors")
    assert "scores.safetensors is there already" in refused(
        "prune", model, "another", "--images", folder, "--scores", "scores.safetensors"
    )


def test_the_same_sizes_in_every_layer_make_a_stock_folder(
    model: Path, folder: Path, tmp_path: Path, quick: None
) -> None:
    small = tmp_path / "small"
    printed("prune", model, small, "--images", folder, "--target", 0.6, "--uniform", "--scores", tmp_path / "scores")
    assert 0.45 < ratio(small, model) <= 0.6
    assert type(AutoModelForImageClassification.from_pretrained(small)) is ViTForImageClassification
    assert not (small / "modeling_hf_vitprune.py").exists()
    printed("prune", model, small, "--scores", tmp_path / "scores", "--target", 0.8, "--uniform", "--force")
    assert type(AutoModelForImageClassification.from_pretrained(small)) is ViTForImageClassification
    assert "NViTConfig has no uniform" in refused(
        "prune", model, tmp_path / "other", "--data", "digits", "--method", "nvit", "--uniform"
    )


def test_a_second_run_gives_the_same_model_over_what_is_there(
    model: Path, folder: Path, tmp_path: Path, quick: None
) -> None:
    for name, target in (("a", 0.6), ("b", 0.8), ("b", 0.6)):
        printed("prune", model, tmp_path / name, "--images", folder, "--target", target, "--force")
    same = (AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(x, y) for x, y in zip(*(s.values() for s in same), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scores", "{digits}/notes.txt"), "no file of one-shot scores"),
        (("--scores", "{digits}/nothing"), "nothing"),
        (("--images", "{digits}/nowhere"), "is no folder"),
        (("--images", "{digits}", "--target", 0.01), "cannot be reached"),
        (("--images", "{digits}", "--target", 1.5), "target must lie strictly between 0 and 1"),
        (("--images", "{digits}", "--target-metric", "latency"), "LatencyTable or a file"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[object, ...],
    message: str,
    model: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [str(argument).replace("{digits}", str(folder)) for argument in arguments]
    assert message in refused("prune", model, "out", *filled)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model",), "Missing argument"),
        (("model", "out"), "give --data"),
        (("model", "data", "out", "--data", "digits"), "unexpected extra argument"),
        (("model", "out", "--data", "digits", "--images", "i"), "--data is for training on labels"),
        (("model", "out", "--data", "digits", "--scores", "s"), "--data is for training on labels"),
        (("model", "out", "--data", "digits", "--method", "oneshot"), "takes no labels"),
        (("model", "out", "--images", "i", "--method", "vtp"), "--method vtp trains on labels"),
        (("model", "out", "--images", "i", "--train", "labels"), "give them by --data"),
        (("model", "out", "--data", "digits", "--train", "features"), "looks at no labels"),
        (("model", "out", "--data", "digits", "--train", "none"), "looks at no labels"),
        (("model", "out", "--scores", "s", "--train", "features"), "has none of"),
        (("model", "out", "--images", "i", "--steps", "3"), "add --train features"),
        (("model", "out", "--images", "i", "--train", "features", "--steps", "0"), "--steps"),
        (("model", "out", "--images", "i", "--train", "none,learning_rate=1e-3"), "add --train features"),
        (("model", "out", "--images", "i", "--train", "feature"), "not one of none, features, labels"),
        (("model", "out", "--images", "i", "--train", "features,rate=1"), "learning_rate=..., batch_size=..."),
        (("model", "out", "--images", "i", "--train", "features,learning_rate=nan"), "above 0"),
        (("model", "out", "--images", "i", "--train", "features,batch_size=1,batch_size=2"), "above 0"),
        (("model", "out", "--images", "i", "--train", "features,batch_size=1.5"), "batch_size=..."),
        (("model", "out", "--images", "i", "--batch-size", "8"), "No such option"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hf_vitprune_cli.from_images", None)  # nothing is loaded for it
    monkeypatch.setitem(sys.modules, "hf_vitprune_cli.from_labels", None)
    assert message in misused("prune", *arguments)


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_a_backbone_is_trained_on_features_and_never_ends_worse(
    rate: float, folder: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_images, "NUM_CALIBRATED", 4)  # few, so that there is something to learn
    dense = make("Dinov2Model")
    dense.save_pretrained(tmp_path / "dense")
    PROCESSOR.save_pretrained(tmp_path / "dense")
    options = ("--images", folder, "--steps", 40, "--target", 0.6)
    how = f"features,learning_rate={rate},batch_size=8"
    text = printed("prune", tmp_path / "dense", tmp_path / "small", *options, "--train", how)
    assert "and trained on the dense model's features, from 4 unlabelled images" in text
    assert ("no training step was better" in text) == (rate == 10.0)
    small = AutoModel.from_pretrained(tmp_path / "small")
    assert count(small).macs <= 0.6 * count(dense).macs


def test_a_training_that_was_cut_off_goes_on(
    folder: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_images, "NUM_CALIBRATED", 4)
    make("Dinov2Model").save_pretrained(tmp_path / "dense")
    PROCESSOR.save_pretrained(tmp_path / "dense")
    options = ("--images", folder, "--train", "features,batch_size=8,learning_rate=1e-3", "--steps", 20)
    command = ("prune", tmp_path / "dense")
    printed(*command, tmp_path / "whole", *options)

    def dies(self: NamedProgress, args: object, state: TrainerState, *rest: object, **others: object) -> None:
        if state.global_step == 13:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NamedProgress, "on_step_end", dies)
        assert call(*command, tmp_path / "out", *options).exit_code != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unfinished"]
    message = refused(*command, tmp_path / "out", *options, "--target", 0.6)
    assert "other settings (target: 0.5, not 0.6)" in message and "--force" in message
    monkeypatch.setattr(from_images.OneShotScores, "measure", None)  # nothing is scored again
    assert "going on with the training" in printed(*command, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "unfinished").exists()
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert same[0].keys() == same[1].keys() and all(torch.equal(same[0][key], same[1][key]) for key in same[0])


def test_no_images_to_hold_out(model: Path, folder: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    single.mkdir()
    (single / "a.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    assert "there is one image" in refused("prune", model, tmp_path / "o", "--images", single, "--train", "features")


def test_scores_of_another_model_and_a_model_without_a_processor(
    model: Path, folder: Path, tmp_path: Path, quick: None
) -> None:
    scores, out = tmp_path / "s.safetensors", tmp_path / "out"
    printed("prune", model, tmp_path / "a", "--images", folder, "--scores", scores, "--target", 0.7)
    other = AutoModelForImageClassification.from_pretrained(model)
    other.classifier.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    assert "other weights" in refused("prune", tmp_path / "other", out, "--scores", scores)
    assert "no usable image processor" in refused("prune", tmp_path / "other", out, "--images", folder)
    assert not out.exists()


# ---------------------------------------------------------------------- folders
def test_images_are_drawn_by_the_seed_and_read_as_the_processor_says(folder: Path) -> None:
    everything = read_folder(folder, PROCESSOR)
    assert everything.shape == (40, 3, 16, 16)
    some = read_folder(folder, PROCESSOR, limit=10, seed=3)
    assert torch.equal(some, read_folder(folder, PROCESSOR, limit=10, seed=3)) and len(some) == 10
    assert not torch.equal(some, read_folder(folder, PROCESSOR, limit=10, seed=4))
    assert all(any(torch.equal(image, known) for known in everything) for image in some)


def test_folders_without_usable_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="no images in"):
        read_folder(tmp_path, PROCESSOR)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(InvalidDataError, match=r"broken\.png cannot be read as an image"):
        read_folder(tmp_path, PROCESSOR)
    with pytest.raises(InvalidDataError, match="no folder"):
        read_folder(tmp_path / "broken.png", PROCESSOR)
    (tmp_path / "broken.png").unlink()
    for i, size in enumerate(((8, 9), (9, 8))):
        Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    uncropped = ViTImageProcessorPil(do_resize=False)
    with pytest.raises(InvalidDataError, match="images of 2 sizes"):
        read_folder(tmp_path, uncropped)


def launch(*words: str) -> str:
    """By ``accelerate launch`` on two processes; without GPUs ``--multi_gpu`` starts them all the same."""
    settings = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    return run("-m", "accelerate.commands.launch", *settings, "--dynamo_backend", "no", *words)


@pytest.mark.slow
@pytest.mark.parametrize("on_two", [run_on_two, launch])
def test_two_processes_split_the_images_and_one_writes(
    on_two: Callable[..., str], model: Path, folder: Path, tmp_path: Path
) -> None:
    names = ["prune", str(model), "OUT", "--images", str(folder), "--target", "0.6", "--scores", "SCORES"]
    for out, launch in ((tmp_path / "two", on_two), (tmp_path / "one", run)):
        values = {"OUT": str(out), "SCORES": str(out) + ".safetensors"}
        words = (values.get(name, name) for name in names)
        printed = launch("-m", "hf_vitprune_cli.main", *words, "--train", "none,batch_size=8")
        assert printed.count("saved to") == 1
    assert (
        PruningPlan.load(tmp_path / "two" / "plan.json").layers
        == PruningPlan.load(tmp_path / "one" / "plan.json").layers
    )
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("quick")
def test_layers_that_memory_has_no_room_for_are_read_from_the_disk(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--images", folder, "--target", 0.6, "--round-to", 1]
    printed("prune", model, tmp_path / "whole", *options)
    weights = load_file(model / "model.safetensors").values()
    size = sum(tensor.numel() * tensor.itemsize for tensor in weights)
    monkeypatch.setattr(from_images, "_free_memory", lambda: 2 * size + 1)
    assert "latency" in printed("prune", model, tmp_path / "fits", *options)
    monkeypatch.setattr(from_images, "_free_memory", lambda: 2 * size)
    out = printed("prune", model, tmp_path / "streamed", *options)
    assert (
        "read from the disk, one at a time" in out and "latency" not in out and "MACs" in out
    )  # a model on the disk is not timed
    whole, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "streamed"))
    assert whole.keys() == streamed.keys() and all(torch.equal(whole[name], streamed[name]) for name in whole)

"""What commands write never takes the place of what they read, and of nothing else without --force."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from command_line import VIT, call, printed, refused, saved
from hf_vitprune_cli.app import empty_output
from image_folders import image_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """``home/model``, a link to it, images, and a folder with a file of the user's in it."""
    saved(tmp_path / "home" / "model", VIT)
    (tmp_path / "link").symlink_to(tmp_path / "home" / "model")
    image_folder(tmp_path / "images", count=2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "weights.pth").write_bytes(b"weights")
    (tmp_path / "layers.json").write_text('{"mixer": [], "mlp_hidden": []}')
    return tmp_path


MODES = {
    "labels": ("prune", "MODEL", "OUT", "--data", "IMAGES"),
    "images": ("prune", "MODEL", "OUT", "--images", "IMAGES"),
    "features": ("prune", "MODEL", "OUT", "--images", "IMAGES", "--train", "features"),
    "scores": ("prune", "MODEL", "OUT", "--scores", "weights.pth"),
    "export": ("export", "MODEL", "OUT", "--to", "native"),
    "convert": ("convert", "weights.pth", "OUT", "--base", "MODEL", "--layers", "layers.json"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_never_written_over(mode: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    for model, out, how in (
        ("home/model", "home/model", "is home/model"),
        ("link", "home/model/", "is link"),
        ("home/model", "link", "is home/model"),
        ("home/model", "link/small", "lies in home/model"),
        ("home/model", "home/other/../model/a/b", "lies in home/model"),
        ("link", "home", "holds link"),
        ("link", ".", "holds link"),
    ):
        names = {"MODEL": model, "OUT": out, "IMAGES": "images"}
        words = [names.get(word, word) for word in MODES[mode]]
        for force in ([], ["--force"]):
            line = refused(*words, *force)
            assert how in line and "which is read" in line, (model, out)
    assert contents(place) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_with_something_in_it_takes_force(mode: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    words = [{"MODEL": "link", "OUT": "taken", "IMAGES": "images"}.get(word, word) for word in MODES[mode]]
    assert "taken is there already; choose another place, or add --force" in refused(*words)
    words[words.index("taken")] = "weights.pth" if mode != "scores" and mode != "convert" else "layers.json"
    assert "is a file, and a folder is written" in refused(*words, "--force") or mode == "convert"
    assert contents(place) == before


def test_data_is_not_written_over(place: Path) -> None:
    before, images = contents(place), place / "images"
    for option in ("--data", "--images"):
        for out in (images, images / "cat", images / "small"):
            assert "which is read" in refused("prune", place / "link", out, option, images, "--force")
    assert "which is read" in refused("prune", place / "link", images, "--data", f"{images},label=x", "--force")
    scores = images / "cat" / "0.png"
    words = ("prune", place / "link", place / "out", "--images", images, "--scores")
    assert "lies in" not in refused(*words, place / "weights.pth")
    assert "is there already" in refused(*words, place / "weights.pth")
    assert "lies in" in refused(*words, place / "home" / "model" / "model.safetensors", "--force")
    assert "is there already" in refused(*words, scores)
    assert contents(place) == before


def test_files_beside_a_model(place: Path) -> None:
    """A card or a figure may take the place of another with --force, and nothing the place of the model's files."""
    model = place / "home" / "model"
    before = contents(model)
    printed("card", model, "--out", model / "README.md")
    assert "is there already" in refused("card", model, "--out", place / "link" / "README.md")
    printed("card", model, "--out", model / "README.md", "--force")
    for command in (
        ("card", model, "--out", model / "config.json"),
        ("latency", model, "--out", place / "link" / "config.json"),
        ("report", model, place / "link", "--plot", model / "config.json"),
        ("inspect", model, "--plot", model / "config.json"),
        ("latency", model, "--out", place / "t.json", "--show", model / "config.json"),
    ):
        assert "lies in" in refused(*command, "--force"), command
    figure = place / "taken" / "kept.png"
    figure.write_bytes(b"another figure")
    for command in (
        ("report", model, place / "link", "--plot", figure),
        ("inspect", model, "--plot", figure),
        ("latency", model, "--out", place / "t.json", "--show", figure),
    ):
        assert "kept.png is there already" in refused(*command), command
    assert "is a folder, and a file is written" in refused("card", model, "--out", place / "taken", "--force")
    assert "taken is there already" in refused("demo", "--output", place / "taken")
    for name in ("README.md", "kept.png"):  # a card and its figure
        (model / name).unlink()
    assert contents(model) == before and figure.read_bytes() == b"another figure"


def test_what_may_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "empty").mkdir()
    for out, force in ((Path("new"), False), (Path("empty"), False), (Path("home/new"), False), (Path("taken"), True)):
        assert empty_output(out, force, "home/model", "google/vit-base-patch16-224", None) == out
    assert empty_output(Path("google"), False, "google/vit-base-patch16-224") == Path("google")  # an id, no folder
    shutil.rmtree("empty")
    assert call("export", "home/model", "taken", "--to", "native", "--force").exit_code == 0
    assert (place / "taken" / "mine.txt").exists() and (place / "taken" / "model.safetensors").exists()

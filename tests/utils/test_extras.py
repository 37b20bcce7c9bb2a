"""What is not installed is found before the work that it is needed for."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from command_line import refused, saved
from hf_vitprune.contrib.augment import check_available
from hf_vitprune.errors import MissingExtraError
from hf_vitprune.utils import extras
from hf_vitprune.utils.figures import new_figure
from hf_vitprune.utils.images import image_files
from processes import ROOT


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No optional package is installed."""
    found = extras.find_spec
    absent = set(extras._EXTRAS)
    monkeypatch.setattr(extras, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))


def test_the_package_and_its_extra_are_named(nothing: None, tmp_path: Path) -> None:
    for needing, words in (
        (lambda: new_figure(1, 1), r"plots need matplotlib: pip install 'hf_vitprune\[plots\]'"),
        (check_available, r"augmentations need kornia: pip install 'hf_vitprune\[augment\]'"),
        (lambda: image_files(tmp_path), r"images need Pillow: pip install 'hf_vitprune\[vision\]'"),
    ):
        with pytest.raises(MissingExtraError, match=words) as caught:
            needing()
        assert isinstance(caught.value, ImportError)


def test_every_extra_is_one_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for _, cure in extras._EXTRAS.values():
        name = cure.partition("[")[2].partition("]")[0]
        assert f"\n{name} = [" in text, name


COMMANDS: dict[str, list[Any]] = {
    "inspect": ["inspect", "MODEL", "--plot", "OUT/a.png"],
    "report": ["report", "MODEL", "MODEL", "--plot", "OUT/a.png"],
    "latency": ["latency", "MODEL", "--out", "OUT/table.json", "--show", "OUT/a.png"],
    "prune": ["prune", "MODEL", "OUT/small", "--data", "digits"],
    "demo": ["demo", "--output", "OUT/demo"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_draw_at_their_end(command: str, nothing: None, tmp_path: Path) -> None:
    """Refused before anything is read, timed, trained or written."""
    saved(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # nobody comes that far
    places = {"MODEL": str(tmp_path / "model"), "OUT": str(tmp_path / "out")}
    words = [
        arg if arg == command else arg.replace("MODEL", places["MODEL"]).replace("OUT", places["OUT"])
        for arg in COMMANDS[command]
    ]
    assert "need matplotlib: pip install 'hf_vitprune[plots]'" in refused(*words)
    assert not (tmp_path / "out").exists()


def test_optional_packages_are_imported_behind_the_check() -> None:
    """Not at the top of a module, and in every function only after ``need``."""
    optional = {name for name in extras._EXTRAS if name not in ("PIL", "deepspeed")}  # come with others, by ``data``
    elsewhere = [ROOT / "hf_vitprune" / "publish" / name for name in ("exporters", "bench")]  # formats looks for them
    for path in [*(ROOT / "hf_vitprune").rglob("*.py"), *(ROOT / "hf_vitprune_cli").rglob("*.py")]:
        if any(folder in path.parents for folder in elsewhere):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.partition(".")[0] in optional for name in names):
                text = path.read_text(encoding="utf-8")
                assert "need(" in text or "check_available" in text, f"{path}:{node.lineno}"
                assert not any(node is top for top in tree.body), f"{path}:{node.lineno} is imported at the top"

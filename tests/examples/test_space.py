"""The Space: driven in a browser, an image uploaded and the slider moved; and as the Hub would start it."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import RepoCard
from PIL import Image
from transformers import ViTImageProcessorPil

from browser import Visits, scrolls_sideways
from hf_vitprune import OneShotScores, count, prune
from hf_vitprune.errors import InvalidConfigError, InvalidDataError, UnsupportedModelError
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.publish.report import human
from processes import ROOT
from tiny import feed, images, make

SPACE = ROOT / "examples" / "space"


@pytest.fixture(scope="module")
def app() -> ModuleType:
    pytest.importorskip("gradio", reason="no gradio: pip install 'hf_vitprune[space]'")
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scored(folder: Path, name: str, **settings: Any) -> Path:
    """A saved model with image processor and scores."""
    model = make(name, intermediate_size=64) if name.startswith("ViT") else make(name)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    data = [{name: tensor[0] for name, tensor in feed(model, images(1, seed=i)).items()} for i in range(8)]
    OneShotScores.measure(model, data, OneShotSettings(**settings)).save(folder / "scores.safetensors")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB").save(path)
    return path


@pytest.fixture
def served(app: ModuleType) -> Iterator[Any]:
    """Starts the app of a model, in this process."""
    pages: list[Any] = []

    def start(cuts: Any) -> str:
        pages.append(app.build(cuts))
        _, url, _ = pages[-1].launch(
            prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", server_port=_free_port()
        )
        return url

    yield start
    for page in pages:
        page.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def numbers(page: Any, macs: str) -> dict[str, list[str]]:
    """The table, as soon as the small model has this many multiply-adds: name of a number -> of dense and small."""
    row = page.locator("#numbers tr", has=page.get_by_role("cell", name="MACs", exact=True))
    row.get_by_role("cell", name=macs, exact=True).wait_for(timeout=20_000)
    rows = [row.inner_text().split("\t") for row in page.locator("#numbers tr").all()]
    return {name: values for name, *values in rows}


def small_macs(folder: Path, percent: int) -> str:
    scores = OneShotScores.load(folder / "scores.safetensors")
    return human(count(scores.plan(percent / 100).architecture).macs)


def test_a_classifier_is_cut_by_the_slider(
    app: ModuleType, served: Any, visits: Visits, picture: Path, tmp_path: Path
) -> None:
    folder = scored(tmp_path / "vit", "ViTForImageClassification")
    cuts = app.Cuts(str(folder))
    page = visits.open(served(cuts))
    slider = page.locator("input[type=range]")
    low, high = int(slider.get_attribute("min")), int(slider.get_attribute("max"))
    assert (low, high) == (cuts.percentages[0], 95) and low < 50
    before = numbers(page, small_macs(folder, 50))
    dense = count(make("ViTForImageClassification", intermediate_size=64))
    assert list(before) == ["", "params", "MACs", "latency (ms)", "speed-up"] and before[""] == ["dense", "small"]
    assert (before["params"][0], before["MACs"][0]) == (human(dense.params), human(dense.macs))
    page.set_input_files("input[type=file]", picture)
    labels = page.get_by_test_id("label-output-value")
    labels.nth(1).wait_for(timeout=20_000)
    image = Image.open(picture).convert("RGB")
    for label, said in zip(labels.all_inner_texts(), cuts.show(image, 50, True), strict=False):
        assert label == max(said, key=said.get)
    slider.focus()
    for _ in range((50 - low) // 5):
        slider.press("ArrowLeft")
    after = numbers(page, small_macs(folder, low))
    assert after["params"][0] == before["params"][0] and after["params"][1] != before["params"][1]
    assert float(after["latency (ms)"][1]) > 0 and float(after["speed-up"][1].removesuffix("x")) > 0
    page.set_viewport_size({"width": 360, "height": 800})
    assert not scrolls_sideways(page)


@pytest.mark.slow
def test_a_backbone_shows_its_tokens(
    app: ModuleType, served: Any, visits: Visits, picture: Path, tmp_path: Path
) -> None:
    cuts = app.Cuts(str(scored(tmp_path / "dino", "Dinov2Model")))
    page = visits.open(served(cuts))
    page.set_input_files("input[type=file]", picture)
    page.get_by_text("cosine of the tokens").wait_for(timeout=20_000)
    shown = page.locator("img").evaluate_all("all => all.filter((i) => i.naturalWidth === 32).length")
    assert shown == 2  # dense and small, twice the 16 pixels of the model's image
    dense, small, table = cuts.show(Image.open(picture), 50, True)
    cosine = float(re.search(r"\| cosine of the tokens \|  \| ([\d.]+) \|", table)[1])  # type: ignore[index]
    assert 0 < cosine < 1 and dense.size == small.size == (32, 32) and dense.tobytes() != small.tobytes()


def test_cuts_are_those_of_the_library_and_kept(app: ModuleType, tmp_path: Path) -> None:
    folder = scored(tmp_path / "vit", "ViTForImageClassification")
    cuts = app.Cuts(str(folder))
    plan = cuts.scores.plan(0.5)
    for fitted, expected in ((True, cuts.scores.compensate(cuts.dense, plan)), (False, plan)):
        ours, theirs = cuts.cut(50, fitted).model, prune(cuts.dense, expected)
        assert all(a.equal(b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert cuts.cut(50, True) is cuts.cut(50, True) and cuts.cut.cache_info().misses == 2
    bare = app.Cuts(str(scored(tmp_path / "bare", "ViTForImageClassification", statistics=False)))
    assert not bare.can_fit and bare.show(None, 50, False)[:2] == (None, None)


def test_what_it_cannot_start_with(app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_ID", raising=False)
    with pytest.raises(InvalidConfigError, match="set MODEL_ID"):
        app.main()
    with pytest.raises(UnsupportedModelError, match="this app runs the model on images"):
        app.Cuts(str(scored(tmp_path / "videos", "VideoMAEForVideoClassification")))
    folder = scored(tmp_path / "vit", "ViTForImageClassification")
    with pytest.raises(FileNotFoundError, match="set SCORES"):
        app.Cuts(str(folder), "nothing.safetensors")
    make("ViTForImageClassification", seed=1, intermediate_size=64).save_pretrained(folder)
    with pytest.raises(InvalidDataError, match="other weights"):
        app.Cuts(str(folder))


def test_its_files_are_what_the_hub_expects() -> None:
    header = RepoCard.load(SPACE / "README.md", ignore_metadata_errors=False).data.to_dict()
    tested = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested is not None and (header["sdk"], header["sdk_version"]) == ("gradio", tested[1])
    assert (SPACE / header["app_file"]).is_file() and len(header["short_description"]) <= 60
    assert (SPACE / "requirements.txt").read_text().split() == ["hf_vitprune[vision]", "pillow<13"]


@pytest.mark.slow
def test_it_starts_as_a_script_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="no gradio: pip install 'hf_vitprune[space]'")
    import httpx

    port, nowhere = _free_port(), "http://127.0.0.1:9"
    names = {"MODEL_ID": str(scored(tmp_path / "vit", "ViTForImageClassification")), "GRADIO_SERVER_PORT": str(port)}
    names |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "NO_PROXY": "127.0.0.1,localhost", "HF_HUB_OFFLINE": "1"}
    names |= {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, SPACE / "app.py"], env=os.environ | names, stdout=log, stderr=log)
        try:
            for _ in range(180):
                time.sleep(1)
                assert process.poll() is None, (tmp_path / "log").read_text()
                if "Running on local URL" in (tmp_path / "log").read_text():
                    break
            found = httpx.get(f"http://127.0.0.1:{port}", trust_env=False)
            assert found.status_code == 200 and "Pruned on the spot" in found.text
        finally:
            process.terminate()
            process.wait(30)

"""``hf-vitprune report --out``: the page, as a reader's browser shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPModel, ViTImageProcessorPil

from browser import Visits, faint, scrolls_sideways
from command_line import VIT, misused, printed, refused
from hf_vitprune import OneShotScores, PruningPlan, prune
from hf_vitprune.cost import count
from hf_vitprune.evaluation.results import save_results, weights_digest
from hf_vitprune.utils.data import load_images
from hf_vitprune_cli.page import short_names
from image_folders import image_folder
from tiny import images, make

#: names that other people chose
CLASSES = ["cat", "<script>alert(1)</script>", "dog & <b>cow</b>", "</style>", "{{ 7 * 7 }}"]
PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images; a classifier with two pruned models and scores; a Swin backbone with one."""
    root = tmp_path_factory.mktemp("work")
    dense = make(VIT)
    dense.config.id2label = dict(enumerate(CLASSES))
    dense.config.label2id = {name: i for i, name in enumerate(CLASSES)}
    saved(dense, root / "dense")
    image_folder(root / "data", ["cat", "dog & <b>cow<"], 10)
    (root / "data" / "cat" / "0.png").rename(root / "data" / "cat" / "<img src=x onerror=alert(1)>.png")
    for name, plan in {
        "deep": PruningPlan.dense(dense).keep_layers([0, 2]),
        "narrow": PruningPlan.magnitude(dense, 0.5, units=["heads", "mlp"]),
    }.items():
        saved(prune(dense, plan), root / name)
    OneShotScores.measure(dense, images(8)).save(root / "scores.safetensors")
    swin = make("SwinModel")
    saved(swin, root / "swin")
    saved(prune(swin, PruningPlan.magnitude(swin, 0.5, units=["heads", "mlp"])), root / "swin-small")
    return root


def report(work: Path, *args: object, models: tuple[str, ...] = ("dense", "deep", "narrow")) -> str:
    out = work / "page.html"
    text = printed("report", *(work / name for name in models), *args, "--out", out, "--force", "--rounds", 1)
    assert f"page written to {out}" in text and "MACs kept" in text  # the tables are there as ever
    return out.as_uri()


def test_a_classifier_with_images_and_scores(work: Path, visits: Visits) -> None:
    url = report(work, "--images", work / "data", "--scores", work / "scores.safetensors")
    page = visits.open(url)
    assert page.title() == "Pruning report: dense"
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "In short",
        "Sizes of every layer",
        "Cost against error",
        "Latency",
        "Predictions that changed",
    ]
    whole, small = (count(make(VIT)).macs, json.loads(printed("report", work / "dense", work / "narrow", "--json"))[1])
    card = page.locator("article", has=page.get_by_role("heading", name="narrow", exact=True))
    assert f"{small['macs'] / whole:.1%}" in card.inner_text()
    tips = page.locator("#sizes-chart-1, figure title").all_text_contents()
    assert "layer 1, deep: gone" in tips and "layer 2, deep: 4 of 4" in tips and "layer 0, narrow: 2 of 4" in tips
    assert sum(tip.startswith("narrow: ") and "error" in tip for tip in tips) == 1  # measured, beside the line
    assert "20 images from data" in page.locator("section", has=page.locator("#answers")).inner_text()
    assert "rounds" in page.inner_text("body") and "1 thread" in page.inner_text("body")


def test_other_peoples_names_are_text(work: Path, visits: Visits) -> None:
    page = visits.open(report(work, "--images", work / "data", models=("dense", "narrow")))
    assert page.locator("script").count() == 0 and page.locator("article b b").count() == 0
    shown = set(page.locator(".says b").all_inner_texts())
    assert shown <= set(CLASSES) and any("<" in name for name in shown)
    alts = page.locator("article img").evaluate_all("all => all.map((i) => [i.alt, i.naturalWidth])")
    assert alts and all(width > 0 for _, width in alts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_it_can_be_read_everywhere(work: Path, visits: Visits, width: int, scheme: str) -> None:
    url = (work / "page.html").as_uri() if (work / "page.html").exists() else report(work, "--images", work / "data")
    page = visits.open(url, width, scheme)
    assert not scrolls_sideways(page)
    assert faint(page) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    svgs = page.locator("svg[role=img]")
    assert svgs.count() > 4 and all(svgs.evaluate_all("all => all.map((s) => s.getBBox().width > 0)"))


def test_a_backbone_has_neighbours(work: Path, visits: Visits) -> None:
    page = visits.open(report(work, "--images", work / "data", models=("swin", "swin-small")))
    assert "Nearest neighbours that changed" in page.locator("h2").all_inner_texts()
    assert page.locator("figure.new img").count() == page.get_by_text("new", exact=True).count() > 0
    assert page.locator("svg text.note", has_text="stage 1").count() >= 5


def test_a_tower_of_a_bigger_model(work: Path, visits: Visits, tmp_path: Path) -> None:
    clip = make("CLIPForImageClassification")
    whole = CLIPModel(clip.config)
    saved(whole, tmp_path / "clip")
    plan = PruningPlan.magnitude(whole, 0.5, units=["mlp"], part="vision")
    saved(prune(whole, plan), tmp_path / "small")
    words = ("report", tmp_path / "clip", tmp_path / "small", "--part")
    printed(*words, "vision", "--images", work / "data", "--out", tmp_path / "page.html", "--rounds", 1)
    page = visits.open((tmp_path / "page.html").as_uri())
    assert "layer 0, small: 24 of 48" in page.locator("title").all_text_contents()
    assert "same neighbours" in page.inner_text("table >> nth=0")
    text = (*words, "text", "--out", tmp_path / "text.html")
    assert "a page of images runs the model on images" in refused(*text, "--images", work / "data")
    printed(*text)
    assert "Latency" not in (tmp_path / "text.html").read_text()


def test_labels_give_accuracy(work: Path, visits: Visits, tmp_path: Path) -> None:
    dense = make(VIT, num_labels=10)
    data = load_images("digits")
    dense.config.id2label = dict(enumerate(reversed(data.label_names)))  # an order of its own
    dense.config.label2id = {name: i for i, name in dense.config.id2label.items()}
    saved(dense, tmp_path / "dense")
    saved(prune(dense, PruningPlan.magnitude(dense, 0.5, units=["mlp"])), tmp_path / "small")
    out = tmp_path / "page.html"
    printed("report", tmp_path / "dense", tmp_path / "small", "--data", "digits", "--out", out, "--rounds", 1)
    page = visits.open(out.as_uri())
    labels = data.evaluation["label"]
    pixels = PROCESSOR(images=[row.convert("RGB") for row in data.evaluation["image"]], return_tensors="pt")
    rows = page.locator("table").first.locator("tr").all_inner_texts()
    for model, row in ((dense, rows[1]), (make_from(tmp_path / "small"), rows[2])):
        chosen = model(**pixels).logits.argmax(-1).tolist()
        right = sum(a == 9 - b for a, b in zip(chosen, labels, strict=True)) / len(labels)
        assert row.split("\t")[1] == f"{right:.1%}"


def test_a_bad_page_is_found_out(visits: Visits, tmp_path: Path) -> None:
    """What the tests above go by does see faint text, wide pages, errors and requests."""
    (tmp_path / "bad.html").write_text(
        "<body style='background: #fff'><p style='color: #999'>faint</p><p style='width: 900px'>wide</p>"
        "<svg><rect class=thin width=5 height=5 fill='#aaa'/></svg>"
        "<script>console.error('oh'); fetch('http://127.0.0.1:9/there').catch(() => 0)</script>"
    )
    page = visits.open((tmp_path / "bad.html").as_uri(), 360)
    page.wait_for_timeout(200)
    assert [row[0] for row in faint(page)] == ["faint", "rect thin"] and scrolls_sideways(page)
    assert "console: oh" in visits.faults and "asked for http://127.0.0.1:9/there" in visits.faults
    visits.faults.clear()


def make_from(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder).eval()


def test_what_evaluate_saved_is_in_the_tables(work: Path, tmp_path: Path) -> None:
    for name in ("dense", "narrow"):
        shutil.copytree(work / name, tmp_path / name)
        save_results(tmp_path / name, {"data": "pets", "metrics": {"top_5_accuracy": 0.875}, "weights": "others"})
    right = {"data": "pets", "metrics": {"top_5_accuracy": 0.75}, "weights": weights_digest(tmp_path / "narrow")}
    save_results(tmp_path / "narrow", right)
    dense, narrow = json.loads(printed("report", tmp_path / "dense", tmp_path / "narrow", "--json"))
    assert narrow["top 5 accuracy on pets"] == 0.75 and "top 5 accuracy on pets" not in dense  # of other weights
    assert "75.0%" in printed("report", tmp_path / "dense", tmp_path / "narrow")


def test_what_cannot_be_meant_is_refused_before_work(work: Path, tmp_path: Path) -> None:
    models = work / "dense", work / "narrow"
    assert "add --out report.html" in misused("report", *models, "--images", work / "data")
    assert "give one" in misused("report", *models, "--images", "a", "--data", "b", "--out", tmp_path / "x.html")
    (tmp_path / "old.html").write_text("mine")
    assert "is there already" in refused("report", *models, "--out", tmp_path / "old.html")
    assert (tmp_path / "old.html").read_text() == "mine"
    assert "is no folder" in refused("report", *models, "--images", tmp_path / "no", "--out", tmp_path / "x.html")
    assert "given twice" in refused("report", models[0], models[0], "--out", tmp_path / "x.html")
    many = [models[1], *(work / f"m{i}" for i in range(6))]
    for copy in many[1:]:
        shutil.copytree(models[1], copy)
    assert "up to 6 pruned models" in refused("report", models[0], *many, "--out", tmp_path / "x.html")
    assert "was not made from this" in refused("report", models[0], work / "swin-small", "--out", tmp_path / "x.html")
    assert "was not made from this" in refused("report", work / "deep", models[0], "--out", tmp_path / "x.html")
    wrong = ("report", work / "swin", work / "swin-small", "--scores", work / "scores.safetensors")
    assert "the scores are of a vit" in refused(*wrong, "--out", tmp_path / "x.html")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    alone = ("report", work / "swin", work / "swin-small", "--images", tmp_path)
    assert "at least two images" in refused(*alone, "--out", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["a/dense", "b/small", "c/small"]) == {
        "a/dense": "dense",
        "b/small": "b/small",
        "c/small": "c/small",
    }
    assert short_names(["/x/m", "m"]) == {"/x/m": "x/m", "m": "m"}

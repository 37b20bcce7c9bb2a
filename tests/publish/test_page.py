"""What a page shows, as numbers: which layers stayed, whose answers changed, budgets, charts."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vitprune import Architecture, OneShotScores, PruningPlan, prune, truncate
from hf_vitprune.cost import count
from hf_vitprune.errors import InvalidDataError, UnsupportedModelError
from hf_vitprune.publish.page import Answers, Pictures, budgets_of, compare_answers, write_page
from hf_vitprune.publish.page.charts import bar_chart, line_chart, time_chart
from hf_vitprune.publish.page.shapes import places_of, size_charts
from hf_vitprune.spec.configs import lineage_of
from tiny import images, make

VIT = "ViTForImageClassification"


class Tensors:
    """An image processor for what are tensors already."""

    def __call__(self, images: torch.Tensor, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": images[None]}


def pictures(number: int = 12, labels: list[int] | None = None) -> Pictures:
    pixels = images(number)
    return Pictures([f"{i}" for i in range(number)], lambda i: pixels[i], f"{number} images", labels)


@pytest.mark.parametrize(
    ("name", "kept", "expected"),
    [(VIT, [0, 2], [0, 2]), ("SwinModel", [0, 1, 3, 4], [0, 1, 3, 4])],
)
def test_which_layers_stayed(name: str, kept: list[int], expected: list[int]) -> None:
    model = make(name)
    dense, plan = Architecture.of(model), PruningPlan.dense(model).keep_layers(kept)
    small = prune(model, plan)
    assert places_of(dense, Architecture.of(small), lineage_of(small.config)) == (expected, True)  # the config says so
    assert places_of(dense, Architecture.of(small), {}, plan) == (expected, True)
    first = places_of(dense, Architecture.of(small), {})  # nobody says: from the bottom of every stage
    assert first == ([*range(len(kept))], False)
    assert places_of(dense, dense, {}) == ([*range(len(dense.layers))], True)


def test_charts_show_the_sizes() -> None:
    model = make(VIT)
    small = prune(model, PruningPlan.magnitude(model, 0.5, units=["mlp"]).keep_layers([0, 2]))
    shapes = {"dense": Architecture.of(model), "small": Architecture.of(small)}
    charts = {chart.title: chart for chart in size_charts(shapes, {"small": [0, 2]})}
    assert list(charts) == ["heads", "q/k channels a head", "v channels a head", "MLP neurons", "multiply-adds"]
    mlp = charts["MLP neurons"]
    assert [mark.text for mark in mlp.marks if mark.series] == [
        "layer 0, small: 24 of 48",
        "layer 1, small: gone",
        "layer 2, small: 24 of 48",
    ]
    dense, halved = (next(m for m in mlp.marks if m.series == series) for series in (0, 1))
    assert halved.height == pytest.approx(dense.height / 2, abs=0.02)
    assert dense.x < halved.x and dense.x + dense.width > halved.x + halved.width
    wide = bar_chart("x", [4, 4], [("a", [2, 1]), ("b", [8, 0])], [0, 1])
    assert max(mark.height for mark in wide.marks) <= wide.bottom - wide.top  # more than dense has room too
    many = bar_chart("x", [4] * 40, [(f"{i}", [i] * 40) for i in range(5)], [0] * 40)
    lines = [mark for mark in many.marks if mark.series]
    assert all(mark.width > 5 for mark in lines) and {mark.height for mark in lines if mark.series > 1} == {2.5}
    assert len(wide.rules) == 1 and [note.text for note in wide.notes] == ["stage 0", "stage 1"]


def test_lines_and_times_are_to_scale() -> None:
    chart = line_chart("e", "x", [(0.25, 1e-1), (0.5, 1e-3)], [("m", 0.5, 1e-2)], "s")
    (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in chart.lines[0][0].split())
    assert x2 - x1 == pytest.approx((chart.right - chart.left) / 4, abs=0.1)
    assert chart.points[-1].y == pytest.approx((y1 + y2) / 2, abs=0.1)  # a decade above one, a decade below the other
    assert [tick.text for tick in chart.y_ticks] == ["10⁻³", "10⁻²", "10⁻¹"]
    bars = time_chart("t", [("dense", 8.0, 1.0, "8 ms"), ("small", 4.0, 0.5, "4 ms")]).marks
    assert bars[0].width == pytest.approx(2 * bars[1].width)


def test_classes_that_changed() -> None:
    dense = make(VIT)
    small = prune(dense, PruningPlan.magnitude(dense, 0.6, units=["mlp", "v"]))
    labels = [i % 5 for i in range(12)]
    answers = compare_answers({"dense": dense, "small": small}, Tensors(), pictures(12, labels), batch_size=5)
    with torch.no_grad():
        a, b = dense(images(12)).logits, small(images(12)).logits
    differ = a.argmax(-1) != b.argmax(-1)
    assert 0 < differ.sum() < 12 and answers.agreement("small") == pytest.approx(1 - float(differ.float().mean()))
    sure = a.softmax(-1).max(-1).values
    assert answers.changed() == sorted(differ.nonzero().flatten().tolist(), key=lambda i: -float(sure[i]))
    assert answers.accuracy["small"] == pytest.approx(float((b.argmax(-1) == torch.tensor(labels)).float().mean()))
    a, b = (x.double() - x.double().mean(-1, keepdim=True) for x in (a, b))
    assert answers.errors["small"] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2Backbone", "SwinModel", "CLIPVisionModelWithProjection"])
def test_neighbours_that_changed(name: str) -> None:
    dense = make(name)
    small = prune(dense, PruningPlan.magnitude(dense, 0.5, units=["mlp"]))
    answers = compare_answers({"dense": dense, "small": small, "same": dense}, Tensors(), pictures(), batch_size=5)
    assert answers.kind == "neighbours" and answers.agreement("same") == 1 and answers.errors["same"] == 0
    assert 0 < answers.agreement("small") < 1 and answers.errors["small"] > 0
    assert all(i not in row for i, row in enumerate(answers.chosen["small"]))  # nothing is its own neighbour
    assert answers.changed()


def test_neighbours_by_hand() -> None:
    answers = Answers(
        "neighbours", {"d": np.array([[1, 2], [0, 2]]), "small": np.array([[2, 1], [0, 3]])}, {}, [], {}, {}, ""
    )
    assert answers.agreement("small") == 0.75 and answers.changed() == [1]


def test_what_cannot_be_compared() -> None:
    dense, other = make(VIT), make(VIT)
    other.config.id2label = {i: f"other {i}" for i in range(5)}
    with pytest.raises(InvalidDataError, match="other classes"):
        compare_answers({"dense": dense, "other": other}, Tensors(), pictures())
    for name in ("CLIPTextModel", "ViTMAEModel", "VideoMAEModel"):  # words, images with holes, frames
        with pytest.raises(UnsupportedModelError, match="a page of images"):
            compare_answers({"dense": make(name)}, Tensors(), pictures())


def test_budgets_fall_and_lie_where_their_plans_are() -> None:
    dense = make(VIT)
    scores = OneShotScores.measure(dense, images(8))
    budgets = budgets_of(scores)
    assert [b.share for b in budgets] == sorted({b.share for b in budgets})
    assert all(a.error > b.error for a, b in pairwise(budgets))
    plan = scores.plan(0.5)
    share = count(plan.architecture).macs / count(dense).macs
    assert any(b.share == share and b.error == plan.info["error"] for b in budgets)


def test_pictures_of_a_folder_are_small_and_drawn(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (400, 200), (i, 0, 0)).save(tmp_path / f"{i}.png")
    found = Pictures.from_folder(tmp_path, limit=3)
    assert len(found) == 3 and found.source.startswith("3 images")
    assert re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", found.thumbnail(0)) and len(found.thumbnail(0)) < 4000
    assert list(found.names) == list(Pictures.from_folder(tmp_path, limit=3).names)


def test_a_page_of_shapes_alone(tmp_path: Path) -> None:
    model = make(VIT)
    small = truncate(model, 2)
    shapes = {"dense <b>": Architecture.of(model), "small": Architecture.of(small)}
    text = write_page(tmp_path / "new" / "page.html", shapes, {"small": [0, 1]}).read_text()
    assert "dense &lt;b&gt;" in text and "<b>" not in text and "Latency" not in text
    assert "2 of 3 layers" in text and not re.search(r"https?://", text)

"""Text towers: beside the vision tower of a dual encoder, and alone; what looks at images is refused for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

from hf_vitprune import (
    OneShotScores,
    PruningPlan,
    SLSConfig,
    SPViTConfig,
    TruncationConfig,
    count,
    criteria,
    get_pruning_model,
    mask,
    prune,
    select_layers,
    towers,
    truncate,
)
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError, UnsupportedModelError, UnsupportedUnitError
from hf_vitprune.latency.table import LatencyTable
from hf_vitprune.spec.architecture import Architecture
from processes import run_python
from tiny import NAFLEX, WITH_MLP, WORDS, assert_same, feed, images, make, relative_error, reset_weights, tensors

DUAL = {"CLIP": WITH_MLP, "Siglip": WITH_MLP, "Siglip2": NAFLEX}


def dual(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vision_config={**DUAL[name], "projection_dim": 24},
        text_config={**WORDS, "projection_size": 32},
        projection_dim=24,
    )
    return reset_weights(getattr(transformers, f"{name}Model")(config)).eval()


@torch.no_grad()
def outputs(model: Any) -> dict[str, torch.Tensor]:
    """Logits and embeddings of both towers."""
    words = feed(make("CLIPTextModel"), images())
    vision = feed(model, images()) if "Siglip2" in type(model).__name__ else {"pixel_values": images()}
    return dict(tensors(model(**vision, **words)))


@pytest.mark.parametrize("name", DUAL)
def test_both_towers_one_after_the_other(name: str, tmp_path: Path) -> None:
    model = dual(name)
    assert {part: tower.layers for part, tower in towers(model).items()} == {"text": 3, "vision": 3}
    small = model
    for part, seed in (("text", 1), ("vision", 2)):
        plan = PruningPlan.random(small, 0.4, seed=seed, part=part)
        narrower = prune(small, plan)
        after, expected = outputs(narrower), outputs(mask(small, plan))
        assert relative_error(after["logits_per_image"], expected["logits_per_image"]) < 1e-5
        small = narrower
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(small)
    assert_same(outputs(loaded.eval()), outputs(small))


FRESH = """
import sys, torch, transformers
sys.path.append(sys.argv[2])
import hf_vitprune
sys.path.append(sys.argv[2])
from test_text_towers import outputs
from tiny import assert_same
model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval()
assert_same(outputs(model), torch.load(sys.argv[1] + "/outputs.pt", weights_only=True))
print("exact")
"""


@pytest.mark.slow
def test_a_fresh_process_loads_both(tmp_path: Path) -> None:
    small: Any = dual("CLIP")
    for part in ("vision", "text"):
        small = prune(small, PruningPlan.random(small, 0.4, part=part))
    small.save_pretrained(tmp_path)
    torch.save(outputs(small), tmp_path / "outputs.pt")
    assert run_python(FRESH, str(tmp_path), str(Path(__file__).parent)).endswith("exact\n")


def test_which_tower_has_to_be_said() -> None:
    model = dual("CLIP")
    plan = PruningPlan.random(model, 0.4, part="text")
    calls: list[Callable[[], Any]] = [
        lambda: PruningPlan.random(model, 0.5),
        lambda: PruningPlan.magnitude(model, 0.5),
        lambda: criteria.magnitude(model),
        lambda: Architecture.of(model),
        lambda: count(model),
        lambda: truncate(model, 1),
        lambda: prune(model, plan.of_part(None)),
    ]
    for call in calls:
        with pytest.raises(UnsupportedModelError, match="part=..., of 'text' .* 'vision'"):
            call()
    with pytest.raises(InvalidPlanError, match="another shape"):
        prune(model, plan.of_part("vision"))
    assert len(truncate(model, 2, part="text").text_model.encoder.layers) == 2


def test_the_cost_of_text_is_that_of_all_positions() -> None:
    model = make("CLIPTextModel")
    layer = 4 * 32 * 32 + 2 * 32 * 48
    assert count(model).macs == 3 * (7 * layer + 2 * 7 * 7 * 32)
    assert count(model).params == sum(p.numel() for p in model.parameters())
    assert count(dual("CLIP"), part="text") == count(model)
    with pytest.raises(InvalidConfigError, match="no image size"):
        count(model, image_size=32)


@pytest.mark.parametrize("alone", [True, False])
def test_what_looks_at_images_is_refused(alone: bool) -> None:
    model, part = (make("CLIPTextModel"), None) if alone else (dual("CLIP"), "text")
    plan = PruningPlan.random(model, 0.4, units=("mlp",), part=part)
    batches = [{"pixel_values": images()}]
    calls: list[Callable[[], Any]] = [
        lambda: prune(model, plan, calibration=images()),
        lambda: criteria.activation(model, batches, part=part),
    ]
    if alone:
        calls += [lambda: OneShotScores.measure(model, images()), lambda: LatencyTable.measure(model, 1)]
    for call in calls:
        with pytest.raises(UnsupportedModelError, match="a clip_text_model reads text"):
            call()


def test_taylor_scores_take_the_loss_of_the_whole_model() -> None:
    model = dual("CLIP")
    batch = {"pixel_values": images(), **feed(make("CLIPTextModel"), images())}
    scores = criteria.taylor(model, [batch], loss=lambda m, b: m(**b, return_loss=True).loss, part="text")
    assert float(scores["layer 1 mlp"].min()) > 0
    plan = PruningPlan.from_scores(model, scores, ratio=0.4, part="text", round_to=1)
    assert plan.part == "text" and plan.source.model_type == "clip_text_model"


def test_layers_of_text() -> None:
    """Truncation takes them; what chooses layers by images, or makes convolutions of them, says so at once."""
    model = dual("CLIP")
    small = get_pruning_model(model, TruncationConfig(layers=2), part="text").export()
    assert type(small) is type(model) and small.config.text_config.num_hidden_layers == 2
    assert len(small.vision_model.encoder.layers) == 3
    assert torch.equal(outputs(small)["image_embeds"], outputs(model)["image_embeds"])
    labelled = {"pixel_values": images(12), "labels": torch.arange(12) % 2}
    calls: dict[str, Callable[[], Any]] = {
        "SLS runs the model on images": lambda: get_pruning_model(model, SLSConfig(), part="text"),
        "SLS runs": lambda: select_layers(model, labelled, SLSConfig(perplexity=3), part="text"),
        "truncation by features runs": lambda: get_pruning_model(
            model, TruncationConfig(layers="features"), part="text"
        ),
        "the grid of patches": lambda: get_pruning_model(model, SPViTConfig(target=0.8), part="text"),
    }
    for said, call in calls.items():
        with pytest.raises(UnsupportedModelError, match=said):
            call()
    for part in ("text", "vision"):
        with pytest.raises(InvalidPlanError, match="every one of the 3 layers is read"):
            truncate(model, "unused", part=part)
    with pytest.raises(UnsupportedUnitError, match="no prunable unit 'patches'; they have embedding"):
        PruningPlan.random(model, 0.4, units=["patches"], part="text")
    scores = criteria.magnitude(model, part="text")
    with pytest.raises(InvalidConfigError, match="no image size: leave image_size=32 out"):
        PruningPlan.from_scores(model, scores, target=0.5, part="text", image_size=32)

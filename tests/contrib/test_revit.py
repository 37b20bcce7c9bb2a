"""ReViT: published sizes, other depths, and models that build, train and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageClassification, CLIPConfig, DeiTConfig, SwinConfig, ViTConfig

from hf_vitprune import Architecture, build, count, revit
from hf_vitprune.errors import InvalidConfigError
from tiny import images

BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 1000}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}


@pytest.mark.parametrize(
    ("width", "weights", "macs"), [(384, 22.60e6, 4.680e9), (192, 5.894e6, 1.2822e9)], ids=["384", "192"]
)
def test_published_sizes(width: int, weights: float, macs: float) -> None:
    cost = count(revit(ViTConfig(**BASE), width))
    assert cost.weight_params == pytest.approx(weights, rel=1e-3)
    assert cost.macs == pytest.approx(macs, rel=1e-3)


def test_the_shape_of_width_384() -> None:
    architecture = revit(ViTConfig(**BASE))
    assert architecture.hidden_size == 384
    assert [s.heads for s in architecture.layers] == [10, 4, 4, 8, 8, 8, 8, 8, 8, 4, 4, 10]
    assert [s.qk_dim for s in architecture.layers] == [32, 16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 32]
    assert {s.v_dim for s in architecture.layers} == {64}
    assert [s.mlp // 384 for s in architecture.layers] == [3, 3, 3, 6, 6, 6, 6, 6, 6, 3, 3, 3]
    assert architecture.scaling(0) == 1 / 8


def test_the_rule_of_the_table() -> None:
    """Without the 10 heads and the doubled q/k at both ends: 2 * 768 * (10 (32 + 64) - 4 (16 + 64)) fewer weights."""
    architecture = revit(ViTConfig(**BASE), rule="table")
    assert [s.heads for s in architecture.layers] == [4, 4, 4, 8, 8, 8, 8, 8, 8, 4, 4, 4]
    assert [s.qk_dim for s in architecture.layers] == [16, 16, 16, 32, 32, 32, 32, 32, 32, 16, 16, 16]
    released = revit(ViTConfig(**BASE))
    assert count(released).weight_params - count(architecture).weight_params == 2 * 768 * 640
    with pytest.raises(InvalidConfigError, match="rule is released or table"):
        revit(ViTConfig(**BASE), rule="paper")


@settings(max_examples=30, deadline=None)
@given(depth=st.integers(1, 40), width=st.integers(1, 1024))
def test_any_depth_has_a_wide_middle_and_two_like_ends(depth: int, width: int) -> None:
    architecture = revit(ViTConfig(**{**BASE, "num_hidden_layers": depth}), width)
    layers = architecture.layers
    assert len(layers) == depth and layers == layers[::-1] and architecture.hidden_size == width
    middle = [i for i, s in enumerate(layers) if s.mlp == 6 * width]
    assert abs(len(middle) - depth / 2) <= 1 and middle == list(range(middle[0], middle[-1] + 1))


def test_builds_trains_and_loads(tmp_path: Path) -> None:
    config = DeiTConfig(**SMALL, num_hidden_layers=4)
    model: Any = build(config, revit(config, 32))
    pixels, labels = images(8), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert Architecture.of(again) == revit(config, 32)
    assert torch.equal(again(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.parametrize(
    ("config", "width", "message"),
    [
        (SwinConfig(), 96, "one width, which swin models are not"),
        (ViTConfig(**{**BASE, "num_attention_heads": 6}), 384, "64 channels, the config's have 128"),
        (ViTConfig(**BASE), 0, "hidden_size"),
        (ViTConfig(**BASE), 384.0, "hidden_size"),
        (CLIPConfig(vision_config={"hidden_size": 32, "num_attention_heads": 4}), 32, "have 8"),
    ],
)
def test_what_it_is_not_for(config: Any, width: Any, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        revit(config, width)

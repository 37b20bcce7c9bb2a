"""Families prove themselves: the shipped ones pass, wrong descriptions are refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_vitprune import PruningPlan, mask, prune, register_family
from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.families import UNITS, all_families, find_family
from hf_vitprune.family_check import check_family, tiny_model
from tiny import relative_error
from toy_families import toy_family

SHIPPED = [family for family in all_families() if not family.model_type.startswith("toy")]


@pytest.mark.parametrize("family", SHIPPED, ids=lambda family: family.model_type)
def test_shipped_families_pass(family) -> None:
    check_family(family)


@pytest.mark.parametrize("kind", ["plain", "renamed q", "k without bias", "RMSNorm"])
def test_toys_that_a_family_can_describe(kind: str) -> None:
    register_family(toy_family(kind))


def test_norms_behind_the_branches_are_masked_with_what_they_norm() -> None:
    """What a removed branch's norm would add is its bias: the mask has neither its weight nor its bias."""
    family = toy_family("post-norm", post_norm=True)
    register_family(family)
    model, pixels = tiny_model(family), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dense = PruningPlan.dense(model)
    first, second = dense.layers
    for plan in (
        dense.keep_layers([1]),
        dense.with_layers([first.with_mixer("none"), second]),
        dense.with_layers([first, replace(second, mlp=())]),
    ):
        full = mask(model, plan)
        with torch.no_grad():
            ours, masked, before = (m(pixels).last_hidden_state for m in (prune(model, plan), full, model))
        assert relative_error(ours, masked) < 1e-5 < 1e-3 < relative_error(masked, before)
    assert not full.layers[1].layernorm_after.weight.any() and not full.layers[1].layernorm_after.bias.any()
    assert full.layers[0].layernorm_after.bias.all()


@pytest.mark.parametrize(
    ("kind", "said", "reason"),
    [
        ("renamed q", {"q": "q_proj"}, "no module .*q_proj"),
        ("plain", {"fc2": "fc3"}, "no module .*fc3"),
        ("plain", {"norms": ()}, "'embedding'.* differ by"),
        ("RoPE", {}, "'qk'.*position_embeddings"),
        ("whole-width q norm", {}, "'qk'.*differ by"),
        ("extra keyword", {}, "'qk'.*gain"),
        ("post-norm", {}, "norm1 stands behind .*say post_norm=True"),  # zeros in front of it come out as its bias
        ("plain", {"post_norm": True}, "norm1 stands in front of .*say post_norm=False"),
    ],
)
def test_toys_that_are_refused(kind: str, said: dict, reason: str) -> None:
    family = toy_family(kind, **said)
    with pytest.raises(UnsupportedModelError, match=reason):
        register_family(family)
    assert find_family(type("Config", (), {"config": type("C", (), {"model_type": family.model_type})()})()) is None


@pytest.mark.parametrize(("kind", "without"), [("RoPE", {"qk", "v"}), ("extra keyword", {"qk", "v"})])
def test_the_other_units_work(kind: str, without: set[str]) -> None:
    register_family(toy_family(kind, units=frozenset(UNITS) - without))

"""Families prove themselves: the shipped ones pass, wrong descriptions are refused with the reason."""

from __future__ import annotations

import pytest

from hf_vitprune import register_family
from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.families import UNITS, all_families, find_family
from hf_vitprune.family_check import check_family
from toy_families import toy_family

SHIPPED = [family for family in all_families() if not family.model_type.startswith("toy")]


@pytest.mark.parametrize("family", SHIPPED, ids=lambda family: family.model_type)
def test_shipped_families_pass(family) -> None:
    check_family(family)


@pytest.mark.parametrize("kind", ["plain", "renamed q", "k without bias", "RMSNorm"])
def test_toys_that_a_family_can_describe(kind: str) -> None:
    register_family(toy_family(kind))


@pytest.mark.parametrize(
    ("kind", "said", "reason"),
    [
        ("renamed q", {"q": "q_proj"}, "no module .*q_proj"),
        ("plain", {"fc2": "fc3"}, "no module .*fc3"),
        ("plain", {"norms": ()}, "'embedding'.* differ by"),
        ("RoPE", {}, "'qk'.*position_embeddings"),
        ("whole-width q norm", {}, "'qk'.*differ by"),
        ("extra keyword", {}, "'qk'.*gain"),
        ("post-norm", {}, "'layers'.*differ by"),  # zeros in front of a norm come out as its bias
    ],
)
def test_toys_that_are_refused(kind: str, said: dict, reason: str) -> None:
    family = toy_family(kind, **said)
    with pytest.raises(UnsupportedModelError, match=reason):
        register_family(family)
    assert find_family(type("Config", (), {"config": type("C", (), {"model_type": family.model_type})()})()) is None


@pytest.mark.parametrize(
    ("kind", "without"), [("RoPE", {"qk", "v"}), ("extra keyword", {"qk", "v"}), ("post-norm", {"layers"})]
)
def test_the_other_units_work(kind: str, without: set[str]) -> None:
    register_family(toy_family(kind, units=frozenset(UNITS) - without))

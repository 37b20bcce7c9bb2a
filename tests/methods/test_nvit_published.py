"""The published .54 shape, against the numbers that its authors give, and the benchmark that times it."""

from __future__ import annotations

import pytest

from benchmarks.common import vit_config
from benchmarks.nvit import published, sizes
from hf_vitprune import Architecture, count


@pytest.mark.parametrize(
    ("width", "heads", "weights", "macs"),
    [(768, 12, 86.29e6, 17.564e9), (384, 6, 21.91e6, 4.599e9), (192, 3, 5.648e6, 1.2537e9)],
)
def test_dense_shapes_cost_what_is_published(width: int, heads: int, weights: float, macs: float) -> None:
    config = vit_config(width, heads=heads, num_labels=1000)
    cost = count(Architecture.dense(config))
    assert cost.weight_params == pytest.approx(weights, rel=0.003)
    assert cost.macs == pytest.approx(macs, rel=0.003)


def test_the_published_shape_costs_what_is_published() -> None:
    config = vit_config(768, num_labels=1000)
    cost, dense = count(published(config)), count(Architecture.dense(config))
    assert cost.weight_params == pytest.approx(34.14e6, rel=0.003)
    assert cost.macs == pytest.approx(6.997e9, rel=0.003)
    assert dense.macs / cost.macs == pytest.approx(2.51, rel=0.003)
    assert count(published(config, padded=True)).macs > cost.macs


def test_five_times_fewer_parameters_with_2_to_4_sparsity() -> None:
    """The abstract's 5.1x: half of the weights of the .54 shape are stored; 86.29 / (34.14 / 2) = 5.06."""
    config = vit_config(768, num_labels=1000)
    dense, small = count(Architecture.dense(config)), count(published(config))
    assert dense.weight_params / (small.weight_params / 2) == pytest.approx(5.06, abs=0.01)


@pytest.mark.slow
def test_published_sizes_go_with_the_published_costs() -> None:
    """NViT-B to T have 34, 30, 21 and 6.9M weights at 6.8, 6.2, 4.2 and 1.3G; so has DeiT-B cut at random."""
    rows = sizes()
    assert [row["weights, 10^6"] for row in rows] == pytest.approx([34, 30, 21, 6.9], rel=0.08)
    assert [row["MACs, 10^9"] for row in rows] == pytest.approx([6.8, 6.2, 4.2, 1.3], rel=0.05)

"""Multilinear interpolation on a grid, its refusal to go further, and the monotone fit."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hf_vitprune.errors import LatencyTableError
from hf_vitprune.latency.grid import SampledGrid

axis = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(lambda v: tuple(sorted(v)))
axes3 = st.fixed_dictionaries({"a": axis, "b": axis, "c": axis})


def inside(axes: dict[str, tuple[int, ...]]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({k: st.integers(v[0], v[-1]) for k, v in axes.items()})


@settings(max_examples=40, deadline=None)
@given(data=st.data(), axes=axes3)
def test_functions_that_are_linear_in_every_size_are_read_exactly(data: Any, axes: dict[str, tuple[int, ...]]) -> None:
    def time(a: int, b: int, c: int) -> float:
        return 1 + a + 2 * b * c + 0.5 * a * b * c

    grid = SampledGrid("block", axes, sampled_times(time, axes))
    sizes = data.draw(inside(axes))
    assert grid.at(**sizes) == pytest.approx(time(**sizes), rel=1e-12)


def sampled_times(time: Any, axes: dict[str, tuple[int, ...]]) -> np.ndarray:
    times = [time(**dict(zip(axes, place, strict=True))) for place in product(*axes.values())]
    return np.array(times).reshape(lengths(axes))


def lengths(axes: dict[str, tuple[int, ...]]) -> list[int]:
    return [len(values) for values in axes.values()]


@st.composite
def grids(draw: st.DrawFn) -> SampledGrid:
    axes = draw(axes3)
    times = draw(arrays.arrays(float, lengths(axes), elements=st.floats(1e-6, 1e3)))
    return SampledGrid("block", axes, times)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), grid=grids())
def test_between_points_lies_between_their_times(data: Any, grid: SampledGrid) -> None:
    for place in product(*(range(n) for n in grid.seconds.shape)):
        sizes = {name: grid.axes[name][i] for name, i in zip(grid.axes, place, strict=True)}
        assert grid.at(**sizes, unrelated=3) == grid.seconds[place]
    value = grid.at(**data.draw(inside(dict(grid.axes))))
    assert grid.seconds.min() * (1 - 1e-9) <= value <= grid.seconds.max() * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), grid=grids(), name=st.sampled_from("abc"), by=st.integers(1, 5), low=st.booleans())
def test_nothing_is_extrapolated(data: Any, grid: SampledGrid, name: str, by: int, low: bool) -> None:
    values = grid.axes[name]
    sizes = {**data.draw(inside(dict(grid.axes))), name: values[0] - by if low else values[-1] + by}
    message = f"block: {name} {sizes[name]} is not covered, the table spans {values[0]} to {values[-1]}"
    with pytest.raises(LatencyTableError, match=message):
        grid.at(**sizes)


@settings(max_examples=40, deadline=None)
@given(grid=grids())
def test_monotone_fit_never_falls_and_stays_near(grid: SampledGrid) -> None:
    fit = grid.monotone()
    for i in range(3):
        assert (np.diff(fit.seconds, axis=i) >= 0).all()
    assert grid.seconds.min() * (1 - 1e-9) <= fit.seconds.min()
    assert fit.seconds.max() <= grid.seconds.max() * (1 + 1e-9)
    in_order = grid.seconds
    for i in range(3):
        in_order = np.maximum.accumulate(in_order, axis=i)
    again = SampledGrid("block", grid.axes, in_order).monotone()
    np.testing.assert_allclose(again.seconds, in_order, rtol=1e-9)


def test_monotone_fit_averages_noise_out() -> None:
    sizes = np.arange(1, 9)
    noisy = 1e-3 * np.add.outer(sizes, sizes) * np.random.default_rng(0).lognormal(0, 0.2, (8, 8))
    true = 1e-3 * np.add.outer(sizes, sizes)
    axes = {"a": tuple(range(8)), "b": tuple(range(8))}
    fit = SampledGrid("block", axes, noisy).monotone().seconds
    assert abs(np.log(fit / true)).mean() < 0.75 * abs(np.log(noisy / true)).mean()
    assert abs(np.log(fit / true).mean()) < 0.05  # neither above nor below on the whole


@settings(max_examples=40, deadline=None)
@given(grid=grids())
def test_json(grid: SampledGrid) -> None:
    again = SampledGrid.from_dict("block", grid.to_dict())
    assert again.axes == grid.axes and list(again.axes) == list(grid.axes)
    assert np.array_equal(again.seconds, grid.seconds)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"axes": {"a": [1, 2]}, "seconds": [1.0, float("nan")]}, "positive, finite"),
        ({"axes": {"a": [1, 2]}, "seconds": [1.0, float("inf")]}, "positive, finite"),
        ({"axes": {"a": [1, 2]}, "seconds": [1.0, -1.0]}, "positive, finite"),
        ({"axes": {"a": [1, 2]}, "seconds": [0.0, 1.0]}, "positive, finite"),
        ({"axes": {"a": [1, 2]}, "seconds": [1.0, 1.0, 1.0]}, r"shape \(3,\) on a grid of \(2,\)"),
        ({"axes": {"a": [2, 1]}, "seconds": [1.0, 1.0]}, "no ascending list"),
        ({"axes": {"a": [1, 1]}, "seconds": [1.0, 1.0]}, "no ascending list"),
        ({"axes": {"a": [1, 2.5]}, "seconds": [1.0, 1.0]}, "no ascending list"),
        ({"axes": {"a": []}, "seconds": []}, "no ascending list"),
        ({"axes": {"a": [1, 2]}, "seconds": [[1.0], [1.0, 2.0]]}, "not a grid of times"),
        ({"axes": {"a": [1, 2]}, "seconds": ["x", 1.0]}, "not a grid of times"),
        ({"axes": {"a": 1}, "seconds": [1.0]}, "not a grid of times"),
        ({"axes": [1], "seconds": [1.0]}, "not a grid of times"),
        ({"seconds": [1.0]}, "not a grid of times"),
        (None, "not a grid of times"),
    ],
)
def test_damage_is_named(record: Any, message: str) -> None:
    with pytest.raises(LatencyTableError, match=f"block: .*{message}|{message}"):
        SampledGrid.from_dict("block", record)

"""Least squares, removal by OBS and best low rank, against what they claim to be the best of."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vitprune.compensate.algebra import nested_errors, obs, qk_maps, ridge_solve, value_map
from hf_vitprune.compensate.fits import Branch, fold
from hf_vitprune.compensate.moments import Moments, Statistics
from hf_vitprune.errors import InvalidDataError

quick = settings(max_examples=20, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def statistics(
    x: torch.Tensor, t: torch.Tensor, weights: torch.Tensor | None = None, centred: bool = True
) -> Statistics:
    moments = Moments(x.shape[1], t.shape[1], x.device)
    weights = torch.ones(len(x)) if weights is None else weights
    for part in torch.arange(len(x)).split(7):
        moments.add(x[part], t[part], weights[part])
    return moments.total(centred)


def error(x: torch.Tensor, t: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    return float((t - x @ weight.T - bias).square().sum())


# ---------------------------------------------------------------------- statistics
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_streamed_moments_are_those_of_all_rows(dtype: torch.dtype) -> None:
    """With means a thousand times the spread, where sums of squares alone would cost six digits."""
    x, t = random(50, 4, seed=0) + 1000, random(50, 3, seed=1) - 500
    w = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    stats = statistics(x.to(dtype), t.to(dtype), w)
    x, t = x.to(dtype).double(), t.to(dtype).double()
    share = w / w.sum()
    cx, ct = x - share @ x, t - share @ t
    tight = {"rtol": 1e-6, "atol": 1e-5 if dtype == torch.float32 else 1e-9}
    assert torch.allclose(stats.x, share @ x, **tight) and torch.allclose(stats.t, share @ t, **tight)
    assert torch.allclose(stats.xx, cx.T @ (share[:, None] * cx), **tight)
    assert torch.allclose(stats.tx, ct.T @ (share[:, None] * cx), **tight)
    assert torch.allclose(stats.tt, share @ ct.square(), **tight)
    assert stats.rows == pytest.approx(float(w.sum() ** 2 / w.square().sum()))


def test_second_moments_for_linears_without_bias() -> None:
    x, t = random(30, 4, seed=0) + 1, random(30, 2, seed=1)
    stats = statistics(x, t, centred=False)
    assert torch.allclose(stats.xx, x.T @ x / 30) and torch.allclose(stats.tx, t.T @ x / 30)
    assert not stats.x.any() and not stats.t.any()


def test_features_that_are_not_finite_are_refused() -> None:
    x = random(10, 3, seed=0)
    x[4, 1] = torch.nan
    with pytest.raises(InvalidDataError, match="not finite"):
        statistics(x, random(10, 2, seed=1))


# ---------------------------------------------------------------------- least squares
@quick
@given(seed=seeds, ridge=st.sampled_from([1e-8, 1e-3, 0.1, 10.0]), rows=st.sampled_from([3, 8, 60]))
def test_a_refit_never_raises_the_error(seed: int, ridge: float, rows: int) -> None:
    """From any weights, with more features than rows too, and with features that are constant or repeated."""
    x, t = random(rows, 9, seed=seed), random(rows, 4, seed=seed + 1)
    x[:, 3], x[:, 4] = 2.0, x[:, 5]
    weight, scale = random(4, 9, seed=seed + 2), torch.tensor([1.0, -0.5, 3.0, 0.01], dtype=torch.float64)
    fit = Branch(statistics(x, t), weight, scale).refit(ridge)
    plain = statistics(x, t)
    bias = plain.t - (scale[:, None] * weight) @ plain.x
    new = error(x, t, scale[:, None] * fit.weight, scale * fit.bias)
    assert new <= error(x, t, scale[:, None] * weight, bias) * (1 + 1e-9)
    assert fit.after <= fit.before + 1e-9
    assert fit.after == pytest.approx((new / float((t - t.mean(0)).square().sum())) ** 0.5, rel=1e-6, abs=1e-6)
    assert fit.weight.isfinite().all() and fit.bias.isfinite().all()


def test_a_small_ridge_gives_least_squares() -> None:
    x, t = random(60, 6, seed=0), random(60, 4, seed=1)
    fit = Branch(statistics(x, t), torch.zeros(4, 6, dtype=torch.float64), None).refit(1e-6)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1)], 1), t).solution
    assert torch.allclose(fit.weight, best[:6].T, atol=1e-8) and torch.allclose(fit.bias, best[6], atol=1e-8)


def test_the_ridge_shrinks_towards_what_was_there() -> None:
    """With an enormous ridge, and where the targets are met already, the weights stay; only the mean is set right."""
    x, weight = random(60, 6, seed=0), random(4, 6, seed=1)
    t = x @ weight.T + 5
    assert torch.allclose(Branch(statistics(x, t), weight, None).refit(1e-3).weight, weight, atol=1e-12)
    held = Branch(statistics(x, random(60, 4, seed=2)), weight, None).refit(1e9)
    assert torch.allclose(held.weight, weight, atol=1e-6)


def test_rows_behind_a_layer_scale_of_zero_stay() -> None:
    x, t, weight = random(60, 6, seed=0), random(60, 2, seed=1), random(2, 6, seed=2)
    fit = Branch(statistics(x, t), weight, torch.tensor([0.0, 2.0], dtype=torch.float64)).refit(1e-3)
    assert torch.equal(fit.weight[0], weight[0]) and fit.bias[0] == 0
    assert not torch.allclose(fit.weight[1], weight[1])


def test_features_without_variance_change_nothing() -> None:
    x, t, weight = torch.full((20, 3), 4.0, dtype=torch.float64), random(20, 2, seed=1), random(2, 3, seed=2)
    fit = Branch(statistics(x, t), weight, None).refit(1e-3)
    assert torch.equal(fit.weight, weight)
    assert torch.allclose(x[0] @ fit.weight.T + fit.bias, t.mean(0))
    assert not ridge_solve(torch.zeros(3, 3).double(), torch.zeros(2, 3).double(), 1e-3)[0].any()


def test_few_rows_raise_the_ridge() -> None:
    def ridge(rows: int) -> tuple[float, bool]:
        found = statistics(random(rows, 4, seed=0), random(rows, 2, seed=1))
        fit = Branch(found, torch.zeros(2, 4).double(), None).refit(1e-3)
        return fit.ridge, fit.starved

    assert ridge(80) == (pytest.approx(1e-3), False)
    assert ridge(8) == (pytest.approx(1e-2), False)
    assert ridge(2) == (pytest.approx(4e-2), True)


@quick
@given(seed=seeds)
def test_a_fold_predicts_what_is_redundant(seed: int) -> None:
    """Removed features that are linear in the kept ones (and a constant) come back to 1e-4 of their size."""
    kept = random(200, 5, seed=seed)
    every = torch.cat([kept, kept @ random(5, 3, seed=seed + 1) + 2, torch.full((200, 1), 3.0).double()], 1)
    prior = torch.eye(9, 5, dtype=torch.float64)
    matrix, constant = fold(statistics(kept, every), prior, 1e-3)
    assert (kept @ matrix.T + constant - every).abs().max() < 1e-4 * every.abs().max()


@quick
@given(seed=seeds, group=st.sampled_from([1, 3]))
def test_nested_errors_are_those_of_each_number_of_features(seed: int, group: int) -> None:
    x, t = random(80, 6, seed=seed), random(80, 4, seed=seed + 1)
    stats = statistics(x, t)
    found = nested_errors(stats.xx, stats.tx, stats.tt.sum(), group, 1e-10)
    assert len(found) == 6 // group
    for count, lost in enumerate(found.tolist(), start=1):
        some = torch.cat([x[:, : count * group], torch.ones(80, 1)], 1)
        best = torch.linalg.lstsq(some, t).solution
        assert lost == pytest.approx(float((t - some @ best).square().sum()) / 80, rel=1e-6)
    assert nested_errors(torch.zeros(6, 6).double(), stats.tx, stats.tt.sum(), group, 1e-3).unique().numel() == 1


# ---------------------------------------------------------------------- OBS
def removed_error(weights: torch.Tensor, cov: torch.Tensor, kept: list[int]) -> float:
    """Squared error of the consumer when the kept features make up for the others as well as they can."""
    gone = [j for j in range(len(cov)) if j not in kept]
    back = torch.linalg.solve(cov[kept][:, kept], cov[kept][:, gone])
    left = cov[gone][:, gone] - cov[gone][:, kept] @ back
    return float(((weights[:, gone] @ left) * weights[:, gone]).sum())


@quick
@given(seed=seeds, group=st.sampled_from([1, 2]))
def test_obs_is_greedy_and_its_errors_are_exact(seed: int, group: int) -> None:
    n, m = 8 * group, 3
    x = random(40, n, seed=seed) @ random(n, n, seed=seed + 1)
    weights, cov = random(m, n, seed=seed + 2), x.T @ x / 40
    columns = {g: list(range(g * group, (g + 1) * group)) for g in range(8)}
    alive = list(range(8))
    while len(alive) > 2:
        options = {g: removed_error(weights, cov, [c for a in alive if a != g for c in columns[a]]) for g in alive}
        alive.remove(min(options, key=options.__getitem__))
        order, errors = obs(weights, cov, len(alive), group, ridge=1e-12, block=16)
        assert sorted(order.tolist()) == [g for g in range(8) if g not in alive]
        assert float(errors[-1]) == pytest.approx(min(options.values()), rel=1e-4)
    assert len(errors) == 6 and bool((errors.diff() >= 0).all())


def test_obs_keeps_one_of_each_pair_of_twins() -> None:
    """By weight norm both of the smaller twins would go, though either makes up for the other."""
    x = random(100, 4, seed=0).repeat(1, 2)
    weights = torch.cat([torch.full((1, 4), 1.0), torch.full((1, 4), 1.1)], 1).double()
    order, errors = obs(weights, x.T @ x / 100, keep=4, ridge=1e-9)
    assert sorted(int(j) % 4 for j in order) == [0, 1, 2, 3]
    assert float(errors[-1]) < 1e-6


# ---------------------------------------------------------------------- low rank
@quick
@given(seed=seeds, rank=st.integers(1, 5))
def test_qk_maps_beat_every_choice_of_channels(seed: int, rank: int) -> None:
    q, k = (
        random(80, 6, seed=seed) @ random(6, 6, seed=seed + 1),
        random(80, 6, seed=seed + 2) @ random(6, 6, seed=seed + 3),
    )
    query, key = q.T @ q / 80, k.T @ k / 80

    def lost(tq: torch.Tensor, tk: torch.Tensor) -> float:
        return float((q @ k.T - (q @ tq.T) @ (k @ tk.T).T).square().mean())

    found = lost(*qk_maps(query, key, rank))
    values = torch.linalg.svdvals(torch.linalg.cholesky(query).T @ torch.linalg.cholesky(key))
    assert found == pytest.approx(float(values[rank:].square().sum()), rel=1e-6, abs=1e-9)
    chosen = [torch.eye(6, dtype=torch.float64)[list(rows)] for rows in itertools.combinations(range(6), rank)]
    assert all(found <= lost(matrix, matrix) + 1e-9 for matrix in chosen)


@quick
@given(seed=seeds, rank=st.integers(1, 5))
def test_value_map_is_the_best_low_rank_of_the_output(seed: int, rank: int) -> None:
    context, output = random(80, 6, seed=seed) @ random(6, 6, seed=seed + 1), random(7, 6, seed=seed + 2)
    context = context - context.mean(0)
    cov = context.T @ context / 80
    down = value_map(cov, output, rank)
    up = output @ cov @ down.T
    assert torch.allclose(down @ cov @ down.T, torch.eye(rank, dtype=torch.float64), atol=1e-8)
    lost = (context @ output.T - context @ down.T @ up.T).square().sum() / 80
    values = torch.linalg.svdvals(output @ torch.linalg.cholesky(cov))
    assert float(lost) == pytest.approx(float(values[rank:].square().sum()), rel=1e-6, abs=1e-9)


def test_low_rank_of_what_is_of_low_rank_is_exact() -> None:
    """Second moments that are singular too: channels that are always zero, or copies of each other."""
    q, k = random(50, 6, seed=0), random(50, 6, seed=1)
    q[:, 4:], k[:, 2] = 0.0, k[:, 1]
    q[:, 3] = q[:, 0]
    tq, tk = qk_maps(q.T @ q / 50, k.T @ k / 50, 4)
    assert torch.allclose((q @ tq.T) @ (k @ tk.T).T, q @ k.T, atol=1e-8)

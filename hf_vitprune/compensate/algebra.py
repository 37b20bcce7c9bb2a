"""Least squares with a ridge, removal by OBS, and best low rank: in double precision, from statistics alone."""

from __future__ import annotations

import torch

#: rounds of the iterated ridge
ROUNDS = 3


def ridge_solve(cov: torch.Tensor, cross: torch.Tensor, ridge: float, rounds: int = ROUNDS) -> torch.Tensor:
    """X that makes ``X cov - cross`` small: (m, n) for ``cov`` (n, n) and ``cross`` (m, n).

    Iterated Tikhonov: every round fits what is left of the one before. Directions well above the ridge are fitted to
    ``ridge ** rounds``, those below it hardly at all, and no round raises the squared error.

    Args:
        cov: symmetric, positive semi-definite.
        ridge: in units of the mean of its diagonal.
    """
    scale = cov.diagonal().mean()
    if not bool(scale > 0):
        return torch.zeros_like(cross)
    damped = cov + ridge * scale * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    while bool(failed):
        ridge = max(10 * ridge, 1e-12)
        damped = cov + ridge * scale * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
    x = torch.zeros_like(cross)
    for _ in range(rounds):
        x += torch.cholesky_solve((cross - x @ cov).T, factor).T
    return x


def roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of a positive semi-definite matrix (or a batch), and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    values = values.clamp(min=0).sqrt()
    floor = values.amax(-1, keepdim=True) * 1e-7
    inverse = torch.where(values > floor, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
    return (vectors * values[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


def qk_maps(query: torch.Tensor, key: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps T_q, T_k (rank, d) for which ``(T_q q) . (T_k k)`` is closest to ``q . k`` in the mean square.

    Args:
        query: (d, d) second moment of queries.
        key: (d, d) second moment of keys, around their mean in each sequence: softmax does not see what all keys of
            a query have in common.
        rank: channels that stay.
    """
    (rq, iq), (rk, ik) = roots(query), roots(key)
    u, s, vt = torch.linalg.svd(rq @ rk)
    root = s[:rank].sqrt()[:, None]
    return root * (u[:, :rank].T @ iq), root * (vt[:rank] @ ik)


def value_map(cov: torch.Tensor, output: torch.Tensor, rank: int) -> torch.Tensor:
    """Map R (rank, d) of a head's context, to uncorrelated channels of variance one, that serves its output best.

    ``output @ cov @ R.T`` is the projection of R's channels that comes closest to ``output``.

    Args:
        cov: (d, d) covariance of the head's context.
        output: (m, d) what the output projection makes of it.
    """
    root, inverse = roots(cov)
    _, _, vt = torch.linalg.svd(output @ root, full_matrices=False)
    return vt[:rank] @ inverse


def obs(
    weights: torch.Tensor, cov: torch.Tensor, keep: int, group: int = 1, ridge: float = 1e-3, block: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove groups of features one after the other, each time the one whose loss the others can best make up for.

    Of the ``block`` groups with the lowest scores half are removed, with scores that follow each removal, before all
    groups are scored anew.

    Args:
        weights: (m, n) of the consumer.
        cov: (n, n) of the features.
        keep: groups that stay.
        group: consecutive features that go together (the channels of a head).

    Returns:
        Groups in the order of their removal, and the consumer's squared error after each (removals,).
    """
    n = len(cov)
    scale = cov.diagonal().mean().clamp(min=torch.finfo(cov.dtype).tiny)
    damped = cov.clone()
    damped.diagonal().add_(ridge * scale)
    inverse = torch.linalg.inv(damped)
    del damped  # one of these is as large as an MLP's weights twice over
    weights = weights.clone()
    alive = torch.arange(n // group, device=cov.device)
    order: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    while len(alive) > keep:
        candidates = _scores(weights, inverse, group).topk(min(block, len(alive)), largest=False).indices
        columns = _columns(candidates, group)
        w, c, left = weights[:, columns], inverse[columns][:, columns], candidates
        gone: list[torch.Tensor] = []
        for _ in range(min(max(1, len(candidates) // 2), len(alive) - keep)):
            scores = _scores(w, c, group)
            lowest = scores.argmin()
            errors.append(scores[lowest])
            gone.append(left[lowest])
            left = _without(left, lowest[None])
            w, c = _eliminate(w, c, lowest[None], group)
        removed = torch.stack(gone)
        order.append(alive[removed])
        alive = _without(alive, removed)
        weights, inverse = _eliminate(weights, inverse, removed, group)
    if not order:
        return alive[:0], cov.new_zeros(0)
    return torch.cat(order), torch.stack(errors).cumsum(0)


def _columns(groups: torch.Tensor, group: int) -> torch.Tensor:
    return (groups[:, None] * group + torch.arange(group, device=groups.device)).flatten()


def _without(items: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    stay = torch.ones(len(items), dtype=torch.bool, device=items.device)
    stay[positions] = False
    return items[stay]


def _eliminate(
    weights: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and inverse covariance of what is left when the rest takes over from some groups."""
    gone = _columns(groups, group)
    stay = _without(torch.arange(len(inverse), device=inverse.device), gone)
    gain = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
    left = inverse[stay[:, None], stay]
    left -= inverse[stay[:, None], gone] @ gain
    return weights[:, stay] - weights[:, gone] @ gain, left


def _scores(weights: torch.Tensor, inverse: torch.Tensor, group: int) -> torch.Tensor:
    """Error that removing each group adds: trace of ``W_g [inverse_gg]^-1 W_g^T``."""
    if group == 1:
        return weights.square().sum(0) / inverse.diagonal()
    count = weights.shape[1] // group
    w = weights.view(len(weights), count, group).permute(1, 2, 0)
    blocks = inverse.view(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (w * torch.linalg.solve(blocks, w)).sum((1, 2))

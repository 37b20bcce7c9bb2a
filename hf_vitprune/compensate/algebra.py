"""Least squares with a ridge, removal by OBS, and best low rank: in double precision, from statistics alone."""

from __future__ import annotations

import torch

#: rounds of the iterated ridge
ROUNDS = 3


def ridge_solve(
    cov: torch.Tensor, cross: torch.Tensor, ridge: float, rounds: int = ROUNDS
) -> tuple[torch.Tensor, torch.Tensor]:
    """X that makes ``X cov - cross`` small: (m, n) for ``cov`` (n, n) and ``cross`` (m, n); and ``cross - X cov``.

    Iterated Tikhonov: every round fits what is left of the one before. Directions well above the ridge are fitted to
    ``ridge ** rounds``, those below it hardly at all, and no round raises the squared error.

    Args:
        cov: symmetric, positive semi-definite.
        ridge: in units of the mean of its diagonal.
    """
    x = torch.zeros_like(cross)
    if not bool(cov.diagonal().mean() > 0):
        return x, cross
    factor, damping = _damped_factor(cov, ridge)
    left = cross
    for _ in range(rounds):
        step = torch.cholesky_solve(left.T, factor).T
        x += step
        left = damping * step  # left - step @ cov, as step @ (cov + damping) is left
    return x, left


def _damped_factor(cov: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    """Cholesky factor of ``cov`` with a ridge, and the ridge: larger where rounding left ``cov`` indefinite."""
    scale = float(cov.diagonal().mean())
    while True:
        damped = cov.clone()
        damped.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return factor, ridge * scale
        ridge = max(10 * ridge, 1e-12)


def nested_errors(
    cov: torch.Tensor, cross: torch.Tensor, total: torch.Tensor, group: int, ridge: float
) -> torch.Tensor:
    """(n / group,) squared errors of the best Linears on the first ``group`` features, on the first two groups, ...

    One Cholesky factor serves all of them: what a feature adds is what those before it leave over.

    Args:
        cov: (n, n) of the features.
        cross: (m, n) of targets and features.
        total: variance of the targets, in all.
    """
    if not bool(cov.diagonal().mean() > 0):
        return total.expand(len(cov) // group)
    factor, _ = _damped_factor(cov, ridge)
    explained = torch.linalg.solve_triangular(factor, cross.T, upper=False).square().sum(1)
    return (total - explained.cumsum(0)[group - 1 :: group]).clamp(min=0)


def roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of a positive semi-definite matrix (or a batch), and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    values = values.clamp(min=0).sqrt()
    floor = values.amax(-1, keepdim=True) * 1e-7
    inverse = torch.where(values > floor, 1 / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
    return (vectors * values[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT


def qk_maps(query: torch.Tensor, key: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps T_q, T_k (..., rank, d) for which ``(T_q q) . (T_k k)`` is closest to ``q . k`` in the mean square.

    Args:
        query, key: (..., d, d) second moments; of keys around their mean in each sequence: softmax does not see what
            all keys of a query have in common.
    """
    (rq, iq), (rk, ik) = roots(query), roots(key)
    u, s, vt = torch.linalg.svd(rq @ rk)
    root = s[..., :rank, None].sqrt()
    return root * (u[..., :rank].mT @ iq), root * (vt[..., :rank, :] @ ik)


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


def balance(values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Factors of value channels, and divisors of what reads them, with which the weights of both are equally long.

    Low rank leaves channels of variance one, whose values are long and whose readers short: Adam, whose steps know no
    scale, would all but overwrite the short ones.

    Args:
        values: (channels, inputs).
        output: (outputs, channels).
    """
    factors = (output.norm(dim=0) / values.norm(dim=1)).sqrt()
    return torch.where(factors.isfinite() & (factors > 0), factors, 1.0)


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
    alive = torch.arange(len(cov) // group, device=cov.device)
    if len(alive) <= keep or not bool(cov.diagonal().mean() > 0):  # where nothing varies, nothing is lost
        gone = alive[: max(0, len(alive) - keep)]
        return gone, cov.new_zeros(len(gone))
    inverse = torch.cholesky_inverse(_damped_factor(cov, ridge)[0])
    rows = weights.T.clone(memory_format=torch.contiguous_format)
    order: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    while len(alive) > keep:
        scores = _scores(_squares(rows, group), _blocks(inverse, group))
        candidates = scores.topk(min(block, len(alive)), largest=False).indices
        columns = _columns(candidates, group)
        products = rows[columns] @ rows[columns].T
        count = min(max(1, len(candidates) // 2), len(alive) - keep)
        first, added = _lowest(products, inverse[columns[:, None], columns], count, group)
        removed = candidates[first]
        order.append(alive[removed])
        errors.append(added)
        alive, rows, inverse = _without(removed, alive, rows, inverse, group)
    return torch.cat(order), torch.cat(errors).cumsum(0)


def _lowest(
    products: torch.Tensor, inverse: torch.Tensor, count: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` groups that go first, one after the other, and the error that each adds.

    ``products``: (k, k) of the consumer's weights with each other; ``inverse``: covariance. Both are overwritten.
    """
    if group == 1:
        return _lowest_features(products, inverse, count)
    gone: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    dead = torch.zeros(len(inverse) // group, dtype=torch.bool, device=inverse.device)
    for _ in range(count):
        scores = _scores(_blocks(products, group), _blocks(inverse, group)).masked_fill(dead, torch.inf)
        lowest = scores.argmin()
        gone.append(lowest)
        errors.append(scores[lowest])
        dead[lowest] = True
        at = _columns(lowest[None], group)
        corner = inverse[at[:, None], at]
        gain = torch.linalg.solve(corner, inverse[at])
        # W -> W - W_g gain, so that W^T W changes by these
        half = gain.T @ (products[at] - products[at[:, None], at] @ gain / 2)
        products -= half + half.T
        inverse -= inverse[:, at] @ gain
        inverse[at[:, None], at] = corner  # out of play, and not singular
    return torch.stack(gone), torch.stack(errors)


def _lowest_features(products: torch.Tensor, inverse: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_lowest`, where a group is one feature: thousands of small steps, which a GPU would wait for.

    Of both matrices only the diagonals follow each removal; a row is brought up to date when its feature goes.
    """
    device, products, inverse = products.device, products.cpu(), inverse.cpu()
    left, scale = products.diagonal().clone(), inverse.diagonal().clone()
    # of each removal: W -> W - W_g gain, so that W^T W changes by gain rest^T + rest gain^T, the inverse by row gain^T
    rows, gains, rests = products.new_zeros(3, count, len(inverse)).unbind()
    dead = torch.zeros_like(left)
    gone: list[int] = []
    errors: list[float] = []
    for j in range(count):
        scores = left / scale + dead
        lowest = int(scores.argmin())
        gone.append(lowest)
        errors.append(float(scores[lowest]))
        dead[lowest] = torch.inf
        before = gains[:j, lowest]
        torch.sub(inverse[lowest], before @ rows[:j], out=rows[j])
        torch.div(rows[j], scale[lowest], out=gains[j])
        both = before @ rests[:j] + rests[:j, lowest] @ gains[:j]
        torch.sub(products[lowest], both, out=rests[j]).sub_(gains[j] * (left[lowest] / 2))
        left.addcmul_(gains[j], rests[j], value=-2)
        scale.addcmul_(rows[j], gains[j], value=-1)
        scale[lowest] = 1.0  # out of play, and not singular
    return torch.tensor(gone, device=device), torch.tensor(errors, dtype=products.dtype, device=device)


def _columns(groups: torch.Tensor, group: int) -> torch.Tensor:
    return (groups[:, None] * group + torch.arange(group, device=groups.device)).flatten()


def _without(
    removed: torch.Tensor, alive: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is left when the other groups take over, in place: the removed ones change places with the last ones.

    ``removed``: positions of groups; ``alive``: (groups,) their numbers; ``rows``: (features, m) of the consumer.
    """
    stay = len(alive) - len(removed)
    last = torch.ones(len(removed), dtype=torch.bool, device=removed.device)
    last[removed[removed >= stay] - stay] = False
    low, high = removed[removed < stay], last.nonzero().flatten() + stay
    here, there = torch.cat([low, high]), torch.cat([high, low])
    alive[here] = alive[there]
    here, there, stay = _columns(here, group), _columns(there, group), stay * group
    rows[here] = rows[there]
    inverse[here] = inverse[there]
    inverse[:, here] = inverse[:, there]
    gain = torch.linalg.solve(inverse[stay:, stay:], inverse[stay:, :stay])
    rows[:stay].addmm_(gain.T, rows[stay:], alpha=-1)
    inverse[:stay, :stay].addmm_(inverse[:stay, stay:], gain, alpha=-1)
    return alive[: stay // group], rows[:stay], inverse[:stay, :stay]


def _squares(rows: torch.Tensor, group: int) -> torch.Tensor:
    """(groups, group, group) products of the weights of each group with each other."""
    if group == 1:
        return rows.square().sum(1)[:, None, None]
    grouped = rows.unflatten(0, (-1, group))
    return grouped @ grouped.mT


def _blocks(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """(groups, group, group) on the diagonal."""
    count = len(matrix) // group
    return matrix.unflatten(1, (count, group)).unflatten(0, (count, group)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _scores(products: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Error that removing each group adds: trace of ``W_g [inverse_gg]^-1 W_g^T``, from ``W_g^T W_g``."""
    if inverse.shape[1] == 1:
        return products[:, 0, 0] / inverse[:, 0, 0]
    return torch.linalg.solve(inverse, products).diagonal(dim1=1, dim2=2).sum(1)

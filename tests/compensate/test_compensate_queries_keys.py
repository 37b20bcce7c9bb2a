"""One basis of queries and keys serves all images and windows; where it does not, the plan's channels stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_vitprune.compensate.queries_keys import Projection, _errors, _products, _rotated
from hf_vitprune.compensate.streams import Ledger, Site, selection

SIZE = 4


def site_of(batches: list[torch.Tensor]) -> Any:
    """A layer of one head; channels 0 to 3 of its input are its queries, 4 to 7 its keys. Channels 0 and 1 stay."""
    small = SimpleNamespace(attention_inputs=lambda x: x, part=lambda _: SimpleNamespace(in_features=2 * SIZE))
    streams = SimpleNamespace(small=batches, token_weights=lambda x, _: torch.ones(x.shape[0] * x.shape[1]))
    site = SimpleNamespace(
        streams=streams,
        small=small,
        device=torch.device("cpu"),
        entry=SimpleNamespace(index=3, heads=(5,), qk=((0, 1),)),
        source=SimpleNamespace(qk_dim=SIZE),
        ledger=Ledger(),
    )
    site.record = lambda *row: Site.record(site, *row)
    return site


def projections() -> tuple[Projection, Projection]:
    eye = torch.eye(2 * SIZE, dtype=torch.float64)
    bias = torch.zeros(1, SIZE, dtype=torch.float64)
    return Projection(eye[None, :SIZE], bias), Projection(eye[None, SIZE:], bias)


def sequences(differ: bool) -> list[torch.Tensor]:
    """Queries and keys are large in channel 2: of the same images, or of different ones, so that no product is."""
    x = torch.randn(40, 30, 2 * SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, :, [2, 6]] *= 10
    if differ:
        x[:20, :, 2] = x[20:, :, 6] = 0
    return list(x.split(7))


def product(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Queries times keys around their mean, through a head's maps."""
    query, key = x[..., :SIZE] @ maps[0, 0].T, (x[..., SIZE:] - x[..., SIZE:].mean(1, keepdim=True)) @ maps[1, 0].T
    return query @ key.mT


@pytest.mark.parametrize("differ", [False, True])
def test_the_basis_is_taken_where_it_loses_less(differ: bool) -> None:
    batches = sequences(differ)
    site, (query, key) = site_of(batches), projections()
    plain = selection(site.entry.qk, SIZE, site.device).expand(2, 1, -1, -1)
    made = _rotated(site, query, key, plain)
    x, whole = torch.cat(batches), torch.eye(SIZE, dtype=torch.float64).expand(2, 1, SIZE, SIZE)
    exact = product(x, whole)
    lost = [float((exact - product(x, maps)).square().sum()) for maps in (torch.zeros_like(plain), plain, made)]
    found = _errors(_products(site, query, key), torch.stack([torch.zeros_like(plain), plain, made]))
    torch.testing.assert_close(found[:, 0], torch.tensor(lost, dtype=torch.float64))
    (row,) = site.ledger.rows
    before, after = ((value / lost[0]) ** 0.5 for value in lost[1:])
    assert row == {
        "layer": 3,
        "part": "qk",
        "before": pytest.approx(before, 1e-3),
        "after": pytest.approx(after, 1e-3),
    }
    assert torch.equal(made, plain) == differ == (lost[2] == lost[1]) and lost[2] <= lost[1]
    assert bool(site.ledger.notes) == differ
    if differ:
        assert "layer 3, head 5" in site.ledger.notes[0]

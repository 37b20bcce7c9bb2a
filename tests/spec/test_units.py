"""The table of units: every axis that a cut shortens is in it, at the right places, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_vitprune.modeling.structure import layer_paths
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.units import Axis, UnitSet, unit_sets, unit_table
from hf_vitprune.surgery.cuts import find_cuts
from hf_vitprune.surgery.transplant import empty_like
from tiny import CLASSIFIERS, hybrid, make


def without(plan: PruningPlan, one: UnitSet, kept: tuple[int, ...]) -> PruningPlan:
    if one.layer is None:
        return replace(plan, embedding=kept)
    entry = plan.layers[one.layer]
    if one.unit == "heads":
        entry = entry.keep_heads(kept)
    elif one.unit == "mlp":
        entry = replace(entry, mlp=kept)
    else:
        entry = entry.keep_channels(one.unit, kept)
    return plan.with_layers([*plan.layers[: one.layer], entry, *plan.layers[one.layer + 1 :]])


def cuts_in_layers(model: Any, plan: PruningPlan) -> dict[tuple[str, int], list[int]]:
    """(tensor, axis) -> indices that stay, of every axis in a layer that gets shorter."""
    state = model.state_dict()
    layers = tuple(f"{paths.layer}." for paths in layer_paths(model, plan.source))
    return {
        (cut.source, axis): index.tolist()
        for cut in find_cuts(model, empty_like(model, plan), plan).values()
        for axis, index in cut.index.items()
        if cut.source.startswith(layers) and len(index) < state[cut.source].shape[axis]
    }


@pytest.mark.parametrize("case", [*CLASSIFIERS, "hybrid"])
def test_table_has_exactly_the_axes_that_are_cut(case: str) -> None:
    model = hybrid("Dinov2ForImageClassification") if case == "hybrid" else make(case)
    architecture = Architecture.of(model)
    table = unit_table(architecture, layer_paths(model, architecture), model.state_dict().keys())
    sets = unit_sets(architecture)
    lengths = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert list(sets)[1:] == list(table)
    for one in sets.values():
        if one.unit == "layers":
            continue
        kept = tuple(u for u in range(one.size) if u not in (0, one.size - 2))
        cuts = cuts_in_layers(model, without(PruningPlan.dense(model), one, kept))
        axes = [axis for axis in table[one.name] if axis.layer is not None]
        assert len(axes) == len({(axis.tensor, axis.axis) for axis in axes})
        assert {(a.tensor, a.axis): a.places(kept, one.size).tolist() for a in axes} == cuts
        assert all(len(a.places(range(one.size), one.size)) == lengths[a.tensor][a.axis] for a in axes)


def test_sums_of_an_axis_are_those_of_its_places() -> None:
    axis = Axis("weight", 1, repeats=3, run=2)
    values = torch.arange(48.0).view(2, 24)
    assert axis.sums(values).tolist() == [values[:, axis.places([u], 4)].sum().item() for u in range(4)]
    assert axis.places([2, 0], 4).tolist() == [4, 5, 0, 1, 12, 13, 8, 9, 20, 21, 16, 17]


def test_models_that_read_some_residual_channels_have_no_embedding_set() -> None:
    architecture = Architecture.of(make("ViTForImageClassification"))
    assert "embedding" in unit_sets(architecture)
    narrow = (replace(architecture.layers[0], mlp_in=20), *architecture.layers[1:])
    assert "embedding" not in unit_sets(replace(architecture, layers=narrow))
    assert "embedding" not in unit_sets(Architecture.of(make("SwinForImageClassification")))

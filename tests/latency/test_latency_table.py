"""Latency tables: the right blocks are timed, read back for every shape, kept in files, and refused elsewhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune import Architecture, LatencyTable, PruningPlan, count, truncate
from hf_vitprune.errors import InvalidConfigError, LatencyTableError, UnsupportedModelError
from hf_vitprune.latency import measure
from hf_vitprune.latency.grid import GRID_AXES, STEPS, spread, stage_axes
from hf_vitprune.modeling.native import to_native
from latency_tables import made_table
from plans import PLANS, plan_named
from tiny import ALL_LAYERS, CASES, CLASSIFIERS, NECKS, NO_LOOK, hybrid, make

VIT = "ViTForImageClassification"
SWIN = "SwinForImageClassification"
#: as small as a grid can be that spans every shape
CORNERS = {name: [1] for name in STEPS}
#: of one point: the dense sizes
DENSE_ONLY = {name: [10**6] for name in STEPS}


def parameters_of(call: functools.partial[Any]) -> int:
    return sum(p.numel() for p in call.func.parameters())  # type: ignore[attr-defined]


def weigh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which everything takes a second more than it has parameters."""
    monkeypatch.setattr(measure, "sample", lambda call, device, repeats: 1.0 + parameters_of(call))
    monkeypatch.setattr(measure, "warm_up", lambda call, device, least: 1)


def measured(model: Any, **changes: Any) -> LatencyTable:
    return LatencyTable.measure(model, **{"batch_size": 2, "rounds": 1, "progress": False, "grid": CORNERS, **changes})


# ---------------------------------------------------------------------- measuring
def check_parts_add_up(table: LatencyTable, architecture: Architecture) -> None:
    """By :func:`weigh`'s clock: a second for each block, and for what is around them."""
    seconds = table.predict(architecture) - len(architecture.layers) - 1 + len(set(architecture.stages))
    assert seconds == pytest.approx(count(architecture).params, rel=1e-9)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_what_is_timed_adds_up_to_the_model(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are linear in every size, so a table of them must give those of any shape exactly."""
    model = make(case)
    weigh(monkeypatch)
    table = measured(model)
    assert table.provenance["dense_seconds"] == 1 + count(model).params
    for name in PLANS:
        plan = plan_named(name, model)
        if plan is not None:
            check_parts_add_up(table, plan.architecture)
    # other mixers, in the place of attention
    depth = len(Architecture.of(model).layers)
    architecture = Architecture.of(hybrid(case, ["conv3x3", "conv1x1", "identity", "attention", "conv3x3"][:depth]))
    assert {"conv3x3", "conv1x1", "identity"} <= {shape.mixer for shape in architecture.layers}
    for norm in (True, False):
        layers = tuple(replace(s, batch_norm=norm, conv_channels=3) if s.kernel else s for s in architecture.layers)
        check_parts_add_up(table, architecture.replace(layers=layers))


@pytest.mark.parametrize("case", [*NECKS, ALL_LAYERS])
def test_blocks_that_do_not_stand_for_all_are_not_timed(case: str) -> None:
    with pytest.raises(UnsupportedModelError, match="windows" if case == ALL_LAYERS else "features of several layers"):
        measured(make(case))


OTHERS = [c for c in CASES if c not in (*CLASSIFIERS, *NECKS, ALL_LAYERS) and not c.startswith(NO_LOOK)]


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_around_the_blocks_is_timed_for_every_class(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are those of the classifiers, so few shapes of them will do."""
    model = make(case)
    weigh(monkeypatch)
    table = measured(model, grid={**DENSE_ONLY, "embedding": [1]})
    assert table.provenance["dense_seconds"] == 1 + count(model).params
    check_parts_add_up(table, Architecture.of(model))
    plan = plan_named("embedding", model)
    if plan is not None:
        check_parts_add_up(table, plan.architecture)


def test_swin_with_an_empty_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch)
    small = truncate(make(SWIN), 2, stock=False)
    stock = to_native(small)
    assert measured(stock, grid=DENSE_ONLY).predict(Architecture.of(stock)) == pytest.approx(
        1 + 1 + count(stock).params
    )
    seconds = measured(small, grid=DENSE_ONLY).predict(Architecture.of(small))  # around the layers, two were empty
    assert seconds == pytest.approx(2 + 1 - 2 + count(small).params)


def test_other_mixers_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "warm_up", lambda *_: 1)
    for case in (VIT, SWIN):
        model = hybrid(case)
        assert measured(model, grid=DENSE_ONLY).predict(Architecture.of(model)) > 0


def test_windows_are_timed_stage_by_stage_shifted_and_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch)
    table = measured(make(SWIN), grid=DENSE_ONLY)
    assert [set(row) for row in table.stages] == [set(GRID_AXES)] * 2
    assert table.stages[0]["attention"].axes["shifted"] == (0, 1)
    assert table.stages[1]["mlp"].axes["embedding"] == (32,)


def test_times_are_of_this_machine_and_in_a_plausible_proportion() -> None:
    """Real timing, of blocks large enough that 16 times the neurons show."""
    model = make(VIT, hidden_size=64, intermediate_size=1024, image_size=64)
    few = {"heads": [4], "qk": [16], "v": [16], "inputs": [64], "channels": [16], "embedding": [64], "mlp": [1]}
    table = measured(model, rounds=3, monotone=False, grid=few)
    mlp = table.stages[0]["mlp"]
    assert mlp.at(embedding=64, mlp=1024) > 2 * mlp.at(embedding=64, mlp=1) > 0
    assert table.provenance["device"] == measure.device_name()
    assert table.provenance.items() >= {"batch_size": 2, "image_size": [64, 64], "dtype": "float32"}.items()
    assert table.provenance["threads"] == torch.get_num_threads() and table.provenance["attention"] == "sdpa"
    assert table.provenance["date"][:2] == "20"
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_further_models_take_turns_with_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch)
    models = {"small": make(VIT, num_hidden_layers=1), "large": make(VIT, num_hidden_layers=5)}
    table = measured(make(VIT), grid=DENSE_ONLY, beside=models)
    assert table.provenance["beside_seconds"] == {name: 1 + count(model).params for name, model in models.items()}
    assert table.provenance["dense_seconds"] == 1 + count(make(VIT)).params
    assert "beside_seconds" not in measured(make(VIT)).provenance


def test_dtype_image_size_and_config_are_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], torch.dtype, torch.dtype]] = []

    def look(call: functools.partial[Any], device: torch.device, repeats: int) -> float:
        call()
        value = call.keywords.get("pixel_values", call.args[0] if call.args else None)
        kinds = {p.dtype for p in call.func.parameters()} or {torch.bfloat16}  # type: ignore[attr-defined]
        seen.append((tuple(value.shape), value.dtype, *kinds))
        return 1.0

    weigh(monkeypatch)
    monkeypatch.setattr(measure, "sample", look)
    table = measured(CASES[VIT].config(), image_size=(32, 16), dtype=torch.bfloat16, batch_size=3)
    assert {row[1:] for row in seen} == {(torch.bfloat16,) * 2}
    assert {row[0] for row in seen} == {(3, 3, 32, 16), (3, 9, 32), (3, 9, 1)}
    assert table.provenance["image_size"] == [32, 16] and table.provenance["dtype"] == "bfloat16"
    table.check(Architecture.of(make(VIT)), (32, 16))


def test_a_pruned_model_is_measured_as_the_dense_one_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_vitprune import prune

    weigh(monkeypatch)
    model = make(VIT)
    small = prune(model, PruningPlan.random(model, 0.4), stock=False)
    tables = [measured(small), measured(model)]
    assert tables[0].covers == tables[1].covers
    assert tables[0].predict(Architecture.of(small)) == tables[1].predict(Architecture.of(small))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"rounds": 1.5}, "rounds"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": "16"}, "image_size"),
        ({"image_size": (16, 16, 3)}, "image_size"),
        ({"grid": "huge"}, "coarse, fine"),
        ({"grid": {"head": [1]}}, "'head' is no axis"),
        ({"grid": {"heads": [0]}}, "heads is a list"),
        ({"grid": {"heads": []}}, "heads is a list"),
        ({"grid": {"heads": "12"}}, "heads is a list"),
        ({"grid": {"heads": 3}}, "heads is a list"),
    ],
)
def test_impossible_requests(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        measured(make(VIT), **changes)


def test_measuring_takes_up_its_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weigh(monkeypatch)
    file = tmp_path / "partial"
    monkeypatch.setattr(measure.Path, "unlink", lambda self: None)
    first = measured(make(VIT), grid=DENSE_ONLY, partial=file)
    assert len(json.loads(file.read_text())["rounds"]) == 1
    with pytest.raises(LatencyTableError, match="batch_size"):
        measured(make(VIT), grid=DENSE_ONLY, partial=file, batch_size=3)
    monkeypatch.setattr(measure, "sample", lambda *_: pytest.fail("all rounds were there"))
    again = measured(make(VIT), grid=DENSE_ONLY, partial=file)
    assert again.summary()["digest"] != "" and again.predict(Architecture.of(make(VIT))) == first.predict(
        Architecture.of(make(VIT))
    )


# ---------------------------------------------------------------------- grids
def test_default_grids_span_what_a_search_can_ask_for() -> None:
    (full,) = stage_axes(Architecture.of(make(VIT, hidden_size=128, num_attention_heads=2, intermediate_size=512)))
    assert {name: (values[0], values[-1]) for name, values in full.items()} == {
        "embedding": (8, 128),
        "heads": (1, 2),
        "qk": (8, 64),
        "v": (8, 64),
        "mlp": (8, 512),
        "inputs": (8, 128),
        "channels": (8, 64),
    }
    assert all(size % STEPS[name] == 0 for name, values in full.items() for size in values)
    (tiny,) = stage_axes(Architecture.of(make(VIT)))
    assert {values[0] for values in tiny.values()} == {1}
    (fine,) = stage_axes(Architecture.of(make(VIT)), "fine")
    assert all(set(tiny[name]) <= set(fine[name]) or len(fine[name]) >= len(tiny[name]) for name in tiny)


def test_swin_stages_have_their_own_sizes() -> None:
    stages = stage_axes(Architecture.of(make(SWIN)), {"mlp": [4, 40, 1000], "heads": [1, 3]})
    assert [row["embedding"] for row in stages] == [(16,), (32,)]
    assert [row["heads"] for row in stages] == [(1, 2), (1, 3, 4)]
    assert [row["mlp"] for row in stages] == [(4, 32), (4, 40, 64)]


@pytest.mark.parametrize(
    ("largest", "step", "points"), [(64, 8, 4), (6, 1, 3), (1, 1, 3), (30, 8, 4), (36, 8, 4), (8, 8, 4)]
)
def test_spread(largest: int, step: int, points: int) -> None:
    values = spread(largest, step, points)
    assert values[-1] == largest and values == tuple(sorted(set(values))) and len(values) <= points + 1
    assert values[0] == min(step, largest) and all(v % step == 0 for v in values[:-1])


# ---------------------------------------------------------------------- predicting
def test_predictions_are_sums_of_parts() -> None:
    model = make(VIT)
    table = made_table(model)
    dense = Architecture.of(model)
    block = 2e-4 + 1e-6 * 32 * 4 * 32 + 2e-4 + 2e-6 * 48 * 32 - (1e-4 + 1e-6 * 32)
    outside = 1e-3 + 1e-5 * 32 - (1e-4 + 1e-6 * 32)
    assert table.predict(dense) == pytest.approx(3 * block + outside)
    removed = dense.replace(layers=(plan_named("removed branches", model).architecture.layers[0], *dense.layers[1:]))
    assert table.predict(removed) == pytest.approx(3 * block + outside - (1e-6 * 32 * 4 * 32 + 1e-4 - 1e-6 * 32))


def test_monotone_fit_is_a_choice_that_files_keep(tmp_path: Path) -> None:
    model = make(VIT)
    dented = {**made_parts(), "mlp": lambda embedding, mlp, inputs=None: 1.0 if mlp < 30 else 0.5}
    raw, fitted = (made_table(model, parts=dented, monotone=m) for m in (False, True))
    small = Architecture.of(model).replace(
        layers=tuple(shape.__class__("attention", 4, 8, 8, mlp=1) for shape in Architecture.of(model).layers)
    )
    assert raw.predict(small) > raw.predict(Architecture.of(model))
    assert fitted.predict(small) <= fitted.predict(Architecture.of(model))
    for table in (raw, fitted):
        again = LatencyTable.load(table.save(tmp_path / "t.json"))
        assert again.to_dict() == table.to_dict() and again.predict(small) == table.predict(small)


def made_parts() -> dict[str, Any]:
    from latency_tables import LINEAR

    return dict(LINEAR)


def test_sizes_outside_the_grid_are_refused_by_name() -> None:
    model = make(VIT)
    table = made_table(model, grid={"qk": [4], "embedding": [16], "mlp": [8]})
    dense = Architecture.of(model)

    def with_shape(**sizes: Any) -> Architecture:
        shape = dense.layers[0].__class__(**{**dense.layers[0].__dict__, **sizes})
        return dense.replace(layers=(shape, *dense.layers[1:]))

    table.predict(with_shape(qk_dim=4, mlp=8))
    for wrong, message in (
        (with_shape(qk_dim=3), "attention: qk 3 is not covered, the table spans 4 to 8"),
        (with_shape(heads=5), "heads 5 is not covered, the table spans 1 to 4"),
        (with_shape(mlp=7), "mlp: mlp 7"),
        (dense.replace(hidden_size=8), "embedding 8"),
        (dense.replace(hidden_size=16, layers=(with_shape(attention_in=16).layers[0],)), "embedding 16"),
    ):
        with pytest.raises(LatencyTableError, match=message):
            table.predict(wrong)


def test_mixers_that_were_not_timed_are_refused() -> None:
    table = made_table(make(VIT))
    shape = Architecture.of(make(VIT)).layers[0]
    with pytest.raises(LatencyTableError, match="no times of the mixer 'conv7x7'"):
        table.layer_seconds(shape.__class__("conv7x7", mlp=8), 32)


# ---------------------------------------------------------------------- what it is refused for
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: make("DeiTForImageClassification"), "model_type 'deit', the table 'vit'"),
        (lambda: make("ViTModel"), "task 'Model'"),
        (lambda: make(VIT, hidden_size=64), "hidden_size 64, the table 32"),
        (lambda: make(VIT, num_attention_heads=2), "heads"),
        (lambda: make(VIT, intermediate_size=64), "mlp"),
        (lambda: make(VIT, num_hidden_layers=2), "depths"),
        (lambda: make(VIT, patch_size=4), "tokens"),
        (lambda: make(SWIN), "model_type 'swin'"),
    ],
)
def test_another_model_is_refused(other: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(LatencyTableError, match=f"another model or input.*{message}.*hf-vitprune latency"):
        made_table(make(VIT)).predict(Architecture.of(other()))


def test_another_input_or_device_is_refused() -> None:
    architecture = Architecture.of(make(VIT))
    table = made_table(architecture)
    table.check(architecture, 16, 8)
    table.check_device()
    with pytest.raises(LatencyTableError, match=r"images of \(32, 32\), the table \(16, 16\)"):
        table.check(architecture, 32)
    with pytest.raises(LatencyTableError, match="batches of 1, the table 8"):
        table.check(architecture, batch_size=1)
    with pytest.raises(LatencyTableError, match="measured on a toaster.*allow_other_device"):
        made_table(architecture, device="a toaster").check_device()

"""Families whose queries and keys are turned by rotary positions, or whose heads share a table: what goes together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_vitprune import NViTConfig, PruningPlan, criteria, mask, prune
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.errors import InvalidArchitectureError, InvalidPlanError, UnsupportedUnitError
from hf_vitprune.methods.nvit.groups import grouped_sets, plan_of
from hf_vitprune.modeling.native import to_native
from hf_vitprune.plan.layer_plan import PAD
from hf_vitprune.spec.architecture import Architecture
from tiny import assert_same, images, make, relative_error, run


def test_half_a_pair_is_refused() -> None:
    plan = PruningPlan.dense(make("DINOv3ViTModel"))
    with pytest.raises(InvalidPlanError, match="channels c and c \\+ 4 of a head together"):
        plan.with_layers(entry.keep_channels("qk", (0, 1, 4, 6)) for entry in plan.layers).validated()
    with pytest.raises(InvalidPlanError, match="in pairs"):
        plan.with_layers(entry.keep_channels("qk", (0, 4, 5)) for entry in plan.layers).validated()
    with pytest.raises(InvalidArchitectureError, match="layer 0: q/k channels are turned in pairs"):
        Architecture.from_layers(plan.source.config, [{"qk_dim": 3}])
    kept = plan.with_layers(entry.keep_channels("qk", (0, 3, 4, 7)) for entry in plan.layers).validated()
    assert kept.architecture.layers[0].qk_dim == 4


def test_kept_channels_of_a_full_head_stay_in_their_places() -> None:
    """Padded rows of the dense width leave the stock attention in place, which turns every place by its own angle."""
    model = make("DINOv3ViTModel")
    plan = PruningPlan.dense(model)
    rows = tuple(range(8)), (1, PAD, PAD, PAD, 5, PAD, PAD, PAD), (PAD,) * 8, tuple(range(8))
    plan = plan.with_layers(replace(entry, qk=rows, mlp=(0, 1)) for entry in plan.layers)
    small = prune(model, plan)
    queries = small.model.layer[0].attention.q_proj.weight.view(4, 8, -1)
    assert queries.abs().sum(-1)[1].nonzero().squeeze(1).tolist() == [1, 5] and not queries[2].any()
    dense = PruningPlan.dense(small)
    again = dense.with_layers(e.keep_channels("qk", (1, 3, 5, 7)).keep_channels("v", (0, 1)) for e in dense.layers)
    for base, cut in ((model, plan), (small, again)):
        ours, full = (run(made)["last_hidden_state"] for made in (prune(base, cut), mask(base, cut)))
        assert relative_error(ours, full) < 1e-5


def test_criteria_score_pairs() -> None:
    model = make("DINOv3ViTModel")
    scores = criteria.magnitude(model)["layer 1 qk"]
    attention = model.model.layer[1].attention
    rows = attention.q_proj.weight.double().square().sum(1) + attention.k_proj.weight.double().square().sum(1)
    channels = rows.view(4, 8).sum(0)
    assert torch.allclose(scores.square(), channels[:4] + channels[4:])
    assert criteria.activation(model, [{"pixel_values": images()}])["layer 1 qk"].shape == (4,)
    plan = PruningPlan.from_scores(model, criteria.magnitude(model), ratio=0.4, units=("qk",), round_to=4)
    assert {shape.qk_dim % 4 for shape in plan.architecture.layers} == {0}


def test_adapters_are_cut_in_pairs() -> None:
    model = get_peft_model(make("DINOv3ViTModel"), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    plan = PruningPlan.random(model, 0.4, units=("heads", "qk", "v"))
    ours, full = run(prune(model, plan)), run(mask(model, plan))
    assert relative_error(ours["last_hidden_state"], full["last_hidden_state"]) < 1e-5


def test_nvit_removes_pairs() -> None:
    model = make("DINOv3ViTModel")
    sets = grouped_sets(Architecture.of(model), NViTConfig(target=0.8, units=("qk",), group_sizes={"qk": 4}))
    assert {(one.size, one.group, one.channels) for one in sets} == {(4, 2, 2)}
    plan = plan_of(Architecture.of(model), sets, torch.tensor([True, False, True, True] * 3))
    assert {entry.qk[0] for entry in plan.layers} == {(0, 2, 3, 4, 6, 7)}


def test_compensation_leaves_turned_queries_alone() -> None:
    model = make("DINOv3ViTModel")
    plan = PruningPlan.random(model, 0.4, units=("qk", "mlp"))
    better = compensate_plan(model, plan, images(64))
    assert not any("q_proj" in name or "k_proj" in name for name in better.weights)
    assert any("down_proj" in name for name in better.weights)


def test_stock_angles_are_those_of_whole_heads() -> None:
    model = make("DINOv3ViTModel")
    plan = PruningPlan.dense(model)
    narrow = replace(plan, embedding=tuple(range(16)))
    fewer = narrow.with_layers(entry.keep_heads((1, 3)) for entry in narrow.layers)  # 2 heads of 8, as before
    small = prune(model, fewer)
    assert relative_error(run(to_native(small))["pooler_output"], run(small)["pooler_output"]) < 1e-5
    quarters = fewer.with_layers(
        e.keep_heads((0, 1, 2, 3)).keep_channels("qk", (0, 3, 4, 7)).keep_channels("v", range(4))
        for e in narrow.layers
    )
    with pytest.raises(ValueError, match="rotary angles from head_dim"):
        to_native(prune(model, quarters))


def test_heads_of_a_shared_table_stay() -> None:
    model = make("BeitForImageClassification-shared")
    with pytest.raises(UnsupportedUnitError, match="no prunable unit 'heads'"):
        PruningPlan.random(model, 0.4, units=("heads",))
    plan = PruningPlan.dense(model)
    with pytest.raises(InvalidArchitectureError, match="layer 0: all layers share one table"):
        plan.with_layers(entry.keep_heads((0, 1)) for entry in plan.layers).validated()


def test_a_table_goes_with_its_attention() -> None:
    model = make("BeitForImageClassification")
    plan = PruningPlan.dense(model)
    small = prune(
        model, plan.with_layers(entry.with_mixer("none") if entry.index == 1 else entry for entry in plan.layers)
    )
    assert small.beit.layers[1].relative_position_bias is None
    assert small.beit.layers[0].relative_position_bias is not None
    assert_same(run(to_native(model)), run(model))


def test_a_stock_model_scales_by_its_own_heads() -> None:
    model = make("Data2VecVisionForImageClassification")
    plan = replace(PruningPlan.dense(model), embedding=tuple(range(0, 32, 2)))
    halves = plan.with_layers(e.keep_channels("qk", range(4)).keep_channels("v", range(4)) for e in plan.layers)
    small, stock = prune(model, halves, stock=False), prune(model, halves)
    assert type(stock) is type(model)
    assert relative_error(run(stock)["logits"], run(small)["logits"]) < 1e-5
    assert relative_error(run(small)["logits"], run(mask(model, halves))["logits"]) < 1e-5

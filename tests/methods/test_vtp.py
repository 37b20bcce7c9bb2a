"""VTP: scores that start at one, their gradient and penalty, the global threshold, heads, targets and settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_vitprune import Architecture, PruningModel, VTPConfig, count, get_pruning_model
from hf_vitprune.errors import (
    AdapterError,
    InvalidConfigError,
    InvalidPlanError,
    UnsupportedModelError,
)
from hf_vitprune.methods.vtp.config import POINTS
from hf_vitprune.plan.plan import PAD
from hf_vitprune.surgery.gates import Gate, _GatedFeatures
from pruning_runs import VIT, gated, lora_model, scatter_scores, state_of, trainer
from tiny import assert_same, images, make, relative_error, run, total_loss

SIZES = {"attention_in": 32, "attention_out": 32, "mlp_in": 32, "mlp_hidden": 48}


def gate(model: PruningModel, layer: int, point: str) -> Gate:
    return model.method.gates[f"layer{layer}_{point}"]


def set_scores(model: PruningModel, layer: int, point: str, values: Any) -> None:
    gate(model, layer, point).score.data.copy_(torch.as_tensor(values, dtype=torch.float32))


# ---------------------------------------------------------------------- the gate
@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [1e-3, -2.0, 0.5], [0.0, -1e-9, 3.0]])
def test_gradient_is_that_of_the_plain_product(values: list[float]) -> None:
    factors = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_GatedFeatures.apply, (features, factors), eps=1e-4)
    upstream = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = torch.autograd.grad(features * factors, (features, factors), upstream)
    actual = torch.autograd.grad(_GatedFeatures.apply(features, factors), (features, factors), upstream)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_half_precision_is_as_good_as_the_plain_products(dtype: torch.dtype) -> None:
    exact = [torch.randn(64, 16, 8).double(), torch.rand(8).double() + 0.1, torch.randn(64, 16, 8).double()]
    reference = (exact[0] * exact[2]).sum((0, 1))
    error = {}
    for name, product in (("plain", torch.mul), ("ours", _GatedFeatures.apply)):
        features, factors, upstream = (t.to(dtype) for t in exact)
        factors.requires_grad_()
        (grad,) = torch.autograd.grad(product(features.requires_grad_(), factors), factors, upstream)
        error[name] = relative_error(grad.double(), reference)
    assert error["ours"] < max(2 * error["plain"], 0.01)


def saved_bytes(model: torch.nn.Module, pixels: torch.Tensor, autocast: bool) -> int:
    """Memory of everything that the backward pass keeps, but parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", enabled=autocast):
        model(pixel_values=pixels)
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@pytest.mark.parametrize("autocast", [False, True])
def test_gates_cost_no_activation_memory(autocast: bool) -> None:
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 64}
    model, pixels = make(VIT, **sizes, num_hidden_layers=1).train(), images(4, 64)
    without = saved_bytes(model, pixels, autocast)
    wrapped = get_pruning_model(model, VTPConfig(pruning_ratio=0.4)).train()
    assert without > 1e6 and len(wrapped.method.gates) == 4
    assert saved_bytes(wrapped, pixels, autocast) < 1.1 * without


def test_scores_start_at_one_and_nothing_changes() -> None:
    model = make(VIT)
    expected = run(model)
    wrapped = gated()
    assert {name: len(g.score) for name, g in wrapped.method.gates.items()} == {
        f"layer{i}_{point}": size for i in range(3) for point, size in SIZES.items()
    }
    assert all((score == 1).all() for score in wrapped.method.gate_parameters())
    for training in (False, True):
        assert_same(run(wrapped.train(training)), expected)


# ---------------------------------------------------------------------- the penalty
def test_penalty_is_lambda_times_the_sum_of_absolute_scores() -> None:
    model = scatter_scores(gated(sparsity_weight=0.01))
    total = sum(score.abs().sum().item() for score in model.method.gate_parameters())
    penalty = model.method.before_step(None, 0.0, 1.0)
    assert penalty.item() == pytest.approx(0.01 * total)
    gradients = torch.autograd.grad(penalty, model.method.gate_parameters())
    for score, grad in zip(model.method.gate_parameters(), gradients, strict=True):
        torch.testing.assert_close(grad, 0.01 * score.sign())
    model.decide()
    assert model.method.before_step(None, 1.0, 1.0) is None
    assert gated(sparsity_weight=0).method.before_step(None, 0.5, 1.0) is None


def test_penalty_grows_over_the_warm_up() -> None:
    method = gated(sparsity_weight=0.01, sparsity_warmup=0.5).method
    assert method.before_step(None, 0.0, 1.0) is None
    full = 0.01 * sum(map(len, method.gate_parameters()))
    for progress, share in ((0.125, 0.25), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        assert method.before_step(None, progress, 1.0).item() == pytest.approx(share * full)


# ---------------------------------------------------------------------- the decision
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranking_is_global(ratio: float, seed: int) -> None:
    """One list of all scores, sorted; the lowest share goes, wherever it is."""
    model = gated(pruning_ratio=ratio, round_to=1, uneven=True)
    generator = torch.Generator().manual_seed(seed)
    everything = []
    for name, one in model.method.gates.items():
        spread = 1 + torch.rand((), generator=generator)  # sets of different strength
        one.score.data.copy_(spread * torch.randn(len(one.score), generator=generator))
        everything += [(abs(score), name, i) for i, score in enumerate(one.score.tolist())]
    everything.sort()
    kept = {(name, i) for _, name, i in everything[round(len(everything) * ratio) :]}
    assert {name for name, _ in kept} == set(model.method.gates)  # else the floor would keep more
    model.decide()
    decided = {(n, i) for n, one in model.method.gates.items() for i in one.mask.nonzero().squeeze(1).tolist()}
    assert decided == kept
    assert len({len(layer.mlp) for layer in model.plan().layers}) > 1


def test_equal_scores_go_in_equal_shares() -> None:
    plan = gated(pruning_ratio=0.5, round_to=1).method.choose()  # all scores are one
    for layer in plan.layers:
        assert len(layer.heads) == 4 and {len(row) for row in layer.v} == {4}
        assert len(layer.attention_in) == len(layer.mlp_in) == 16 and len(layer.mlp) == 24


def head_scores(kept: dict[int, int]) -> torch.Tensor:
    """Of 4 heads of 8: so many channels (the last ones) far above the others, which are near zero."""
    scores = torch.full((4, 8), 1e-3)
    for head, channels in kept.items():
        scores[head, 8 - channels :] = 5.0
    return scores.flatten()


def with_heads(kept: dict[int, int], **settings: Any) -> tuple[PruningModel, Any]:
    """Only the attention output of layer 0 is cut, at a ratio that drops exactly the scores near zero."""
    ratio = 1 - sum(kept.values()) / 32
    first = {"points": ["attention_out"], "target_modules": r"\.0$"}
    model = gated(pruning_ratio=ratio, **first, **settings)
    assert list(model.method.gates) == ["layer0_attention_out"]
    set_scores(model, 0, "attention_out", head_scores(kept))
    return model, model.plan().layers[0]


def test_even_heads_share_the_budget() -> None:
    _, layer = with_heads({0: 2, 1: 4, 2: 6, 3: 4}, round_to=1)
    assert layer.heads == (0, 1, 2, 3)
    assert [len(row) for row in layer.v] == [4, 4, 4, 4]
    assert layer.v[2] == (2, 3, 4, 5) and layer.v[1] == (4, 5, 6, 7)  # the best of each; ties go to the lower one
    assert layer.v[0][-2:] == (6, 7)  # its two good ones, and two more


def test_uneven_heads_are_padded() -> None:
    model, layer = with_heads({0: 2, 1: 4, 2: 6, 3: 4}, round_to=4, uneven=True)
    assert [sum(c != PAD for c in row) for row in layer.v] == [2, 4, 6, 4]
    assert {len(row) for row in layer.v} == {8}  # the longest, rounded up
    assert layer.v[0] == (6, 7, *[PAD] * 6)
    assert layer.scales["v"][:8] == (5.0, 5.0, *[0.0] * 6)
    assert gate(model, 0, "attention_out").mask.view(4, 8).sum(1).tolist() == [2, 4, 6, 4]


@pytest.mark.parametrize("uneven", [False, True])
def test_a_head_under_the_threshold_goes_with_its_queries_and_keys(uneven: bool) -> None:
    model, layer = with_heads({0: 4, 1: 4, 3: 4}, round_to=4, uneven=uneven)
    assert layer.heads == (0, 1, 3) and len(layer.qk) == 3
    small = model.export()
    attention = small.vit.layers[0].attention
    assert attention.q_proj.out_features == attention.k_proj.out_features == 24
    assert attention.v_proj.out_features == attention.o_proj.in_features == 12
    assert relative_error(run(small)["logits"], run(model)["logits"]) < 1e-5
    assert small.vit.layers[1].attention.q_proj.out_features == 32


@pytest.mark.parametrize(("round_to", "ratio"), [(1, 0.999), (8, 0.95), (16, 0.5), (64, 0.4)])
def test_sets_keep_a_floor_and_multiples(round_to: int, ratio: float) -> None:
    model = scatter_scores(gated(pruning_ratio=ratio, round_to=round_to))
    plan = model.plan()
    for shape in plan.architecture.layers:
        sizes = {"attention_in": 32, "mlp_in": 32, "mlp": 48, "v_dim": 8}
        for name, full in sizes.items():
            size = getattr(shape, name) or full
            assert size == full or (size >= round_to and size % round_to == 0), name
        assert shape.heads >= 1
    if ratio > 0.9:
        assert plan.architecture.layers[0].mlp == round_to
    if not plan.removes_nothing:
        assert relative_error(run(model.export())["logits"], run(model.eval())["logits"]) < 1e-5


def test_all_scores_of_a_set_at_zero() -> None:
    """A whole set under the threshold keeps its floor, and the model still works."""
    model = scatter_scores(gated(pruning_ratio=0.4, round_to=4))
    for point in POINTS:
        set_scores(model, 1, point, torch.zeros(SIZES[point]))
    set_scores(model, 1, "attention_out", head_scores({2: 1}) / 1e4)
    assert model.plan().layers[1].heads == (2,)  # the strongest of the weak
    layer = model.plan().architecture.layers[1]
    assert (layer.attention_in, layer.mlp_in, layer.mlp, layer.heads, layer.v_dim) == (4, 4, 4, 1, 4)
    assert relative_error(run(model.export())["logits"], run(model.eval())["logits"]) < 1e-5


def test_scores_that_are_not_finite_are_no_decision() -> None:
    model = gated()
    gate(model, 0, "mlp_in").score.data[3] = math.nan
    with pytest.raises(InvalidPlanError, match="diverged"):
        model.plan()


# ---------------------------------------------------------------------- folding
@pytest.mark.parametrize("binarize", [False, True])
def test_scores_are_folded_into_the_weights_or_become_one(binarize: bool) -> None:
    model = scatter_scores(gated(binarize=binarize, round_to=4))
    plan, small = model.plan(), model.export()
    for entry, before, after in zip(plan.layers, model.model.vit.layers, small.vit.layers, strict=True):
        columns = {
            "attention_in": (entry.attention_in, before.attention.k_proj, after.attention.k_proj),
            "mlp_in": (entry.mlp_in, before.mlp.fc1, after.mlp.fc1),
            "mlp_hidden": (entry.mlp, before.mlp.fc2, after.mlp.fc2),
        }
        for point, (kept, old, new) in columns.items():
            assert 4 <= len(kept) < SIZES[point]
            one = gate(model, entry.index, point)
            scores = one.score.detach()[list(kept)]
            rows = list(entry.mlp) if point == "mlp_in" else slice(None)
            expected = old.weight[rows][:, list(kept)] * (1.0 if binarize else scores)
            torch.testing.assert_close(new.weight, expected)
            assert one.factors()[list(kept)].eq(1).all() == binarize
            assert sorted(one.mask.nonzero().squeeze(1).tolist()) == list(kept)


# ---------------------------------------------------------------------- where gates are
@pytest.mark.parametrize("point", POINTS)
def test_one_point_alone(point: str) -> None:
    model = scatter_scores(gated(points=[point], round_to=2))
    assert list(model.method.gates) == [f"layer{i}_{point}" for i in range(3)]
    changed = {"attention_in": "attention_in", "attention_out": "v_dim", "mlp_in": "mlp_in", "mlp_hidden": "mlp"}
    fields = ("heads", "qk_dim", *changed.values())
    for before, after in zip(Architecture.of(model).layers, model.plan().architecture.layers, strict=True):
        differing = {name for name in fields if getattr(before, name) != getattr(after, name)} - {"heads"}
        assert differing == {changed[point]}


def test_layers_are_chosen_by_regular_expressions() -> None:
    def gated_layers(**settings: str) -> set[str]:
        return {name.partition("_")[0] for name in gated(**settings).method.gates}

    assert gated_layers() == {"layer0", "layer1", "layer2"}
    assert gated_layers(target_modules=r"layers\.[12]") == {"layer1", "layer2"}
    assert gated_layers(exclude_modules=r"layers\.0$") == {"layer1", "layer2"}
    assert gated_layers(target_modules=r"layers\.[01]", exclude_modules="0") == {"layer1"}
    model = scatter_scores(gated(target_modules=r"\.1$"))
    dense, pruned = Architecture.of(model).layers, model.plan().architecture.layers
    assert [a == b for a, b in zip(dense, pruned, strict=True)] == [True, False, True]
    with pytest.raises(InvalidConfigError, match=r"target_modules='blocks'.*vit\.layers\.2"):
        gated(target_modules="blocks")
    with pytest.raises(InvalidConfigError, match=r"exclude_modules='vit'"):
        gated(exclude_modules="vit")


# ---------------------------------------------------------------------- settings
def refused(name: str, message: str, *values: Any) -> list[tuple[dict[str, Any], str]]:
    return [({name: value}, f"{name} ?{message}") for value in values]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pruning_ratio.*or target.*none"),
        ({"pruning_ratio": 0.4, "target": 0.5}, "pruning_ratio.*or target.*both"),
        *refused("pruning_ratio", "must lie strictly between 0 and 1", 0, 1, -1, "0.4", True, math.nan),
        *refused("target", "must lie strictly between 0 and 1", 0.0, 1.0, 40, "half"),
        ({"target": 0.5, "target_metric": "flops"}, "target_metric is one of macs, params, latency, not 'flops'"),
        *refused("sparsity_weight", "is a number, not negative", -1e-4, math.nan, math.inf, None, "1"),
        *refused("sparsity_warmup", "is a number, between 0 and 1", -0.1, 100, None),
        *refused("points", "is a non-empty choice of attention_in", [], "mlp_in", ["mlp"], None, [1], ["mlp_in"] * 2),
        *refused("round_to", "is a whole number of at least 1", 0, -8, 8.0, True),
        *refused("uneven", "is True or False", "no", 1),
        *refused("binarize", "is True or False", None),
        *refused("target_modules", ".*is no regular expression", "[", ["vit"]),
        *refused("exclude_modules", ".*is no regular expression", "("),
        *refused("gate_learning_rate", "", 0, -1.0, math.nan, "1e-3"),
        *refused("image_size", "is a number of pixels or", 0, 22.4, (16,), (16, 16, 3), "224"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    if settings and not {"pruning_ratio", "target"} & set(settings):
        settings = {"pruning_ratio": 0.4, **settings}
    with pytest.raises(InvalidConfigError, match=message):
        VTPConfig(**settings)


def test_wrong_models_and_configs_are_refused() -> None:
    model = gated()
    with pytest.raises(InvalidConfigError, match="unload"):
        get_pruning_model(model, VTPConfig(pruning_ratio=0.4))
    with pytest.raises(InvalidConfigError, match="known: .*VTPConfig"):
        get_pruning_model(make(VIT), {"pruning_ratio": 0.4})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="Linear"):
        get_pruning_model(torch.nn.Linear(2, 2), VTPConfig(pruning_ratio=0.4))
    for saving in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(UnsupportedModelError, match="export"):
            saving("folder")


# ---------------------------------------------------------------------- adapters
def test_lora_is_trained_with_gates_and_exported_as_adapters(tmp_path: Any) -> None:
    peft_model = lora_model()
    before, hooks = state_of(peft_model), sum(len(m._forward_pre_hooks) for m in peft_model.modules())
    model = get_pruning_model(peft_model, VTPConfig(pruning_ratio=0.4, round_to=4, gate_learning_rate=1.0))
    trainer(model, tmp_path).train()

    after = peft_model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    assert moved == trained and any("lora_A" in name for name in moved)
    assert all((score != 1).any() for score in model.method.gate_parameters())

    small = model.eval().export(compensate=False)
    assert type(small).__name__ == "PeftModel" and count(small).macs < count(peft_model).macs
    assert relative_error(run(small)["logits"], run(model)["logits"]) < 1e-5
    names = [name for name, parameter in small.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in names) and all("lora_" in name or "classifier" in name for name in names)
    total_loss(small).backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)
    assert not any(
        "lora_" not in n and "classifier" not in n for n, p in small.named_parameters() if p.grad is not None
    )

    assert model.unload() is peft_model
    assert sum(len(m._forward_pre_hooks) for m in peft_model.modules()) == hooks


def test_adapters_that_cannot_be_carried_over_are_refused_before_training() -> None:
    from peft import LoraConfig

    config = VTPConfig(pruning_ratio=0.4)
    merged = lora_model()
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge"):
        get_pruning_model(merged, config)
    inside = make(VIT)
    inside.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="PeftModel.from_pretrained"):
        get_pruning_model(inside, config)

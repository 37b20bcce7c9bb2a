"""Compensation on every family: same shape, pruned == masked, exact where nothing is lost, else closer."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from compensated import distance, fits, logits, pixels
from hf_vitprune import Architecture, Compensation, OneShotScores, PruningPlan, mask, prune
from hf_vitprune.compensate import PARTS, compensate_plan
from plans import PLANS, each_layer, few, plan_named, pruning_plans, without_scales
from quick import mostly_slow
from tiny import CASES, CLASSIFIERS, NO_LOOK, assert_same, images, make, relative_error, run
from two_compensations import EXPORT, agreed, weights_of

VIT, SWIN, SWIGLU = (f"{name}ForImageClassification" for name in ("ViT", "Swin", "Dinov2"))
SWIGLU += "-swiglu"
EXACT = [name for name in PLANS if name != "scaled"]


def checked(model: PreTrainedModel, plan: PruningPlan, compensate: Any = "auto") -> PreTrainedModel:
    """The compensated model, after what must hold for every one."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = compensate_plan(model, plan, pixels(), compensate)
    small = prune(model, made, allow_unchanged=True)
    assert Architecture.of(small) == plan.architecture
    assert all(fit["after"] <= fit["before"] + 1e-6 for fit in fits(made)), fits(made)
    outputs, masked = run(small, pixels(3, 2)), run(mask(model, made), pixels(3, 2))
    for name in ("logits", "pooler_output", "image_embeds"):
        if name in outputs and outputs[name].shape == masked[name].shape:
            assert relative_error(outputs[name], masked[name]) < 1e-8, name
    assert_same(dict(model.state_dict()), before)
    return small


# ---------------------------------------------------------------------- every family, every kind of cut
#: plans for the families whose layers are unlike any other's; the rest have one each
MANY = {VIT: EXACT, SWIN: ["heads", "everything", "padded values", "removed branches"], SWIGLU: ["everything", "mlp"]}


@pytest.mark.parametrize(
    ("case", "plan_name"),
    mostly_slow(
        (case, plan)
        for case in CASES
        if not (case.startswith(("Swinv2", *NO_LOOK)) or case == "BeitForImageClassification-shared")  # refused
        for plan in MANY.get(case, ["everything"] if case in CLASSIFIERS else ["removed branches"])
    ),
)
def test_compensated_models_are_masked_ones_and_closer_to_the_dense(case: str, plan_name: str) -> None:
    model = make(case).double()
    plan = plan_named(plan_name, model)
    assert plan is not None
    plan = without_scales(plan)
    small = checked(model, plan)
    if "logits" not in (dense := run(model, pixels(16, 3))):
        return
    plain = distance(logits(prune(model, plan), pixels(16, 3)), dense["logits"])
    assert distance(logits(small, pixels(16, 3)), dense["logits"]) < plain


@pytest.mark.parametrize("case", CLASSIFIERS)
@few
@given(data=st.data())
def test_any_plan(case: str, data: st.DataObject) -> None:
    model = make(case).double()
    plan = without_scales(data.draw(pruning_plans(Architecture.of(model))))
    if plan.removes_nothing:
        return
    parts = data.draw(st.one_of(st.none(), st.sets(st.sampled_from(PARTS), min_size=1)))
    chosen = Compensation(
        parts=PARTS if parts is None else tuple(parts), reselect=data.draw(st.booleans()), token_share=None
    )
    checked(model, plan, chosen)


@pytest.mark.parametrize("case", [VIT, SWIN, SWIGLU])
def test_a_pruned_model_can_be_pruned_and_compensated_again(case: str) -> None:
    model = make(case).double()
    first = plan_named("narrow inputs", model)
    assert first is not None
    once = prune(model, without_scales(first), calibration=pixels())
    checked(once, PruningPlan.random(once, 0.4, ["heads", "qk", "v", "mlp"]))
    narrow = each_layer(PruningPlan.dense(once), lambda e: replace(e, attention_in=(0, 2, 5), mlp_in=(1, 3, 4, 6)))
    checked(once, narrow)


# ---------------------------------------------------------------------- exact where nothing is lost
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_nothing_removed_changes_nothing(case: str) -> None:
    model = make(case)
    plan = PruningPlan.dense(model)
    assert compensate_plan(model, plan, images(8)) == plan
    same = prune(model, plan, calibration=images(8), allow_unchanged=True)
    assert_same(run(same), run(model))


@pytest.mark.parametrize(
    ("case", "plan_name"),
    [(VIT, plan) for plan in ("heads", "qk", "v", "mlp", "uneven heads", "padded values", "removed branches")]
    + [(SWIN, "qk"), (SWIN, "padded values"), (SWIGLU, "mlp")],
)
def test_units_that_are_zero_already_are_cut_exactly(case: str, plan_name: str) -> None:
    """As after a training with masks: the slices are right, and not one bit of them changes."""
    model = make(case)
    plan = plan_named(plan_name, model)
    assert plan is not None
    masked = mask(model, plan)
    made = compensate_plan(masked, plan, images(8))
    if plan_name == "removed branches":
        made = compensate_plan(masked, plan, images(8), ("qk", "v", "mlp"))
    assert made.weights == {} and fits(made) == []
    assert_same(dict(prune(masked, made).state_dict()), dict(prune(model, plan).state_dict()))


def redundant(case: str, unit: str) -> tuple[PreTrainedModel, PruningPlan]:
    """A model whose first six units (of a kind) make up for the last ones exactly, and the plan without those."""
    model = make(case)
    plan = PruningPlan.dense(model)
    state = model.state_dict()
    paths = plan.source.family.layer_paths(plan.source.family.encoder_path(model), "{}", model.config)
    names = plan.source.layer_names()

    def mix(path: str, count: int, size: int, matrix: torch.Tensor) -> None:
        for suffix in ("weight", "bias"):
            tensor = state[f"{path}.{suffix}"]
            rows = tensor.view(count, size, -1)
            rows[:, size - matrix.shape[0] :] = matrix @ rows[:, : matrix.shape[1]]

    for name, entry in zip(names, plan.layers, strict=True):
        shape = plan.source.layers[entry.index]
        twins = torch.eye(shape.mlp // 2)
        if unit == "mlp":  # behind the activation only copies are linear
            for path in paths.fc1:
                mix(path.replace("{}", name), 1, shape.mlp, twins)
        else:
            size = shape.v_dim
            matrix = torch.randn(2, size - 2, generator=torch.Generator().manual_seed(entry.index))
            for path in (paths.v,) if unit == "v" else (paths.q, paths.k):
                mix(path.replace("{}", name), shape.heads, size, matrix)
    if unit == "mlp":
        return model, each_layer(plan, lambda e: replace(e, mlp=e.mlp[: len(e.mlp) // 2]))
    return model, each_layer(plan, lambda e: e.keep_channels(unit, range(len(e.v[0]) - 2)))


@pytest.mark.parametrize(
    ("case", "unit"),
    [(case, "mlp") for case in CLASSIFIERS] + [(case, u) for case in (VIT, SWIN) for u in ("v", "qk")],
)
def test_redundant_channels_go_without_loss(case: str, unit: str) -> None:
    model, plan = redundant(case, unit)
    outputs = run(model)["logits"]
    assert relative_error(run(prune(model, plan))["logits"], outputs) > 1e-2
    assert relative_error(run(prune(model, plan, calibration=images(32, seed=3)))["logits"], outputs) < 1e-4


def test_constant_features_are_folded_into_biases() -> None:
    model = make(VIT).double()
    for layer in model.vit.layers:
        layer.layernorm_after.weight.data[::2] = 0.0
        layer.mlp.fc1.weight.data[::3] = 0.0
    plan = each_layer(
        PruningPlan.dense(model),
        lambda e: replace(e, mlp_in=tuple(range(1, 32, 2)), mlp=tuple(i for i in e.mlp if i % 3)),
    )
    small = prune(model, plan, calibration=pixels())
    assert relative_error(logits(small, pixels(3, 2)), logits(model, pixels(3, 2))) < 1e-6


# ---------------------------------------------------------------------- parts
def test_each_part_by_itself_helps_and_touches_its_own_weights_only() -> None:
    model = make(VIT).double()
    dense = logits(model, pixels(16, 3))
    for part, plan_name, touched in (
        ("qk", "qk", ("q_proj", "k_proj")),
        ("v", "v", ("v_proj", "o_proj")),
        ("v", "heads", ("o_proj",)),
        ("mlp", "mlp", ("fc2",)),
        ("inputs", "narrow inputs", ("q_proj", "k_proj", "v_proj", "fc1")),
        ("layers", "layers", ("fc2",)),
        ("layers", "removed branches", ("fc2", "o_proj")),
    ):
        plan = plan_named(plan_name, model)
        assert plan is not None
        plan = without_scales(plan)
        made = compensate_plan(model, plan, pixels(), (part,))
        assert made.weights and {name.split(".")[-2] for name in made.weights} <= set(touched)
        plain = distance(logits(prune(model, plan), pixels(16, 3)), dense)
        assert distance(logits(prune(model, made), pixels(16, 3)), dense) < plain, (part, plan_name)


def test_removed_residual_channels_are_predicted_by_all_readers_and_the_classifier() -> None:
    model = make(VIT).double()
    plan = PruningPlan.random(model, 0.3, ["embedding"])
    made = compensate_plan(model, plan, pixels(), ("embedding",))
    assert {name.split(".")[-2] for name in made.weights} == {"q_proj", "k_proj", "v_proj", "fc1", "classifier"}
    unread = compensate_plan(
        make("ViTForMaskedImageModeling"),
        PruningPlan.random(make("ViTForMaskedImageModeling"), 0.3, ["embedding"]),
        images(8),
    )
    assert any("embedding" in note for note in unread.info["compensation"]["notes"])


def test_what_nothing_can_take_over_is_said() -> None:
    model = make(VIT)
    first = compensate_plan(model, PruningPlan.dense(model).keep_layers([1, 2]), images(8))
    assert "attention of layer 0, MLP of layer 0" in first.info["compensation"]["notes"][0]
    swin = make(SWIN)
    stage = compensate_plan(swin, PruningPlan.dense(swin).keep_layers([0, 1, 3, 4]), images(8))
    assert "attention of layer 2, MLP of layer 2" in stage.info["compensation"]["notes"][0]
    middle = compensate_plan(model, PruningPlan.dense(model).keep_layers([0, 2]), images(8))
    assert not any("takes over" in note for note in middle.info["compensation"]["notes"])


def test_queries_that_are_turned_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.4, ["qk"])
    monkeypatch.setitem(vars(plan.source.family), "plain_qk", False)
    made = compensate_plan(model, plan, images(8))
    assert "cannot be rotated" in made.info["compensation"]["notes"][0]
    assert not any("q_proj" in name or "k_proj" in name for name in made.weights)


@pytest.mark.parametrize("unit", ["mlp", "heads"])
@pytest.mark.parametrize("case", [VIT, SWIN])
def test_reselection_keeps_the_numbers_and_chooses_better(case: str, unit: str) -> None:
    model = make(case, seed=1).double()
    plan = PruningPlan.random(model, 0.5, [unit], seed=1)
    made = compensate_plan(model, plan, pixels(), Compensation(reselect=True))
    assert made.architecture == plan.architecture and made.layers != plan.layers
    # what the first layer loses does not depend on the others
    assert fits(made)[0]["after"] < fits(compensate_plan(model, plan, pixels()))[0]["after"]


@pytest.mark.parametrize("case", [VIT, SWIGLU])
def test_special_tokens_count_as_much_as_asked(case: str) -> None:
    """More of the share, less of the error; where it is their number, ``None`` gives the same."""
    model = make(case).double()
    plan = PruningPlan.random(model, 0.6, ["mlp", "v"])
    encoder = plan.source.family.root

    def tokens(one: Any) -> torch.Tensor:
        with torch.no_grad():
            return getattr(one, encoder)(pixel_values=pixels()).last_hidden_state

    dense, found = tokens(model), {}
    for share in (0.03, 0.97):
        small = prune(model, plan, calibration=pixels(), compensate=Compensation(token_share=share))
        lost = (tokens(small) - dense).square().mean((0, 2))
        found[share] = float(lost[0]), float(lost[1:].mean())
    assert found[0.97][0] < found[0.03][0] and found[0.97][1] > found[0.03][1]
    number = dense.shape[1]
    alike = (compensate_plan(model, plan, pixels(), Compensation(token_share=s)).weights for s in (None, 1 / number))
    for (name, one), other in zip(next(alike).items(), next(alike).values(), strict=True):
        assert relative_error(one, other) < 1e-9, name


class LiveDoubles(TorchDispatchMode):
    """Elements of all tensors in double precision that exist at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and id(tensor) not in self.sizes:
                self.sizes[id(tensor)] = tensor.numel()
                weakref.finalize(tensor, self.sizes.pop, id(tensor))
                self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def test_one_layers_statistics_are_in_memory_at_a_time() -> None:
    peaks = []
    for layers, count in ((2, 16), (6, 16), (2, 32)):
        model = make(VIT, num_hidden_layers=layers)
        with LiveDoubles() as doubles:
            compensate_plan(model, PruningPlan.random(model, 0.4), images(count), Compensation(batch_size=8))
        peaks.append(doubles.peak)
    assert peaks[0] == peaks[1] == peaks[2] > 48 * 48


# ---------------------------------------------------------------------- the model and the process around it
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_mode_are_kept(dtype: torch.dtype) -> None:
    model = make(VIT, hidden_dropout_prob=0.5).train()
    plan = PruningPlan.random(model, 0.4)
    expected = prune(model, plan, calibration=images(8))
    small = prune(copy.deepcopy(model).to(dtype), plan, calibration=images(8))
    assert {p.dtype for p in small.parameters()} == {dtype} and small.training and model.training
    assert all(p.requires_grad for p in small.parameters())
    tolerance = {torch.float32: 1e-6, torch.float16: 0.05, torch.bfloat16: 0.2}[dtype]
    assert relative_error(run(small.float().eval())["logits"], run(expected.eval())["logits"]) < tolerance


def test_two_processes_agree(tmp_path: Path) -> None:
    """Bit for bit with each other, and to rounding with one."""
    alone = agreed(tmp_path)
    for name, tensors in alone.items():
        for key, tensor in tensors.items():
            found = weights_of(tmp_path, name, 0)[key]
            assert relative_error(found.double(), tensor.double()) < 1e-8, (name, key)
        if name != EXPORT:  # which waits for nobody, and was called on one process only
            assert_same(weights_of(tmp_path, name, 0), weights_of(tmp_path, name, 1))


def balanced(small: PreTrainedModel, path: str) -> bool:
    """Whether value channels and what reads them have weights of one length."""
    values, output = (small.get_submodule(f"{path}.{name}").weight for name in ("v_proj", "o_proj"))
    return torch.allclose(values.norm(dim=1), output.norm(dim=0), rtol=1e-3)


def test_low_rank_values_and_their_readers_are_equally_long() -> None:
    model, calibration = make("Dinov2Model"), images(64, seed=1)
    small = prune(model, PruningPlan.random(model, 0.5, ("v",)), calibration=calibration)
    scores = OneShotScores.measure(model, calibration)
    again = prune(model, scores.compensate(model, scores.plan(0.6)))
    assert all(balanced(small, f"encoder.layer.{layer}.attention") for layer in range(3))
    assert balanced(again, "encoder.layer.2.attention")
    assert not balanced(model, "encoder.layer.2.attention")


@pytest.mark.parametrize("case", [VIT, SWIN])
def test_what_is_too_large_to_be_held_is_computed_again(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts, hidden neurons, and products of queries and keys: the same weights without any of them."""
    model = make(case).double()
    plan = PruningPlan.random(model, 0.4, units=["heads", "qk", "v", "mlp"], seed=3)
    settings = Compensation(batch_size=4, reselect=True)
    held = compensate_plan(model, plan, pixels(), settings).weights
    for module in ("streams", "queries_keys"):
        monkeypatch.setattr(f"hf_vitprune.compensate.{module}.HELD", 0)
    again = compensate_plan(model, plan, pixels(), settings).weights
    assert again.keys() == held.keys() and len(held) > 10
    for name, tensor in held.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-8)

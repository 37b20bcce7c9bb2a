"""NViT in training: groups go on time, removed weights stay zero, the run's trajectory is kept, teachers, refusals."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
)

from hf_vitprune import (
    Architecture,
    DistillationConfig,
    NViTConfig,
    PruningCallback,
    count,
    get_pruning_model,
    mask,
    prune,
)
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError, MissingLabelsError, UnreachableTargetError
from hf_vitprune.methods import NViT
from hf_vitprune.methods.nvit import model_at
from hf_vitprune.methods.nvit.snapshots import snapshot_path
from hf_vitprune.modeling.outer import norm_over
from hf_vitprune.surgery.cuts import find_cuts
from pruning_runs import SMALL_GROUPS, VIT, Images, NoLabels, nvit, scatter_scores, state_of, trainer
from tiny import CLASSIFIERS, LABELS, SIZE, images, make, relative_error, run, total_loss

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}


class EveryStep(TrainerCallback):
    """Calls a function after every optimizer step."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.call(model, state.global_step)


def removed_entries(model: Any) -> torch.Tensor:
    """Every entry of the wrapped model's weights that the current plan removes, in one vector."""
    plan = model.method.choose()
    gone = []
    ones = copy.deepcopy(model.model)
    for parameter in ones.parameters():
        parameter.data.fill_(1.0)
    kept = dict(mask(ones, plan).named_parameters())
    for name, parameter in model.model.named_parameters():
        gone.append(parameter.detach()[kept[name] == 0])
    return torch.cat(gone)


# ---------------------------------------------------------------------- in training
@pytest.mark.parametrize("case", [VIT, "Dinov2ForImageClassification-swiglu", "SwinForImageClassification"])
def test_removed_weights_stay_zero_after_every_step(case: str, tmp_path: Path) -> None:
    """With momentum and weight decay; and what trains computes what would be exported, at every moment."""
    model = nvit(case, target=0.3, pruning_share=0.5)
    seen: dict[int, int] = {}

    def check(inner: Any, step: int) -> None:
        assert inner is model
        gone = removed_entries(model)
        seen[step] = len(gone)
        assert (gone == 0).all()
        plan = model.method.choose()
        masked = mask(model.model, plan)
        assert relative_error(run(model.eval())["logits"], run(masked)["logits"]) < 1e-5
        model.train()

    trainer(model, tmp_path, callbacks=[EveryStep(check)], max_steps=4, **ADAMW).train()
    assert 0 < seen[1] < seen[2] == seen[3] == seen[4]
    assert model.method.decided and model.method.reached
    assert relative_error(run(model.eval())["logits"], run(model.export())["logits"]) < 1e-5
    again = state_of(model)
    trainer(model, tmp_path, max_steps=1, **ADAMW).train()  # masks hold in a second training as well
    assert (removed_entries(model) == 0).all() and len(removed_entries(model)) == seen[4]
    assert any(not torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", [None, Trainer])
def test_the_published_schedule_removes_exactly_its_count(kind: Any, tmp_path: Path) -> None:
    extra = {"kind": kind, "callbacks": [PruningCallback()]} if kind else {}
    model = nvit(target=0.9, eta=0, interval=2, groups_per_step=2)
    fewest = 4
    trainer(model, tmp_path, max_steps=24, learning_rate=1e-3, **extra).train()
    moments = model.method.moments()[1:]
    steps = [moment.step for moment in moments]
    groups = {step: steps.count(step) for step in dict.fromkeys(steps)}
    assert list(groups)[:3] == [2, 4, 6] and len(moments) > fewest
    assert list(groups.values())[:-1] == [1, 1, *[2] * (len(groups) - 3)]
    assert moments[-1].ratio <= 0.9 < moments[-2].ratio
    assert steps[-1] < 24  # and nothing went after the target was reached


def test_one_run_or_two_phases(tmp_path: Path) -> None:
    """One: half of the run prunes, the rest tunes with masks. Two: the exported model goes on by itself."""
    whole = nvit(target=0.5)
    trainer(whole, tmp_path, max_steps=8).train()
    assert {moment.step for moment in whole.method.moments()} == {0, 1, 2, 3, 4}
    first = nvit(target=0.5, pruning_share=1.0)
    trainer(first, tmp_path, max_steps=4).train()
    small = first.export()
    assert count(small).macs <= 0.5 * count(first.model).macs
    before = state_of(small)
    trainer(small, tmp_path, max_steps=2, teacher=make(VIT), distillation=DistillationConfig("soft")).train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert Architecture.of(small) == first.plan().architecture


def test_what_is_missing_at_the_end_goes_at_once_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_vitprune.methods.nvit.method.logger.warning", said.append)
    model = nvit(target=0.5, eta=0, interval=1, groups_per_step=4)
    model.method.check_training = lambda *_: None  # the bound is a lower one: some runs only turn out too short
    trainer(model, tmp_path, max_steps=3).train()
    assert model.method.reached and len(said) == 1 and "groups, beside 8 so far, go at once" in said[0]
    said.clear()
    trainer(nvit(target=0.5), tmp_path, max_steps=3).train()
    assert not said


def test_logs(tmp_path: Path) -> None:
    model = nvit(target=0.5)
    run_ = trainer(model, tmp_path, max_steps=4, logging_strategy="steps")
    run_.train()
    rows = run_.state.log_history[:4]
    ratios = [row["macs_ratio"] for row in rows]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] == pytest.approx(model.method.ratio)
    assert [row["groups_removed"] for row in rows][-1] == model.method.groups > 0
    assert {"params_ratio", "scores_not_finite"} <= set(rows[0])
    # what every set has lost, row by row, is what the plan is without
    plan = model.plan()
    lost = {key: sum(row.get(key, 0) for row in rows) for row in rows for key in row if key.startswith("taken_")}
    expected = {f"taken_layer{i}_mlp": 48 - len(entry.mlp) for i, entry in enumerate(plan.layers)}
    expected |= {f"taken_layer{i}_heads": 4 - len(entry.heads) for i, entry in enumerate(plan.layers)}
    expected["taken_embedding"] = 32 - plan.architecture.hidden_size
    assert {key: lost.get(key, 0) for key in expected} == expected and sum(expected.values()) > 0


def test_other_criteria(tmp_path: Path) -> None:
    """Each gives another plan; only ``random`` depends on the seed, and on nothing else."""
    plans = []
    for criterion in ("squared_taylor", "taylor", "magnitude", "random"):
        model = nvit(target=0.5, criterion=criterion, eta=0)
        trainer(model, tmp_path, max_steps=2).train()
        assert model.method.reached
        plans.append(model.plan())
    for criterion in ("magnitude", "random"):  # these need no training
        for seed in (0, 1):
            model = nvit(target=0.5, criterion=criterion, seed=seed, eta=0)
            model.decide()
            plans.append(model.plan())
    magnitude, magnitude_again, drawn, drawn_otherwise = plans[4:]
    assert magnitude == magnitude_again and plans[3] == drawn
    assert all(a != b for a, b in itertools.combinations([*plans[:4], drawn_otherwise], 2))


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_sets_shrink_alike_without_information(criterion: str) -> None:
    """Neither baseline prefers a kind of unit for its size: no set is at its floor while others are whole."""
    model = make(VIT)
    wrapped = get_pruning_model(model, NViTConfig(0.4, group_sizes=SMALL_GROUPS, criterion=criterion, eta=0))
    shares = wrapped.plan().summary()
    assert all(0.2 < shares[unit] < 0.95 for unit in ("heads", "qk", "v", "mlp", "embedding")), shares


# ---------------------------------------------------------------------- LayerNorm over what is there
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_over_kept_channels(affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 5, 24, dtype=torch.float64, generator=generator) * 3 + 1
    kept = torch.rand(24, generator=generator) < 0.6
    norm = torch.nn.LayerNorm(24, elementwise_affine=affine, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    out = norm_over(norm, inputs, kept.float(), int(kept.sum()))
    narrow = [None if t is None else t[kept] for t in (norm.weight, norm.bias)]
    expected = torch.nn.functional.layer_norm(inputs[..., kept], (int(kept.sum()),), *narrow, 1e-5)
    torch.testing.assert_close(out[..., kept], expected, rtol=1e-12, atol=1e-12)
    assert (out[..., ~kept] == 0).all()


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_gradients_are_those_of_the_small_model(case: str) -> None:
    """Masked units get none, the others the same as after the cut: tuning with masks is tuning the small model."""
    model = scatter_scores(nvit(case)).double()
    small, plan = model.export(), model.plan()
    total_loss(model, images().double()).backward()
    total_loss(small, images().double()).backward()
    parameters, compared = dict(small.named_parameters()), 0
    for name, cut in find_cuts(model.model, small, plan).items():
        if name in parameters:
            grad, expected = model.model.get_parameter(cut.source).grad, parameters[name].grad
            if grad is None:  # mask tokens, CLIP's last norm, SigLIP's pooling head
                assert expected is None
                continue
            compared += 1
            torch.testing.assert_close(cut.take(grad), expected, rtol=1e-8, atol=1e-11, msg=name)
    assert compared > 40


# ---------------------------------------------------------------------- snapshots
@pytest.mark.parametrize("case", [VIT, "SwinForImageClassification", "CLIPForImageClassification"])
def test_any_budget_of_a_run_can_be_had_afterwards(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    model = nvit(case, target=0.4, pruning_share=1.0, snapshots=(0.8, 0.6), snapshot_folder=str(folder))
    trainer(model, tmp_path, max_steps=4, learning_rate=1e-2).train()
    moments = model.method.moments()
    for budget in (0.8, 0.6):
        moment = next(m for m in moments if m.ratio <= budget)
        small = model_at(folder, budget)
        assert Architecture.of(small) == model.method.plan_at(budget).architecture
        assert 0 < moment.groups < model.method.groups and count(small).macs <= budget * count(model.model).macs
        stored = AutoModelForImageClassification.from_pretrained(snapshot_path(folder, budget))
        assert relative_error(run(small)["logits"], run(stored)["logits"]) == 0
    # in between: the larger one, cut further; computed again by masking it with what went later
    between = model_at(folder, 0.7)
    assert Architecture.of(between) == model.method.plan_at(0.7).architecture
    larger = model_at(folder, 0.8)
    assert count(larger).macs > count(between).macs
    wide = dict(larger.named_parameters())
    for name, tensor in between.named_parameters():
        assert torch.isin(tensor, wide[name]).all(), name
    with pytest.raises(UnreachableTargetError, match=r"no snapshot at or above 0\.900 of the cost, only 0\.6, 0\.8"):
        model_at(folder, 0.9)
    with pytest.raises(UnreachableTargetError, match="the run ended at"):
        model_at(folder, 0.3)
    with pytest.raises(InvalidPlanError, match="no snapshot_folder"):
        model_at(tmp_path / "elsewhere", 0.7)


@pytest.mark.parametrize(
    "case", ["DINOv3ViTBackbone", "Dinov2Backbone", "BeitForSemanticSegmentation", "BeitForMaskedImageModeling"]
)
def test_snapshots_of_any_class_come_back_as_it(case: str, tmp_path: Path) -> None:
    """Backbones too, whose Auto class takes no folders, and heads that no common Auto class has."""
    settings = {"criterion": "random", "eta": 0, "snapshots": (0.99,), "snapshot_folder": str(tmp_path)}
    model = get_pruning_model(make(case), NViTConfig(target=0.96, group_sizes=SMALL_GROUPS, **settings))
    model.decide()
    for budget in (0.99, 0.97):
        small = model_at(tmp_path, budget)
        assert type(small).__name__.removeprefix("Pruned") == case
        assert Architecture.of(small) == model.method.plan_at(budget).architecture
        expected = run(prune(make(case), model.method.plan_at(budget)))
        assert all(relative_error(run(small)[name], value) < 1e-6 for name, value in expected.items())


def test_a_snapshot_has_the_weights_of_its_moment(tmp_path: Path) -> None:
    """Not those of the end: later steps move them, and zero what goes next."""
    model = nvit(target=0.4, pruning_share=1.0, snapshots=[0.8], snapshot_folder=str(tmp_path / "s"))
    exported: dict[float, Any] = {}

    def keep(inner: Any, step: int) -> None:
        ratio = inner.method.ratio
        if ratio <= 0.8 and not exported:
            exported[ratio] = step

    trainer(model, tmp_path, max_steps=6, callbacks=[EveryStep(keep)], learning_rate=1e-2).train()
    stored = model_at(tmp_path / "s", 0.8)
    late = get_pruning_model(make(VIT), NViTConfig(0.5, criterion="random", group_sizes=SMALL_GROUPS))
    assert type(stored) is type(late.export())
    bias, final = stored.classifier.bias, model.model.classifier.bias
    assert not torch.equal(bias, final) and torch.allclose(bias, final, atol=1.0)


# ---------------------------------------------------------------------- teachers
def test_kl_is_added_and_waits_for_the_first_prune_step(tmp_path: Path) -> None:
    """kappa is 0 until then: with and without, the first window is the same, and what follows is not."""
    states: dict[bool, dict[int, Any]] = {}
    for taught in (False, True):
        model = nvit(target=0.5, interval=2, pruning_share=1.0).double()
        states[taught] = {}
        note = EveryStep(lambda inner, step, taught=taught: states[taught].update({step: state_of(inner.model)}))
        kl = NViT.distillation if taught else None
        trainer(
            model, tmp_path, max_steps=4, distillation=kl, callbacks=[note], learning_rate=1e-3,
            train_dataset=Images(16, torch.float64),
        ).train()  # fmt: skip
    same = {
        step: all(torch.equal(t, states[True][step][name]) for name, t in state.items())
        for step, state in states[False].items()
    }
    assert same == {1: True, 2: True, 3: False, 4: False}


def test_a_second_teacher_of_another_architecture(tmp_path: Path) -> None:
    """The full model by KL, and a convolutional net by hard labels, in one run."""
    sizes = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_labels": LABELS,
        "layer_type": "basic",
    }
    teacher = ResNetForImageClassification(ResNetConfig(**sizes))
    hard = DistillationConfig("hard", weight=0.5)
    ends = []
    for lessons in (
        {"distillation": [hard, NViT.distillation], "teacher": [teacher, None]},
        {"distillation": [NViT.distillation]},
        {"distillation": [hard], "teacher": [teacher]},
    ):
        model = nvit(target=0.5)
        run_ = trainer(model, tmp_path, max_steps=4, **lessons)
        assert len(run_.lessons) == len(lessons["distillation"])
        run_.train()
        ends.append(state_of(model.model)["classifier.weight"])
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    for lessons, message in (
        ({"distillation": [hard, NViT.distillation], "teacher": teacher}, "2 kinds of distillation and 1 teachers"),
        ({"distillation": hard, "teacher": [teacher, None]}, "1 kinds of distillation and 2 teachers"),
    ):
        with pytest.raises(InvalidConfigError, match=message):
            trainer(nvit(), tmp_path, **lessons)
    assert teacher(torch.randn(1, 3, SIZE, SIZE)).logits.shape == (1, LABELS)


def test_missing_labels(tmp_path: Path) -> None:
    with pytest.raises(MissingLabelsError, match="labels"):
        trainer(nvit(), tmp_path, train_dataset=NoLabels(), distillation=NViT.distillation).train()

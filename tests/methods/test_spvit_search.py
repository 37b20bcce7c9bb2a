"""SPViT: the search in training, its baselines, its refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer

from benchmarks.compare.random_architecture import random_plan
from hf_vitprune import (
    Architecture,
    DistillationConfig,
    PruningCallback,
    PruningTrainer,
    SPViTConfig,
    count,
    get_pruning_model,
    prune,
)
from hf_vitprune.cost.closed_form import removed_macs
from hf_vitprune.errors import (
    AdapterError,
    InvalidConfigError,
    InvalidPlanError,
    TokenGridError,
    UnreachableTargetError,
    UnsupportedModelError,
)
from hf_vitprune.publish.run_report import plot_gates
from processes import SUPPORT, run_on_two
from pruning_runs import VIT, Patterns, scatter_scores, spvit, state_of, trainer
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run

SWIN = "SwinForImageClassification"
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "per_device_train_batch_size": 10, "train_dataset": Patterns()}


# ---------------------------------------------------------------------- the search in training
def test_a_search_meets_its_target_stops_and_is_logged(tmp_path: Path) -> None:
    settings = {"target": 0.7, "gate_learning_rate": 0.1, "round_to": 1, "patience": 10}
    model = spvit(final_temperature=0.5, **settings)
    run_ = trainer(
        model, tmp_path, max_steps=200, logging_strategy="steps", lr_scheduler_type="cosine", warmup_steps=5,
        weight_decay=0.1, **{**ADAMW, "logging_steps": 5},
    )  # fmt: skip
    before = state_of(model)
    run_.train()
    assert run_.state.global_step < 200  # it stopped by itself
    progress = run_.state.global_step / 200
    assert all(gates.temperature == pytest.approx(0.5**progress, rel=1e-6) for gates in model.method.gates.values())
    rows = [row for row in run_.state.log_history if "macs_ratio" in row]
    assert len(rows) >= 3 and {"gate_layer0_conv1x1", "gate_layer2_attention", "gate_layer1_mlp"} <= rows[0].keys()
    assert rows[0]["gate_layer0_mlp"] == pytest.approx(0.7, abs=0.15) and rows[0]["macs_ratio"] > 0.9
    ratio = count(model.plan().architecture).macs / count(model.model).macs
    assert 0.7 * 0.97 <= ratio <= 0.7
    gone = next(row for row in run_.state.log_history if "mlp_removed" in row)
    assert gone["attention_removed"] == removed_macs(model.plan().architecture)["attention"]
    assert plot_gates(run_.state.log_history, tmp_path / "gates.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no gates"):
        plot_gates([{"loss": 1.0}], tmp_path / "none.png")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("table") for name in moved) and any("running_mean" in name for name in moved)

    groups = run_.optimizer.param_groups
    gates = {id(p) for p in model.method.gate_parameters()}
    own = [group for group in groups if {id(p) for p in group["params"]} & gates]
    assert (
        len(own) == 1 and own[0]["lr"] == 0.1 and own[0]["weight_decay"] == 0 and len(own[0]["params"]) == len(gates)
    )
    assert all(group["lr"] < 1e-3 for group in groups if group is not own[0])
    tables = {id(p) for name, p in model.named_parameters() if name.endswith("table")}
    assert all(not group["weight_decay"] for group in groups if {id(p) for p in group["params"]} & tables)
    # tuned on, masked, then as the small model: the architecture stays
    plan = model.plan()
    trainer(model, tmp_path, max_steps=2, **ADAMW).train()
    assert model.plan() == plan
    assert relative_error(run(model.eval())["logits"], run(model.export().eval())["logits"]) < 1e-5
    student = model.export(weights=make(VIT))
    lessons = {"teacher": make(VIT), "distillation": DistillationConfig("hard")}
    trainer(student, tmp_path, max_steps=2, **ADAMW, **lessons).train()
    assert Architecture.of(student) == plan.architecture


def test_a_finished_search_that_is_resumed_takes_no_further_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.TOLERANCE", 1.0)
    settings = {**ADAMW, "save_strategy": "steps", "max_steps": 12}
    finishing = {"gate_learning_rate": 0.5, "patience": 4}
    whole = trainer(spvit(**finishing), tmp_path, **settings)
    whole.train()
    last = whole.state.global_step
    assert last < 12
    again = trainer(spvit(**finishing), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
    assert again.state.global_step == last
    assert_same(again.model.state_dict(), state_of(whole.model))
    assert again.model.plan() == whole.model.plan()


def test_a_schedule_that_changes_every_rate_is_refused(tmp_path: Path) -> None:
    settings = {**ADAMW, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(InvalidConfigError, match="gates keep their learning rate"):
        trainer(spvit(gate_learning_rate=1.0), tmp_path, **settings, eval_dataset=Patterns()).train()


def test_trainings_that_cannot_search_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_vitprune.methods.spvit.method.TOLERANCE", 1.0)
    with pytest.raises(InvalidConfigError, match=r"start at 1\.5 .*in 10 steps none turns over"):
        trainer(spvit(), tmp_path, max_steps=10, **ADAMW).train()
    with pytest.raises(InvalidConfigError, match="use PruningTrainer"):
        kind = {"kind": Trainer, "callbacks": [PruningCallback()]}
        trainer(spvit(gate_learning_rate=1.0), tmp_path, max_steps=10, **ADAMW, **kind).train()
    slow = spvit(gate_learning_rate=1.0, patience=0)
    trainer(slow, tmp_path, max_steps=4, **ADAMW).train()
    assert slow.method._step == 4  # a patience of 0 never stops


def test_random_architectures_of_one_cost() -> None:
    for case in (VIT, SWIN):
        model = make(case)
        dense = count(model).macs
        plans = [random_plan(model, 0.6, seed=seed, round_to=2) for seed in range(4)]
        assert all(0.57 < count(plan.architecture).macs / dense <= 0.6 for plan in plans)
        assert len({str(plan.architecture) for plan in plans}) == 4
        assert plans[0] == random_plan(model, 0.6, seed=0, round_to=2)
        kinds = {layer.mixer for plan in plans for layer in plan.layers}
        assert kinds >= {"conv3x3", "conv1x1", "none"}
        assert run(prune(model, plans[0]))["logits"].isfinite().all()
    with pytest.raises(UnreachableTargetError, match=r"0\.010 of the macs"):
        random_plan(make(VIT), 0.01, seed=0)


# ---------------------------------------------------------------------- refusals
def config(**settings: Any) -> Callable[[], Any]:
    return lambda: SPViTConfig(**settings)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (config(), InvalidConfigError, "either target .* or target_gmacs .* not none"),
        (config(target=0.5, target_gmacs=1.0), InvalidConfigError, "not both"),
        (config(target=0.5, target_metric="latency", latency_table="x"), InvalidConfigError, "latency"),
        (config(target_gmacs=1.0, target_metric="params"), InvalidConfigError, "leave target_metric at macs"),
        (config(target_gmacs=0), InvalidConfigError, "target_gmacs must be positive"),
        (config(target=0.5, cost_weight=0), InvalidConfigError, "cost_weight must be positive"),
        (config(target=0.5, single_path=1), InvalidConfigError, "single_path is True or False"),
        (config(target=0.5, enforce_target=0), InvalidConfigError, "enforce_target is True or False"),
        (config(target=0.5, gate_gradients="all"), InvalidConfigError, "gate_gradients is one of shared, topmost"),
        (config(target=0.5, round_to=0), InvalidConfigError, "round_to is a whole number"),
        (config(target=0.5, temperature=float("nan")), InvalidConfigError, "temperature is a number"),
        (config(target=0.5, final_temperature=0), InvalidConfigError, "final_temperature must be positive"),
        (config(target=0.5, cost_warmup=2), InvalidConfigError, "cost_warmup is a number, between 0 and 1"),
        (config(target=0.5, patience=-1), InvalidConfigError, "patience is a whole number of at least 0"),
        (lambda: SPViTConfig.published("vit-huge"), InvalidConfigError, "known: deit-tiny"),
        (lambda: spvit(target=0.05), UnreachableTargetError, "with every mixer skipped and every MLP gone"),
        (lambda: spvit(target=None, target_gmacs=1.0), InvalidConfigError, r"is not under the 0\.000"),
        (lambda: spvit().plan(), InvalidPlanError, "has not searched yet"),
    ],
)
def test_refusals(wrong: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_published_settings() -> None:
    tiny = SPViTConfig.published("deit-tiny", patience=5)
    assert (tiny.cost_weight, tiny.target_gmacs, tiny.gate_learning_rate, tiny.patience) == (20.0, 1.0, 1e-3, 5)
    assert SPViTConfig.published("swin-small").gate_learning_rate == 5e-4
    # the released code: a soft target, every gate of a mixer that is on learns, no end before the last step
    base = SPViTConfig.published("deit-base")
    assert (base.enforce_target, base.gate_gradients, base.patience) == (False, "shared", 0)


def test_adapters_are_merged_first() -> None:
    adapted = get_peft_model(make(VIT), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(AdapterError, match="merge_and_unload"):
        get_pruning_model(adapted, SPViTConfig(target=0.7))
    merged = get_pruning_model(adapted.merge_and_unload(), SPViTConfig(target=0.7))
    small = scatter_scores(merged).eval().export()
    again = get_peft_model(small, LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    assert run(again)["logits"].isfinite().all()


def test_diverged_gates_quantised_weights_and_wrong_tokens() -> None:
    model = spvit()
    model.method.gates["layer0_mixer"].score.data[0] = float("nan")
    with pytest.raises(InvalidPlanError, match="not finite"):
        model.decide()
    quantised = make(VIT)
    quantised.vit.layers[0].attention.v_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match=r"v_proj is quantized .* in int8.*in full precision"):
        get_pruning_model(quantised, SPViTConfig(target=0.7))
    model = spvit().train()
    with pytest.raises(TokenGridError, match="not told the grid"):
        for _ in range(20):  # until a convolution is drawn
            model.model.vit.layers[0](torch.randn(2, 5, 32))
    model.model.vit.embeddings.register_forward_hook(lambda module, args, output: output[:, :-1])
    with pytest.raises(TokenGridError, match="4 tokens, which are not 1 special ones and a grid of 2 x 2"):
        for _ in range(20):
            model(pixel_values=images())


def test_every_family_with_a_grid_can_be_searched() -> None:
    assert all(get_pruning_model(make(case), SPViTConfig(target=0.95)).method.searches for case in CLASSIFIERS)


def test_distillation_from_the_ungated_self(tmp_path: Path) -> None:
    """The default teacher is a copy without gates: it computes what the stock model did."""
    model = spvit(gate_learning_rate=1.0)
    expected = run(make(VIT))
    trained = trainer(model, tmp_path, distillation=DistillationConfig("soft"), max_steps=2, **ADAMW)
    teacher = trained.lessons[0][1]
    assert isinstance(trained, PruningTrainer)
    assert relative_error(teacher(pixel_values=images()), expected["logits"]) < 1e-6
    trained.train()


@pytest.mark.slow
def test_two_processes_end_alike(tmp_path: Path) -> None:
    """Though each draws its own gates: weights, gates, statistics and the exported model."""
    run_on_two(str(SUPPORT / "two_searches.py"), str(tmp_path))
    for name in ("shared", "own", "checkpointed"):
        for part in ("", ".small"):
            first, second = (load_file(tmp_path / f"{name}{part}.{rank}.safetensors") for rank in (0, 1))
            assert_same(first, second)

"""Training with gates: exact gradients whatever the batches, the optimizer, logs, teachers, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from hf_vitprune import (
    DistillationConfig,
    PruningCallback,
    PruningTrainer,
    VTPConfig,
    count,
    get_pruning_model,
)
from hf_vitprune.errors import InvalidConfigError
from pruning_runs import VIT, Images, assert_close, gated, lora_model, scatter_scores, state_of, trainer
from tiny import LABELS, assert_same, make, relative_error, run

DOUBLE = torch.float64
TWO_HEADS = "DeiTForImageClassificationWithTeacher"
SIGLIP = "SiglipForImageClassification"
HEADS = [VIT, "CLIPForImageClassification", SIGLIP, "SwinForImageClassification", TWO_HEADS]
SOFT = DistillationConfig("soft", weight=0.3, temperature=2.0)
HARD = DistillationConfig("hard", weight=0.5)
#: 14 images in updates of 8 and 6, whole or in micro-batches of unequal sizes and numbers of labels
SPLITS = [{"per_device_train_batch_size": 8 // n, "gradient_accumulation_steps": n} for n in (1, 4, 2)]


def several_labels(i: int) -> torch.Tensor:
    return (torch.arange(LABELS) % (2 + i % 3) == 0).double()


def after(folder: Path, make_model: Any, **changes: Any) -> dict[str, torch.Tensor]:
    model = make_model()
    trainer(model, folder, **{"train_dataset": Images(14, DOUBLE), **changes}).train()
    return state_of(model)


# ---------------------------------------------------------------------- exact under gradient accumulation
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *[(case, {}) for case in HEADS if case != SIGLIP],
        pytest.param(SIGLIP, {}, marks=pytest.mark.slow),  # as CLIP's
        (VIT, {"max_grad_norm": 0.1}),
        (VIT, {"kind": Trainer, "callbacks": [PruningCallback]}),
        (TWO_HEADS, {"kind": Trainer, "callbacks": [PruningCallback]}),
        ("CLIPForImageClassification", {"kind": Trainer, "callbacks": [PruningCallback]}),
        (VIT, {"distillation": SOFT}),
        pytest.param(VIT, {"distillation": HARD}, marks=pytest.mark.slow),  # as with two heads
        (TWO_HEADS, {"distillation": HARD}),
        ("CLIPForImageClassification", {"distillation": SOFT}),
    ],
)
def test_accumulated_batches_give_the_big_batchs_gradient(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Two steps of plain SGD in double precision: weights and gates, the penalty's gradient included."""

    def model() -> Any:
        return scatter_scores(gated(case, sparsity_weight=0.05)).double()

    splits = SPLITS if (case, changes) == (VIT, {}) else SPLITS[:2]
    ends = [after(tmp_path, model, **changes, **split) for split in splits]
    assert any((ends[0][name] - tensor).abs().max() > 1e-3 for name, tensor in state_of(model()).items())
    for end in ends[1:]:
        assert_close(end, ends[0])


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"problem_type": "multi_label_classification"}, several_labels),
        ({"num_labels": 1}, lambda i: torch.tensor(float(i), dtype=DOUBLE)),
        ({"problem_type": "regression"}, lambda i: several_labels(i) * i),
    ],
)
def test_other_problem_types(config: dict[str, Any], labels: Any, tmp_path: Path) -> None:
    data = {"train_dataset": Images(14, DOUBLE, labels=labels), "max_steps": 1}

    def model() -> Any:
        return gated(VIT, config, sparsity_weight=0).double()

    whole, split = (after(tmp_path, model, **data, **split) for split in SPLITS[:2])
    assert_close(split, whole)
    # and the whole batch's gradient is that of the stock model's own loss
    stock = after(tmp_path, lambda: make(VIT, **config).double(), kind=Trainer, **data, **SPLITS[0])
    assert_close({name: whole[f"model.{name}"] for name in stock}, stock)


@pytest.mark.parametrize(
    ("case", "pruned"),
    [
        ("CLIPForImageClassification", True),
        (TWO_HEADS, False),
        pytest.param("CLIPForImageClassification", False, marks=pytest.mark.slow),
        pytest.param(TWO_HEADS, True, marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_is_exact_too(case: str, pruned: bool, tmp_path: Path) -> None:
    """Small or stock: CLIP's head ignores the number of items in a batch, the other takes no labels."""

    def model() -> Any:
        return (scatter_scores(gated(case)).export() if pruned else make(case)).double()

    for changes in ({}, {"teacher": make(case).double(), "distillation": SOFT}):
        ends = [after(tmp_path, model, **changes, **split) for split in SPLITS[:2]]
        moved = {name for name, tensor in state_of(model()).items() if not torch.equal(ends[0][name], tensor)}
        assert any("classifier" in name for name in moved) and len(moved) > 20
        for end in ends[1:]:
            assert_close(end, ends[0])


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_the_penalty_counts_once_and_is_not_clipped(max_grad_norm: float, tmp_path: Path) -> None:
    runs = {}
    for weight in (0.0, 0.05):
        model = scatter_scores(gated(sparsity_weight=weight)).double()
        before = [score.detach().clone() for score in model.method.gate_parameters()]
        trainer(
            model, tmp_path, train_dataset=Images(8, DOUBLE), max_steps=1, max_grad_norm=max_grad_norm,
            gradient_accumulation_steps=2, learning_rate=0.1,
        ).train()  # fmt: skip
        runs[weight] = [score.detach().clone() for score in model.method.gate_parameters()]
    for start, without, with_penalty in zip(before, runs[0.0], runs[0.05], strict=True):
        torch.testing.assert_close(with_penalty - without, -0.1 * 0.05 * start.sign(), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- logs, end of training, evaluation
def test_logs(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.append(dict(logs))

    for kind, callbacks in ((PruningTrainer, [Reporter()]), (Trainer, [PruningCallback()])):
        model = gated(sparsity_weight=0.02, gate_learning_rate=0.5 if kind is PruningTrainer else None)
        run = trainer(model, tmp_path, kind=kind, logging_strategy="steps", callbacks=callbacks)
        run.train()
        first, second, last = run.state.log_history
        total = sum(map(len, model.method.gate_parameters()))
        assert first["penalty"] == pytest.approx(0.02 * total)  # of the scores that the step started from
        assert second["penalty"] != first["penalty"]
        for row in (first, second):
            assert {
                "loss",
                "learning_rate",
                "penalty",
                "gates_mean",
                "gates_min",
                "macs_ratio",
                "params_ratio",
            } <= set(row)
            assert row["gates_min"] < row["gates_mean"] < 1.1
        scores = torch.cat([score.detach().abs() for score in model.method.gate_parameters()])
        assert second["gates_mean"] == pytest.approx(scores.mean().item())
        small, dense = count(model.export()), count(model.model)
        assert second["macs_ratio"] == pytest.approx(small.macs / dense.macs)
        assert second["params_ratio"] == pytest.approx(small.params / dense.params)
        assert "penalty" not in last  # the summary of the whole run
    assert [set(row) >= {"penalty", "macs_ratio"} for row in seen] == [True, True, False]  # reports have them, too


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
def test_the_end_of_training_is_the_decision(kind: type[Trainer], tmp_path: Path) -> None:
    model = scatter_scores(gated())
    run_ = trainer(model, tmp_path, kind=kind, callbacks=[PruningCallback()])
    undecided = run_.evaluate()["eval_loss"]
    assert not model.method.decided
    run_.train()
    assert model.method.decided
    kept = sum(int(g.mask.sum()) for g in model.method.gates.values())
    total = sum(map(len, model.method.gate_parameters()))
    assert kept == pytest.approx(0.6 * total, rel=0.1)
    # evaluating now evaluates what will be exported
    loss = run_.evaluate()["eval_loss"]
    small = trainer(model.export(compensate=False), tmp_path, kind=kind).evaluate()["eval_loss"]
    assert loss == pytest.approx(small, rel=1e-5) and loss != pytest.approx(undecided, rel=1e-3)
    logits = run_.predict(Images(4)).predictions
    assert (
        relative_error(
            torch.tensor(logits), run(model, torch.stack([Images()[i]["pixel_values"] for i in range(4)]))["logits"]
        )
        < 1e-5
    )


def test_training_goes_on_after_the_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks in place: nothing that was cut comes back, no penalty, and the user is told."""
    model = scatter_scores(gated(sparsity_weight=1.0, gate_learning_rate=0.1))
    model.decide()
    masks = {name: tensor for name, tensor in state_of(model).items() if name.endswith("mask")}
    scores = [score.detach().clone() for score in model.method.gate_parameters()]
    run_ = trainer(model, tmp_path, logging_strategy="steps")
    warnings: list[str] = []
    monkeypatch.setattr("hf_vitprune.training.callback.logger.warning", warnings.append)
    run_.train()
    assert len(warnings) == 1 and "decided already" in warnings[0]
    assert [row["penalty"] for row in run_.state.log_history[:2]] == [0.0, 0.0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in masks.items())
    for before, one in zip(scores, model.method.gates.values(), strict=True):
        changed = one.score.detach() != before
        assert changed.any() and not (changed & (one.mask == 0)).any()
    assert relative_error(run(model.eval())["logits"], run(model.export())["logits"]) < 1e-5


# ---------------------------------------------------------------------- modes
@pytest.mark.parametrize(("model", "reentrant"), [("vit", False), ("swin", True), ("lora", False), ("lora", True)])
def test_activation_checkpointing_gives_the_same_gradients(model: str, reentrant: bool, tmp_path: Path) -> None:
    def wrapped() -> Any:
        stock = {"vit": VIT, "swin": "SwinForImageClassification"}
        inner = make(stock[model]) if model in stock else lora_model()
        return scatter_scores(get_pruning_model(inner, VTPConfig(pruning_ratio=0.4, sparsity_weight=0.01))).double()

    changes = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if model == "lora" and reentrant:  # torch gives no gradient to what lies behind inputs that need none
        with pytest.raises(InvalidConfigError, match="use_reentrant"):
            after(tmp_path, wrapped, **changes)
        return
    torch.manual_seed(0)
    expected = after(tmp_path, wrapped)
    torch.manual_seed(0)
    assert_close(after(tmp_path, wrapped, **changes), expected)


@pytest.mark.parametrize(
    "case", [VIT, "SwinForImageClassification", pytest.param("Dinov2ForImageClassification", marks=pytest.mark.slow)]
)
def test_bf16_autocast(case: str, tmp_path: Path) -> None:
    """Close to full precision: a step moves gates and weights in the same direction."""
    moves = {}
    for bf16 in (False, True):
        model = scatter_scores(gated(case, sparsity_weight=0.0))
        before = torch.cat([p.detach().flatten().clone() for p in model.method.gate_parameters()])
        weights = torch.cat([p.detach().flatten().clone() for p in model.model.parameters()])
        trainer(model, tmp_path, bf16=bf16, max_steps=1).train()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        moves[bf16] = [
            torch.cat([p.detach().flatten() for p in model.method.gate_parameters()]) - before,
            torch.cat([p.detach().flatten() for p in model.model.parameters()]) - weights,
        ]
    for exact, rough in zip(moves[False], moves[True], strict=True):
        assert not torch.equal(exact, rough)
        assert torch.cosine_similarity(exact, rough, dim=0) > 0.99


def test_a_pruned_models_gates_work_under_autocast() -> None:
    """Its gates pick channels out of what a LayerNorm gives (in single precision, under autocast)."""
    again = scatter_scores(
        get_pruning_model(scatter_scores(gated()).export(), VTPConfig(pruning_ratio=0.2, round_to=4))
    )
    with torch.autocast("cpu"):
        rough = run(again)["logits"]
    assert relative_error(rough.float(), run(again)["logits"]) < 0.05


# ---------------------------------------------------------------------- teachers
@pytest.mark.parametrize("model", ["vit", "lora"])
def test_the_default_teacher_is_the_model_as_it_was(model: str, tmp_path: Path) -> None:
    inner = make(VIT) if model == "vit" else lora_model()
    dense = run(inner.eval())["logits"]
    wrapped = scatter_scores(get_pruning_model(inner, VTPConfig(pruning_ratio=0.4)))
    names = set(wrapped.state_dict())
    run_ = trainer(wrapped, tmp_path, distillation=SOFT, save_strategy="steps", max_steps=2)
    teacher = run_.lessons[0][1].model
    run_.train()
    assert torch.equal(run(teacher)["logits"], dense)
    assert relative_error(run(wrapped.eval())["logits"], dense) > 1e-3
    theirs = {id(p) for p in teacher.parameters()}
    assert all(p.grad is None for p in teacher.parameters())
    assert not theirs & {id(p) for p in wrapped.parameters()}
    assert not theirs & {id(p) for group in run_.optimizer.param_groups for p in group["params"]}
    assert set(wrapped.state_dict()) == names == set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_distillation_changes_what_is_learned(tmp_path: Path) -> None:
    ends = {}
    for name, config in (("none", None), ("soft", SOFT), ("hard", HARD), ("off", DistillationConfig("none"))):
        ends[name] = after(tmp_path, lambda: scatter_scores(gated()).double(), distillation=config)
    assert_same(ends["off"], ends["none"])
    for one, other in (("none", "soft"), ("none", "hard"), ("soft", "hard")):
        assert any(not torch.equal(tensor, ends[other][name]) for name, tensor in ends[one].items())


@pytest.mark.parametrize(
    ("distillation", "moved"),
    [
        (None, {"cls", "distillation"}),
        (DistillationConfig("hard", weight=1.0), {"distillation"}),
        (DistillationConfig("soft", weight=0.0), {"cls"}),
        (HARD, {"cls", "distillation"}),
    ],
)
def test_two_headed_deit_learns_labels_and_teacher_with_a_head_each(
    distillation: DistillationConfig | None, moved: set[str], tmp_path: Path
) -> None:
    model = gated(TWO_HEADS)
    before = state_of(model)
    teacher = {"teacher": make(VIT, seed=5), "distillation": distillation} if distillation else {}
    trainer(model, tmp_path, **teacher).train()
    now = model.state_dict()
    heads = {name: f"model.{name}_classifier.weight" for name in ("cls", "distillation")}
    assert {name for name, key in heads.items() if not torch.equal(now[key], before[key])} == moved


# ---------------------------------------------------------------------- small and stock models
@pytest.mark.parametrize("pruned", [False, True])
def test_fine_tuning_resumes_exactly(pruned: bool, tmp_path: Path) -> None:
    def model() -> Any:
        return scatter_scores(gated(VIT, {"hidden_dropout_prob": 0.1})).export() if pruned else make(VIT)

    settings = {"teacher": make(VIT, seed=5), "save_strategy": "steps", "max_steps": 4, "optim": "adamw_torch"}
    whole, again = model(), model()
    trainer(whole, tmp_path, **settings).train()
    trainer(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.state_dict(), state_of(whole))
    assert any(not torch.equal(tensor, again.state_dict()[name]) for name, tensor in model().state_dict().items())


# ---------------------------------------------------------------------- methods that score by gradients
class _Watching:
    """Gives a model's method gradients to look at, and keeps what it is shown."""

    def __init__(self, model: Any) -> None:
        self.model, self.gradients, self.steps = model, [], []  # type: ignore[var-annotated]
        model.method.traits = replace(model.method.traits, decides_by="gradients")
        model.method.before_step = self.before_step
        model.method.after_step = lambda model, step, max_steps: self.steps.append((step, max_steps))

    def before_step(self, model: Any, progress: float, gradient_scale: float) -> None:
        assert model is self.model.model
        self.gradients.append({n: p.grad * gradient_scale for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("split", SPLITS)
def test_observed_gradients_are_whole_and_unclipped(split: dict[str, int], tmp_path: Path) -> None:
    runs = []
    for folder, changes in (
        ("plain", {"max_grad_norm": 0.0, **SPLITS[0]}),
        ("clipped", {"max_grad_norm": 0.01, **split}),
    ):
        watching = _Watching(scatter_scores(gated(sparsity_weight=0.0).double()))
        settings = {"train_dataset": Images(14, DOUBLE), "max_steps": 1, **changes}
        trainer(watching.model, tmp_path / folder, **settings).train()
        assert watching.steps == [(1, 1)] and watching.model.training_images.images == 14
        runs.append(watching.gradients[0])
    assert_close(runs[1], runs[0])


def test_a_plain_trainer_that_clips_is_refused(tmp_path: Path) -> None:
    plain = {"kind": Trainer, "callbacks": [PruningCallback()]}
    with pytest.raises(InvalidConfigError, match="max_grad_norm=0"):
        trainer(_Watching(gated()).model, tmp_path, max_grad_norm=1.0, **plain).train()
    trainer(_Watching(gated()).model, tmp_path, max_grad_norm=0.0, **plain).train()

"""What a pruning training is set up with: the optimizer's groups, and what is refused before the first step."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback
from transformers.utils.generic import can_return_loss, find_labels

from hf_vitprune import (
    DistillationConfig,
    PruningCallback,
    PruningPlan,
    PruningTrainer,
    VTPConfig,
    get_pruning_model,
    prune,
)
from hf_vitprune.errors import InvalidConfigError, MissingLabelsError
from hf_vitprune.losses.task import is_classifier
from pruning_runs import VIT, Images, NoLabels, gated, lora_model, state_of, trainer
from tiny import LABELS, WITH_GRID, assert_same, images, make, run

TWO_HEADS = "DeiTForImageClassificationWithTeacher"
SOFT = DistillationConfig("soft", weight=0.3, temperature=2.0)


# ---------------------------------------------------------------------- the optimizer
@pytest.mark.parametrize("model", ["vit", "lora"])
@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
def test_optimizer_groups(kind: type[Trainer], model: str, tmp_path: Path) -> None:
    config = VTPConfig(pruning_ratio=0.4, gate_learning_rate=0.5 if kind is PruningTrainer else None)
    wrapped = get_pruning_model(make(VIT) if model == "vit" else lora_model(), config)
    settings = {"kind": kind, "optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 0.01}
    run = trainer(wrapped, tmp_path, callbacks=[PruningCallback()], **settings)
    groups = run.create_optimizer().param_groups
    place = {id(p): group for group in groups for p in group["params"]}
    live = [p for p in wrapped.parameters() if p.requires_grad]
    assert place.keys() == {id(p) for p in live}
    assert sum(len(group["params"]) for group in groups) == len(live)
    for score in wrapped.method.gate_parameters():
        assert place[id(score)]["weight_decay"] == 0.0
        assert place[id(score)]["lr"] == (0.5 if kind is PruningTrainer else 0.01)
    others = [p for p in live if id(p) not in {id(s) for s in wrapped.method.gate_parameters()}]
    assert {place[id(p)]["lr"] for p in others} == {0.01}
    assert {place[id(p)]["weight_decay"] for p in others} == {0.0, 0.1}


def test_gates_keep_their_learning_rate_through_a_schedule(tmp_path: Path) -> None:
    model = gated(gate_learning_rate=0.5, sparsity_weight=0.01)
    rates: list[list[float]] = []

    class Recorder(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer(model, tmp_path, callbacks=[Recorder()], lr_scheduler_type="linear", max_steps=4).train()
    assert [row[-1] for row in rates] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert [row[0] for row in rates] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_gates_outside_the_optimizer_are_refused(tmp_path: Path) -> None:
    model = gated()
    for kind in (Trainer, PruningTrainer):
        without = torch.optim.SGD(model.model.parameters(), lr=0.1)
        wrong = trainer(model, tmp_path, kind=kind, callbacks=[PruningCallback()], optimizers=(without, None))
        with pytest.raises(InvalidConfigError, match="12 gates are not in the optimizer"):
            wrong.train()
    whole = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(model, tmp_path, kind=Trainer, callbacks=[PruningCallback()], optimizers=(whole, None)).train()
    given = {
        "params": [{"params": list(model.model.parameters())}, {"params": model.method.gate_parameters(), "lr": 3.0}]
    }
    own = trainer(model, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {**given, "lr": 0.1}))
    assert [group["lr"] for group in own.create_optimizer().param_groups] == [0.1, 3.0]


def test_a_gate_learning_rate_that_would_be_ignored_is_refused(tmp_path: Path) -> None:
    plain = trainer(gated(gate_learning_rate=0.5), tmp_path, kind=Trainer, callbacks=[PruningCallback()])
    with pytest.raises(InvalidConfigError, match=r"gate_learning_rate is 0\.5.*\[0\.1\].*PruningTrainer"):
        plain.train()


# ---------------------------------------------------------------------- refusals
def test_the_callback_needs_a_pruning_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="get_pruning_model.*ViTForImageClassification"):
        trainer(make(VIT), tmp_path, kind=Trainer, callbacks=[PruningCallback()]).train()


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data: Images) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data[i] for i in range(len(self.data)))


@pytest.mark.parametrize("data", [NoLabels(), Stream(NoLabels())])
def test_missing_labels_are_found_before_the_first_step(data: Any, tmp_path: Path) -> None:
    for model in (gated(), make(VIT), make(TWO_HEADS)):
        before = state_of(model)
        with pytest.raises(MissingLabelsError, match="labels"):
            trainer(model, tmp_path, train_dataset=data, distillation=DistillationConfig("none")).train()
        assert_same(model.state_dict(), before)


def test_labels_may_have_other_names_and_models_other_tasks(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["fine"] for row in rows])}

    fine = NoLabels()
    fine_row = lambda i: {**NoLabels.__getitem__(fine, i), "fine": i % LABELS}  # noqa: E731
    rows = [fine_row(i) for i in range(8)]
    trainer(gated(), tmp_path, train_dataset=rows, data_collator=collate, remove_unused_columns=False).train()
    rows = [{"pixel_values": row["pixel_values"], "label": row["fine"]} for row in rows]
    trainer(gated(), tmp_path, train_dataset=rows).train()

    rows = [{**NoLabels()[i], "bool_masked_pos": torch.arange(4) % 2} for i in range(8)]
    masked = gated("ViTForMaskedImageModeling")
    trainer(masked, tmp_path, train_dataset=rows, remove_unused_columns=False).train()
    assert masked.method.decided


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
@pytest.mark.parametrize("case", WITH_GRID)
def test_columns_and_labels_are_those_of_the_wrapped_model(case: str, kind: type[Trainer], tmp_path: Path) -> None:
    stock, wrapped = make(case), get_pruning_model(make(case), VTPConfig(pruning_ratio=0.4, round_to=4))
    takes = {name: p.default for name, p in inspect.signature(stock.forward).parameters.items()}
    ours = {name: p.default for name, p in inspect.signature(wrapped.forward).parameters.items()}
    takes |= {"labels": None} if is_classifier(stock) else {}
    assert ours == takes
    labels = ["labels"] if is_classifier(stock) else find_labels(type(stock))
    assert find_labels(type(wrapped)) == labels and can_return_loss(type(wrapped)) == can_return_loss(type(stock))
    run_ = trainer(wrapped, tmp_path, kind=kind, callbacks=[PruningCallback()])
    run_._set_signature_columns_if_needed()
    assert set(run_._signature_columns) == {*takes, *labels, "label", "label_ids"} and run_.label_names == labels
    by_position = wrapped.eval()(images(2))
    assert_same(run(wrapped), {k: v for k, v in run(stock).items()})
    assert type(by_position) is type(stock(images(2)))
    with pytest.raises(TypeError):
        wrapped(images(2), pixel_values=images(2))
    with pytest.raises(TypeError):
        wrapped(*[None] * (len(ours) + 1))


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
def test_masked_image_modelling_keeps_its_columns(kind: type[Trainer], tmp_path: Path) -> None:
    """With the Trainer's default, which drops what the model does not take; the loss is the stock model's."""
    rows = [{**NoLabels()[i], "bool_masked_pos": torch.arange(4) % 2, "file": i} for i in range(8)]
    model, stock = gated("ViTForMaskedImageModeling", sparsity_weight=0), make("ViTForMaskedImageModeling")
    for one in (model, stock):
        trainer(one, tmp_path, kind=kind, callbacks=[PruningCallback()] * (one is model), train_dataset=rows,
                gradient_accumulation_steps=2, max_steps=1).train()  # fmt: skip
    assert_same({name: t for name, t in model.model.state_dict().items()}, dict(stock.state_dict()))


def test_a_teacher_is_needed_to_distil_into_another_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="teacher="):
        trainer(make(VIT), tmp_path, distillation=SOFT)
    model = gated()
    with pytest.raises(InvalidConfigError, match="share tensors"):
        trainer(model, tmp_path, teacher=model.model)


def test_a_head_that_learns_nothing_is_refused_where_it_would_stop_ddp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make(VIT)
    small = prune(dense, PruningPlan.random(dense, 0.4, ["mlp"]))
    features = DistillationConfig(kind="features")
    run = trainer(small, tmp_path, teacher=dense, distillation=features, train_dataset=NoLabels())
    monkeypatch.setattr(type(run.accelerator), "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(InvalidConfigError, match="a head that gets no gradient stops DDP"):
        run.train()

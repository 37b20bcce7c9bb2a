"""EarlyStopping waits until a method that cuts step by step is done, and an end far from the target is said."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_vitprune import (
    NViTConfig,
    OneShotScores,
    PruningCallback,
    PruningPlan,
    PruningTrainer,
    SPViTConfig,
    count,
    criteria,
    get_pruning_model,
)
from hf_vitprune.methods import Stage
from hf_vitprune.plan import select
from pruning_runs import QUIET, SMALL_GROUPS, VIT, Images
from tiny import images, make

LABELLED = torch.utils.data.Subset(Images(16), [0, 1, 2, 3])


def trained(trainer_class: Any, config: Any, folder: Path, best: bool = False, **settings: Any) -> Any:
    """With evaluations that only ever get worse, and no patience with them."""
    worse = itertools.count()
    model = get_pruning_model(make(VIT), config)
    saving = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1} if best else {}
    args = TrainingArguments(
        str(folder),
        **{
            **QUIET,
            "max_steps": 24,
            "per_device_train_batch_size": 4,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "quality",
            "greater_is_better": True,
            "max_grad_norm": 0,
            **saving,
            **settings,
        },
    )
    own = [PruningCallback()] if trainer_class is Trainer else []
    trainer = trainer_class(
        model,
        args,
        train_dataset=Images(16),
        eval_dataset=LABELLED,
        compute_metrics=lambda _: {"quality": -float(next(worse))},
        callbacks=[EarlyStoppingCallback(1), *own],
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("trainer_class", [Trainer, PruningTrainer])
@pytest.mark.parametrize("best", [False, True])
def test_nvit_is_cut_to_its_target_first(trainer_class: Any, best: bool, tmp_path: Path) -> None:
    config = NViTConfig(target=0.6, group_sizes=SMALL_GROUPS)
    trainer = trained(trainer_class, config, tmp_path, best)
    method = trainer.model.method
    reached = method.moments()[-1].step  # the last groups went here, in the training and not after it
    # the first evaluation on target is the best, and the next is worse
    assert 2 < reached < trainer.state.global_step <= reached + 2 < 24
    ratio = count(trainer.model.export(compensate=False)).macs / count(make(VIT)).macs
    assert 0.5 < ratio <= 0.6
    if best:
        assert int(Path(trainer.state.best_model_checkpoint).name.partition("-")[2]) >= reached


def test_spvit_is_searched_to_its_target_first(tmp_path: Path) -> None:
    config = SPViTConfig(target=0.8, gate_learning_rate=0.3, patience=0)
    trainer = trained(PruningTrainer, config, tmp_path)
    stop = trainer.state.global_step
    assert 2 < stop < 24 and trainer.model.method.stage == Stage.ON_TARGET


def test_an_end_far_under_the_target_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    monkeypatch.setattr(select.logger, "warning", said.append)
    model = get_pruning_model(make(VIT), SPViTConfig(target=0.9, gate_learning_rate=0.5, cost_weight=1e-6))
    for gates in model.method._all_gates():
        with torch.no_grad():
            gates.score.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    model.decide()
    (text,) = said
    ratio = count(model.plan().architecture).macs / count(make(VIT)).macs
    assert f"the plan leaves {ratio:.3f} of the macs, far under the target of 0.900" in text
    assert ratio < 0.81 and "lower gate_learning_rate or cost_weight" in text
    model.decide()
    assert len(said) == 1  # of the decision, once


def test_plans_far_under_their_target_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(select.logger, "warning", said.append)
    model = make(VIT)
    PruningPlan.from_scores(model, criteria.magnitude(model), target=0.8, units=("mlp",), round_to=1)
    OneShotScores.measure(model, images(4)).plan(0.7, round_to=1)
    assert not said
    PruningPlan.from_scores(model, criteria.magnitude(model), target=0.97, units=("layers",))
    assert len(said) == 1 and "far under the target of 0.970" in said[0]
    select.say_if_far_under(0.5, 0.555, "macs", "")  # within a tenth
    assert len(said) == 1

"""The loss on labels: soft ones of Mixup and CutMix are shares of an image's classes, and not several labels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_vitprune import DistillationConfig, PruningCallback, PruningTrainer
from hf_vitprune.errors import InvalidConfigError, InvalidDataError
from hf_vitprune.losses.task import task_loss
from pruning_runs import VIT, Images, gated, state_of, trainer
from tiny import LABELS, make

DOUBLE = torch.float64


def shares(i: int) -> torch.Tensor:
    """Two classes of an image, as Mixup mixes them."""
    row = torch.zeros(LABELS, dtype=DOUBLE)
    row[i % LABELS] += 0.3 + 0.1 * (i % 5)
    row[(i + 1) % LABELS] += 0.7 - 0.1 * (i % 5)
    return row


def test_soft_labels_are_the_cross_entropy_with_a_distribution() -> None:
    model = make(VIT)
    logits = torch.randn(4, LABELS, dtype=DOUBLE)
    labels = torch.stack([shares(i) for i in range(4)])
    expected = -(labels * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1).mean()
    assert task_loss(model, labels, logits).item() == pytest.approx(expected.item(), rel=1e-12)
    assert model.config.problem_type == "single_label_classification"
    # classes after that, as in an evaluation, are the same problem
    hard = torch.nn.functional.one_hot(torch.arange(4), LABELS).double()
    assert task_loss(model, torch.arange(4), logits).item() == pytest.approx(task_loss(model, hard, logits).item())
    assert task_loss(model, labels.bfloat16(), logits.bfloat16()).dtype is torch.float32


def test_several_labels_an_image_stay_what_they_are() -> None:
    model, logits = make(VIT), torch.randn(4, LABELS, dtype=DOUBLE)
    several = torch.ones(4, LABELS, dtype=DOUBLE)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, several)
    assert task_loss(model, several, logits).item() == pytest.approx(expected.item())
    assert model.config.problem_type == "multi_label_classification"
    one_each = torch.eye(4, LABELS, dtype=DOUBLE)  # what the config says counts
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, one_each)
    assert task_loss(model, one_each, logits).item() == pytest.approx(expected.item())


def test_shares_that_are_none_are_refused() -> None:
    model, logits = make(VIT), torch.randn(4, LABELS, dtype=DOUBLE)
    task_loss(model, torch.eye(4, LABELS, dtype=DOUBLE), logits)
    with pytest.raises(InvalidDataError, match=r"sum to 5 to 5: .*problem_type='multi_label_classification'"):
        task_loss(model, torch.ones(4, LABELS, dtype=DOUBLE), logits)


@pytest.mark.parametrize("kind", [Trainer, PruningTrainer])
@pytest.mark.parametrize("taught", [False, True])
def test_soft_labels_are_exact_under_accumulation(kind: type[Trainer], taught: bool, tmp_path: Path) -> None:
    """Labels that say one class whole give what class numbers give; micro-batches give what the big batch gives."""
    if taught and kind is Trainer:
        pytest.skip("a plain Trainer does not distil")
    extra: dict[str, Any] = {"distillation": DistillationConfig("soft", weight=0.3)} if taught else {}

    def after(label: Any, **changes: Any) -> dict[str, torch.Tensor]:
        model = gated(sparsity_weight=0).double()
        data = Images(8, DOUBLE, labels=label)
        settings = {"kind": kind, "train_dataset": data, "max_steps": 1, "callbacks": [PruningCallback()], **extra}
        run_ = trainer(model, tmp_path, **settings, **changes)
        run_.train()
        small = run_.model.export(compensate=False)
        assert small.config.problem_type == "single_label_classification"
        return {name: t for name, t in state_of(model).items() if t.is_floating_point()}

    whole = {"per_device_train_batch_size": 8}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    big, small = after(shares, **whole), after(shares, **split)
    numbers = after(lambda i: i % LABELS, **whole)
    rows = after(lambda i: torch.eye(LABELS, dtype=DOUBLE)[i % LABELS], **whole)
    for one, other in ((big, small), (numbers, rows)):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-10, msg=name)


def test_weights_of_lessons_do_not_depend_on_their_order(tmp_path: Path) -> None:
    """1/2 labels + 1/2 the teacher's best class + 100 KL, as NViT is fine-tuned, in any order."""
    lessons = [
        (DistillationConfig("hard", weight=0.5), make(VIT, seed=3).double()),
        (DistillationConfig("kl", weight=100.0, temperature=20.0), make(VIT, seed=4).double()),
    ]
    ends = []
    for order in itertools.permutations(lessons):
        model = make(VIT).double()
        configs, teachers = zip(*order, strict=True)
        run_ = trainer(
            model, tmp_path, max_steps=1, train_dataset=Images(8, DOUBLE, labels=lambda i: i % LABELS),
            distillation=list(configs), teacher=list(teachers),
        )  # fmt: skip
        batch = run_._prepare_inputs(next(iter(run_.get_train_dataloader())))
        loss = run_.compute_loss(model.train(), dict(batch))
        logits = model(batch["pixel_values"]).logits
        hard, kl = lessons[0][1](batch["pixel_values"]).logits, lessons[1][1](batch["pixel_values"]).logits
        cross = torch.nn.functional.cross_entropy
        divergence = torch.nn.functional.kl_div(
            (logits / 20).log_softmax(-1), (kl / 20).log_softmax(-1), reduction="batchmean", log_target=True
        )
        expected = 0.5 * cross(logits, batch["labels"]) + 0.5 * cross(logits, hard.argmax(-1)) + 100 * divergence
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        run_.train()
        ends.append(state_of(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-9, atol=1e-10, msg=name)


def test_shares_over_the_whole_are_refused_at_once(tmp_path: Path) -> None:
    two = [DistillationConfig("hard", weight=0.6), DistillationConfig("soft", weight=0.6)]
    with pytest.raises(InvalidConfigError, match="more than 1"):
        trainer(gated(), tmp_path, distillation=two)

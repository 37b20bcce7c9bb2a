"""Training and testing, the same for all methods."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import TrainingArguments

from hf_vitprune import DistillationConfig, PruningPlan, PruningTrainer
from hf_vitprune.errors import InvalidDataError
from hf_vitprune_cli.progress import use_quiet_progress

from .tasks import Examples, Task, Unlabelled

BATCH_SIZE, WEIGHT_DECAY = 64, 0.05
#: of the fine-tuning that every method ends with
TUNE_LEARNING_RATE = 1e-3
TUNE_DISTILLATION = DistillationConfig(kind="soft", weight=0.5, temperature=2.0)


def fit(
    model: Any,
    task: Task,
    steps: int,
    learning_rate: float,
    seed: int,
    *,
    what: str,
    schedule: str = "cosine",
    teacher: Any = None,
    distillation: DistillationConfig | None = None,
    batch_size: int = BATCH_SIZE,
    plan: PruningPlan | None = None,
) -> None:
    """Train a model or PruningModel in place for so many updates.

    Without labels, it learns the hidden states of its teacher (a PruningModel by default those of itself at the
    start), and nothing else.

    Args:
        schedule: of the learning rate, after a warm-up over a tenth of the steps: ``cosine`` or ``constant``.
        teacher, distillation: as :class:`PruningTrainer` has them.
        plan: what a model with fewer residual channels than its teacher was pruned by; for features.
    """
    if isinstance(task.train, Unlabelled):
        distillation = DistillationConfig(kind="features", plan=plan)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type={"cosine": "cosine", "constant": "constant_with_warmup"}[schedule],
            warmup_steps=0.1,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = PruningTrainer(
            model, arguments, train_dataset=task.train, teacher=teacher, distillation=distillation
        )
        use_quiet_progress(trainer, what)
        loss = trainer.train().training_loss
    if not loss < float("inf"):
        raise InvalidDataError(f"{what}: the loss is {loss}; the training diverged")


def tune(small: Any, teacher: Any, task: Task, steps: int, seed: int, plan: PruningPlan | None = None) -> Any:
    """Fine-tune a pruned model against the dense one; gives it back. ``plan``: as in :func:`fit`."""
    what = f"fine-tuning, {steps} steps"
    learned = {"teacher": teacher, "distillation": TUNE_DISTILLATION, "plan": plan}
    fit(small, task, steps, TUNE_LEARNING_RATE, seed, what=what, **learned)
    return small.eval()


@torch.inference_mode()
def accuracy(model: Any, examples: Examples, batch_size: int = 500) -> float:
    """Share of the images whose class has the highest logit."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(examples), batch_size):
        part = slice(start, start + batch_size)
        logits = model(pixel_values=examples.pixels[part].to(device)).logits
        right += int((logits.argmax(-1).cpu() == examples.labels[part]).sum())
    return right / len(examples)

"""Train, prune, fine-tune, measure: the run behind ``hf-vitprune prune`` and ``demo``."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import TrainingArguments

from hf_vitprune.cost import count
from hf_vitprune.evaluation.metrics import accuracy_of
from hf_vitprune.latency.measure import Timing, device_name, measure_speed
from hf_vitprune.losses.distillation import DistillationConfig
from hf_vitprune.methods import PruningConfig, method_for
from hf_vitprune.plan.lineage import lineage_of, note, plain_name
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.publish.block_report import plot_kept
from hf_vitprune.publish.card import CARD, model_card
from hf_vitprune.publish.kept import PLOT, beside, license_of
from hf_vitprune.publish.report import comparison_table
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.towers import tower_module
from hf_vitprune.training.exporting import is_compensated
from hf_vitprune.training.model import get_pruning_model
from hf_vitprune.training.trainer import PruningTrainer
from hf_vitprune.utils.classes import chance_note

from .app import say
from .progress import use_quiet_progress


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains.

    Attributes:
        epochs: passes over the training set.
        learning_rate: of AdamW, cosine decay after a warm-up over a tenth of the steps.
        batch_size: images a step and process.
        weight_decay: of AdamW.
        seed: of order and initialisation.
        steps: of the optimizer, in place of epochs.
    """

    epochs: float
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 0.05
    seed: int = 0
    steps: int | None = None

    def arguments(self, output_dir: str) -> TrainingArguments:
        return TrainingArguments(
            output_dir,
            num_train_epochs=self.epochs,
            max_steps=-1 if self.steps is None else self.steps,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=4 * self.batch_size,
            weight_decay=self.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            seed=self.seed,
            data_seed=self.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            # arguments set accelerate's state up anew: on the CPU it would forget the other processes without this
            use_cpu=PartialState().device.type == "cpu",
        )


@dataclass
class PrunedResult:
    """What pruning one model gave.

    Attributes:
        model: the small model, fine-tuned.
        plan: what stayed.
        accuracy: ``dense`` before any pruning; ``pruned`` right after the decision, by plain slices; ``compensated``
            (where there was something to make up for) and ``tuned`` (where it was fine-tuned) from there. Empty
            without labels.
    """

    model: Any
    plan: PruningPlan
    accuracy: dict[str, float]

    @property
    def final_accuracy(self) -> float | None:
        return next((self.accuracy[s] for s in ("tuned", "compensated", "pruned") if s in self.accuracy), None)


def train(
    model: Any,
    schedule: Schedule,
    train_set: Any,
    eval_set: Any,
    *,
    what: str,
    teacher: Any = None,
    distillation: DistillationConfig | None = None,
) -> float:
    """Train a model or PruningModel in place and return its accuracy on ``eval_set`` afterwards.

    It learns from the logits of a teacher too (a PruningModel, from a copy of itself), with ``distillation``; ``what``
    is shown at the progress bar.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = PruningTrainer(
            model,
            schedule.arguments(folder),
            train_dataset=train_set,
            eval_dataset=eval_set,
            compute_metrics=accuracy_of,
            teacher=teacher,
            distillation=distillation,
        )
        use_quiet_progress(trainer, what)
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def evaluate(model: Any, eval_set: Any, batch_size: int = 256) -> float:
    """Top-1 accuracy of a model."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = PruningTrainer(  # a plain one finds no labels for DeiT's two heads
            model,
            Schedule(0, 0.0, batch_size).arguments(folder),
            eval_dataset=eval_set,
            compute_metrics=accuracy_of,
        )
        use_quiet_progress(trainer, "evaluating")
        return trainer.evaluate()["eval_accuracy"]


def prune_and_tune(
    model: Any,
    config: PruningConfig,
    train_set: Any,
    eval_set: Any,
    *,
    learn: Schedule,
    tune: Schedule | None,
    distillation: DistillationConfig | None = None,
    fresh_head: bool = False,
) -> PrunedResult:
    """Learn what to prune, prune, fine-tune against the unpruned model; ``model`` itself is trained by the first step.

    While it prunes, a method trains with the distillation that its authors use (``method.traits.distillation``).

    Args:
        learn: schedule of the training that decides.
        tune: schedule of the fine-tuning; None for none.
        distillation: how the small model learns from the unpruned one while it is fine-tuned; None: labels only.
        fresh_head: the classifier was never trained; else one that knows nothing of ``eval_set`` is reported.
    """
    config.meter(Architecture.of(model))  # a latency table of something else is refused before any work
    accuracy = {"dense": evaluate(model, eval_set)}
    at_chance = None if fresh_head else chance_note(accuracy["dense"], eval_set.labels)
    if at_chance is not None and PartialState().is_main_process:
        say(at_chance)
    before = copy.deepcopy(model) if method_for(config).traits.zeroes_weights else None
    wrapped = get_pruning_model(model, config)
    name = config.method_name
    taught = wrapped.method.traits.distillation
    # what the gated model computes after its decision is what plain slices do
    accuracy["pruned"] = train(
        wrapped, learn, train_set, eval_set, what=f"{name}: learning what to prune", distillation=taught
    )
    plan, small = wrapped.plan(), wrapped.export()
    unpruned = wrapped.unload()
    if is_compensated(small):
        accuracy["compensated"] = evaluate(small, eval_set)
    if tune is not None:
        teacher = None if distillation is None else unpruned if before is None else before
        what = f"{name}: fine-tuning"
        accuracy["tuned"] = train(
            small, tune, train_set, eval_set, what=what, teacher=teacher, distillation=distillation
        )
    return PrunedResult(small.eval(), plan, accuracy)


def compare(
    dense: Any, results: dict[str, PrunedResult], batch_size: int, measured: bool = True
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Rows for ``comparison_table``, and the timings behind them: all models measured in turns, in one run.

    Args:
        results: name of the method -> what it gave.
        measured: time them; else there are no timings.
    """
    first = next(iter(results.values()))
    towers = {"dense": tower_module(dense, first.plan.part)}
    towers |= {name: tower_module(result.model, result.plan.part) for name, result in results.items()}
    timings = measure_speed(towers, batch_size=batch_size) if measured else {}

    def row(name: str, key: str, accuracy: float | None) -> dict[str, Any]:
        cost, time = count(towers[key]), timings.get(key)
        shown = {} if time is None else {"latency_ms": time.seconds * 1e3, "speedup": time.speedup}
        return {"name": name, "accuracy": accuracy, "params": cost.params, "macs": cost.macs, **shown}

    rows = [row("dense", "dense", first.accuracy.get("dense"))]
    for name, result in results.items():
        tuned = "tuned" in result.accuracy
        for stage, what in (("pruned", "just pruned"), ("compensated", "compensated")):
            if tuned and stage in result.accuracy:
                rows.append({"name": f"{name}, {what}", "accuracy": result.accuracy[stage]})
        how = "" if not result.accuracy else ", final" if tuned else ", without fine-tuning"
        rows.append(row(f"{name}{how}", name, result.final_accuracy))
    return rows, timings


def finish(
    model: str, out: Path, dense: Any, name: str, result: PrunedResult, processor: Any, data: str | None, timed: bool
) -> None:
    """Measure, save and print what came of a saved model; ``name``: of the small one in the table."""
    rows, timings = compare(dense, {name: result}, 8, timed)
    pair = {"before": timings["dense"], "after": timings[name]} if timed else None
    save_result(out, result, processor, pair, dataset=data, base_model=model)
    on = [model, *([f"on {data}"] if data else [])]
    title = ", ".join([" ".join(on), *([f"measured on {device_name()}", "batch 8"] if timed else [])])
    Console().print(comparison_table(rows, title=title))


def save_result(
    folder: Path,
    result: PrunedResult,
    processor: Any,
    timings: dict[str, Timing] | None,
    *,
    dataset: str | None,
    base_model: str | None = None,
) -> None:
    """Write the model, its image processor, plan, plot of what every layer keeps, and card.

    Args:
        timings: of ``before`` (dense) and ``after``, where they were measured.
        dataset: what the accuracies were measured on; None where there are none.
        base_model: Hub id of the dense model.
    """
    before = {"accuracy": result.accuracy["dense"]} if result.accuracy else None
    config = tower_module(result.model, result.plan.part).config
    history = lineage_of(config).get("history")
    if before is not None and history:  # the accuracy of what was pruned goes with its size
        note(config, history=[*history[:-1], {**history[-1], "metrics": before, "dataset": plain_name(dataset or "")}])
    folder.mkdir(parents=True, exist_ok=True)
    result.model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    result.plan.save(folder / "plan.json")
    plot_kept(result.plan, folder / PLOT)
    card = model_card(
        result.model,
        base_model=base_model,
        before=before,
        after={"accuracy": result.final_accuracy} if result.final_accuracy is not None else None,
        dataset=dataset,
        timings=timings,
        part=result.plan.part,
        plot=PLOT,
        beside=beside(folder),
        license=license_of(base_model),
    )
    card.save(folder / CARD)

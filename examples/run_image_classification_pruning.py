#!/usr/bin/env python
"""Fine-tune a vision transformer, prune it while it trains, fine-tune the small model, save it and push it to the Hub.

    python examples/run_image_classification_pruning.py --dataset digits --output_dir /tmp/out
    accelerate launch examples/run_image_classification_pruning.py --dataset beans --output_dir vit-beans-pruned \
        --model_name_or_path google/vit-base-patch16-224-in21k --target 0.5 --push_to_hub --hub_model_id me/vit-beans

The run has two stages, each an ordinary Trainer run with checkpoints of its own: ``<output_dir>/learn`` (train with
gates, decide what goes) and ``<output_dir>/tune`` (fine-tune the small model). Started again with
``--resume_from_checkpoint True``, it goes on in whichever stage it was.

    python examples/run_image_classification_pruning.py --dataset beans --output_dir vit-beans-spvit --method spvit \
        --model_name_or_path facebook/deit-tiny-patch16-224 --weights pretrained --distillation hard

searches for the layers that can do with a convolution in place of attention, and fine-tunes what it found from the
pre-trained weights; ``architecture.png`` and ``gates.png`` show it.

    python examples/run_image_classification_pruning.py --dataset digits --output_dir /tmp/out --revit_hidden_size 64

trains a model of ReViT's shape from scratch instead.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    HfArgumentParser,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ema import EmaCallback
from example_data import DataArguments
from hf_vitprune import (
    DistillationConfig,
    PruningModel,
    PruningTrainer,
    build,
    count,
    get_pruning_model,
    push_to_hub,
    revit,
)
from hf_vitprune.contrib.augment import AugmentedTrainer
from hf_vitprune.contrib.drop_path import attach_drop_path
from hf_vitprune.contrib.spvit_start import released_start
from hf_vitprune.evaluation.metrics import accuracy_of
from hf_vitprune.methods import config_class_of, method_names
from hf_vitprune.modeling.native import to_native
from hf_vitprune.publish.block_report import plot_architecture
from hf_vitprune.publish.card import model_card
from hf_vitprune.publish.kept import beside, license_of
from hf_vitprune.publish.kept import draw as draw_kept
from hf_vitprune.publish.run_report import plot_gates
from hf_vitprune.utils.classes import chance_note
from hf_vitprune.utils.data import LabelledImages
from hf_vitprune.utils.extras import need
from hf_vitprune_cli.classifier import load_classifier
from hf_vitprune_cli.digits import IMAGE_SIZE, tiny_vit
from hf_vitprune_cli.workflow import evaluate
from recipe import Run


@dataclass
class ModelArguments:
    """What to prune, and how."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "model folder or Hub id; a small untrained ViT for the digits by default"}
    )
    new_head: bool = field(
        default=False,
        metadata={"help": "a fresh classifier, though the model has one for as many classes; for others it is fresh"},
    )
    recipe: str | None = field(
        default=None, metadata={"help": "name of a published run in examples/recipes, whose settings are the defaults"}
    )
    method: str = field(default="vtp", metadata={"help": f"pruning method: {', '.join(method_names())}"})
    method_config: str = field(
        default="{}", metadata={"help": 'JSON of further settings of the method, e.g. {"uneven": true}'}
    )
    target: float | None = field(default=0.5, metadata={"help": "fraction of the cost that may remain"})
    target_metric: str = field(default="macs", metadata={"help": "what target counts: macs, params or latency"})
    latency_table: str | None = field(
        default=None, metadata={"help": "for latency: file of a table made by hf-vitprune latency"}
    )
    revit_hidden_size: int | None = field(
        default=None,
        metadata={"help": "train a ReViT of this width from scratch instead, with no pruning; the model gives depth"},
    )
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the gates (vtp: 1e-2, spvit: 1e-3)"}
    )
    weights: str = field(
        default="searched",
        metadata={
            "help": "what the small model is cut out of: searched, or pretrained (before the first stage); released: "
            "pretrained, with fresh unfolded convolutions, as SPViT's authors do"
        },
    )
    lora_rank: int = field(
        default=0, metadata={"help": "train LoRA adapters of this rank instead of all weights; 0: all"}
    )
    tune_epochs: float | None = field(
        default=None, metadata={"help": "epochs of the second stage; as the first by default"}
    )
    distillation: str = field(
        default="soft", metadata={"help": "teach the small model by the unpruned one: soft, hard, kl, none"}
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "of that distillation: a share of the loss; for kl a factor (NViT: 100)"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of that distillation (NViT: 20)"})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "image classifier of the same classes that teaches hard labels"}
    )
    teacher_stages: str = field(default="both", metadata={"help": "when that one teaches: both stages, or tune"})
    ema_decay: float | None = field(
        default=None, metadata={"help": "also evaluate a running average of the last stage's weights (DeiT: 0.99996)"}
    )
    drop_path: float = field(
        default=0.0, metadata={"help": "chance of the last layer's branches to be dropped, in both stages (DeiT: 0.1)"}
    )
    layer_decay: float = field(
        default=1.0, metadata={"help": "rate of a layer as a share of the rate of the one behind it; 1: all alike"}
    )
    native: bool = field(default=False, metadata={"help": "save a stock model, where the pruned shape allows it"})


def make_config(args: ModelArguments) -> Any:
    """The method's settings, those of ``method_config`` above all."""
    rate = {} if args.gate_learning_rate is None else {"gate_learning_rate": args.gate_learning_rate}
    settings = {**rate, **json.loads(args.method_config)}
    target = None if {"target_gmacs", "pruning_ratio"} & settings.keys() else args.target
    return config_class_of(args.method).from_goal(target, args.target_metric, args.latency_table, **settings)


def load_model(args: ModelArguments, images: LabelledImages) -> tuple[Any, Any, LabelledImages]:
    """(model, image processor, the images with the model's class numbers).

    A classifier of as many classes is one of the same classes, or refused; any other gets a fresh head.
    """
    if args.model_name_or_path is None:
        model: Any = tiny_vit(images.label_names)
        if args.revit_hidden_size is not None:
            model.config.num_attention_heads = 1  # of 64 channels, as the rule has it
        processor: Any = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    else:
        source = args.model_name_or_path
        fresh = args.new_head or AutoConfig.from_pretrained(source).num_labels != len(images.label_names)
        model, images = load_classifier(source, images, new_head=fresh, **drop_path_of(args))
        how = "a fresh classifier for the data's classes" if images.match is None else images.match.how
        if how and PartialState().is_main_process:
            print(how)
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    if args.revit_hidden_size is not None:
        return untrained(model.config, args), processor, replace(images, match=None)
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        lora = LoraConfig(r=args.lora_rank, target_modules=targets, modules_to_save=["classifier"])
        model = get_peft_model(model, lora)
    return model, processor, images


def drop_path_of(args: ModelArguments) -> dict[str, float]:
    """For models that drop paths themselves, what their config is told; the others are hooked while they train."""
    own = hasattr(AutoConfig.from_pretrained(args.model_name_or_path), "drop_path_rate")
    return {"drop_path_rate": args.drop_path} if own else {}


def untrained(config: Any, args: ModelArguments) -> Any:
    """A model of ReViT's shape; with a head of its own for what a teacher says, if there is one."""
    if args.teacher_name_or_path is None:
        return build(config, revit(config, args.revit_hidden_size))
    known = DeiTConfig().to_dict().keys() - {"model_type", "architectures"}
    config = DeiTConfig(**{name: value for name, value in config.to_dict().items() if name in known})
    architecture = revit(config, args.revit_hidden_size).replace(task="ForImageClassificationWithTeacher")
    return build(config, architecture)


def other_teacher(args: ModelArguments) -> list[tuple[DistillationConfig, Any]]:
    """The classifier that teaches its best class as a second label, if there is one."""
    if args.teacher_name_or_path is None:
        return []
    teacher = AutoModelForImageClassification.from_pretrained(args.teacher_name_or_path)
    return [(DistillationConfig("hard", weight=0.5), teacher)]


def taught_by(lessons: list[tuple[DistillationConfig, Any]]) -> dict[str, Any]:
    """Settings of PruningTrainer for these kinds of distillation, each with its teacher."""
    if not lessons:
        return {}
    return {"distillation": [kind for kind, _ in lessons], "teacher": [teacher for _, teacher in lessons]}


def stage_arguments(args: TrainingArguments, stage: str, run: Run, epochs: float | None = None) -> TrainingArguments:
    """The user's arguments with an output folder of the stage's own; only the result is pushed, by us."""
    changes: dict[str, Any] = {"output_dir": str(Path(args.output_dir) / stage), "push_to_hub": False}
    changes |= run.stage(stage, args)
    if epochs is not None:
        changes["num_train_epochs"] = epochs
    record = {**args.to_dict(), **changes}
    known = {name for name, f in TrainingArguments.__dataclass_fields__.items() if f.init}
    return TrainingArguments(**{name: value for name, value in record.items() if name in known})


def run_stage(trainer: PruningTrainer, args: TrainingArguments, drop_path: float) -> dict[str, float]:
    """Train (or go on where a killed run was) and evaluate."""
    base = getattr(trainer.model, "model", trainer.model)
    handles = [] if hasattr(base.config, "drop_path_rate") else attach_drop_path(trainer.model, drop_path)
    last = (
        get_last_checkpoint(trainer.args.output_dir)
        if args.resume_from_checkpoint and Path(trainer.args.output_dir).is_dir()
        else None
    )
    trainer.train(resume_from_checkpoint=last)
    for handle in handles:
        handle.remove()
    return trainer.evaluate()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))  # type: ignore[arg-type]
    run, arguments = Run.of(sys.argv[1:] if argv is None else argv, Path(__file__).parent / "recipes")
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    data_args.check_output(training_args, model_args.model_name_or_path)
    need("the figures that are drawn at the end", "matplotlib")
    set_seed(training_args.seed)

    images = data_args.drawn(data_args.load(training_args.seed), training_args.seed)
    model, processor, images = load_model(model_args, images)
    plain = run.recipe is None or run.recipe.augmentation is None
    train_set, eval_set = images.processed(processor, cache=data_args.in_memory and plain)
    run.augment(train_set, model.config)
    for line in run.announcement(count(model).macs, len(train_set), model_args, training_args):
        print(line)
    sets: dict[str, Any] = {"train_dataset": train_set, "eval_dataset": eval_set, "compute_metrics": accuracy_of}
    sets |= {"augmentation": run.augmentation, "layer_decay": model_args.layer_decay}
    ema = EmaCallback(model_args.ema_decay) if model_args.ema_decay else None
    if model_args.revit_hidden_size is not None:
        return train_from_scratch(model, processor, sets, run, model_args, data_args, training_args)

    if model_args.weights not in ("searched", "pretrained", "released"):
        raise ValueError(f"--weights is searched, pretrained or released, not {model_args.weights}")
    if model_args.weights != "searched" and model_args.model_name_or_path is None:
        raise ValueError(f"--weights {model_args.weights} needs a pre-trained model: give --model_name_or_path")
    if model_args.weights == "released" and model_args.method != "spvit":
        raise ValueError("--weights released is for --method spvit")
    config = make_config(model_args)
    dense_cost = count(model)

    if images.match is not None and not training_args.resume_from_checkpoint:  # it should know these classes
        note = chance_note(evaluate(model, eval_set), eval_set.labels)
        if note is not None and PartialState().is_main_process:
            print(note)

    # stage 1: train with gates; at the end the callback decides what stays
    pretrained = model_args.model_name_or_path is not None  # an untrained model teaches nothing
    before = copy.deepcopy(model)
    full = before if pretrained else None
    pruning_model = get_pruning_model(model, config)
    method = pruning_model.method
    other = other_teacher(model_args)
    first = other if model_args.teacher_stages == "both" else []
    taught = method.traits.distillation
    lessons = [*first, *([(taught, full)] if taught is not None and full is not None else [])]
    arguments = stage_arguments(training_args, "learn", run)
    learner = AugmentedTrainer(pruning_model, arguments, **sets, **taught_by(lessons))
    learned = run_stage(learner, training_args, model_args.drop_path)
    if learner.is_world_process_zero():
        draw(learner, pruning_model, Path(training_args.output_dir))
    if model_args.weights == "released":
        small: Any = released_start(before, pruning_model.plan())
    else:
        small = pruning_model.export(weights=before if model_args.weights == "pretrained" else None)
    teacher = pruning_model.unload() if not method.traits.zeroes_weights else full

    # stage 2: fine-tune the small model, taught by the full one
    lessons = list(other)
    if model_args.distillation != "none" and teacher is not None:
        weight, temperature = model_args.distillation_weight, model_args.temperature
        distillation = DistillationConfig(model_args.distillation, weight=weight, temperature=temperature)
        lessons.append((distillation, teacher))
    tuning = stage_arguments(training_args, "tune", run, model_args.tune_epochs)
    tuner = AugmentedTrainer(small, tuning, callbacks=[ema] if ema else None, **sets, **taught_by(lessons))
    tuned = run_stage(tuner, training_args, model_args.drop_path)
    averaged = {"accuracy_of_average": ema.evaluated(tuner)["eval_accuracy"]} if ema else {}
    if isinstance(small, PruningModel):
        small = small.export()

    cost = count(small)
    summary = {
        "accuracy_masked": learned["eval_accuracy"],
        "accuracy": tuned["eval_accuracy"],
        **averaged,
        "macs_ratio": cost.macs / dense_cost.macs,
        "params_ratio": cost.params / dense_cost.params,
    }
    if tuner.is_world_process_zero():
        save(small, processor, summary, model_args, training_args, data_args)
        print(json.dumps(summary, indent=2))
    return summary


def draw(learner: PruningTrainer, pruning_model: Any, folder: Path) -> None:
    """Draw the blocks that stay, and where there are any in the log, how the gates moved."""
    plot_architecture(pruning_model.plan().architecture, folder / "architecture.png")
    if any("gate_layer" in key for row in learner.state.log_history for key in row):
        plot_gates(learner.state.log_history, folder / "gates.png")


def train_from_scratch(
    model: Any,
    processor: Any,
    sets: dict[str, Any],
    run: Run,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> dict[str, Any]:
    """Train a model of redistributed shape: nothing is pruned, and there is no second stage."""
    lessons = taught_by(other_teacher(model_args))
    ema = EmaCallback(model_args.ema_decay) if model_args.ema_decay else None
    callbacks = [ema] if ema else None
    arguments = stage_arguments(training_args, "scratch", run)
    trainer = AugmentedTrainer(model, arguments, callbacks=callbacks, **sets, **lessons)
    accuracy = run_stage(trainer, training_args, model_args.drop_path)["eval_accuracy"]
    averaged = {"accuracy_of_average": ema.evaluated(trainer)["eval_accuracy"]} if ema else {}
    summary = {"accuracy": accuracy, **averaged, **count(model)._asdict()}
    if trainer.is_world_process_zero():
        save(model, processor, summary, model_args, training_args, data_args)
        print(json.dumps(summary, indent=2))
    return summary


def save(
    small: Any,
    processor: Any,
    summary: dict[str, float],
    model_args: ModelArguments,
    training_args: TrainingArguments,
    data_args: DataArguments,
) -> None:
    """Write the small model (adapters merged) with its card to the output folder, and push it when asked to."""
    if hasattr(small, "merge_and_unload"):
        small = small.merge_and_unload()
    if model_args.native:
        small = to_native(small)
    small = small.to("cpu", dtype=torch.float32)
    folder = Path(training_args.output_dir)
    small.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = model_card(
        small,
        after={"accuracy": summary["accuracy"]},
        dataset=data_args.name,
        base_model=model_args.model_name_or_path,
        license=license_of(model_args.model_name_or_path),
        plot=draw_kept(small, folder),
        beside=beside(folder),
    )
    card.save(folder / "README.md")
    if training_args.push_to_hub:
        repo = training_args.hub_model_id or folder.name
        private = training_args.hub_private_repo
        push_to_hub(small, repo, card=card, image_processor=processor, private=private, card_folder=folder)


if __name__ == "__main__":
    main()
    gc.collect()  # trainers refer to themselves, and so keep the process group and its threads alive
    PartialState().destroy_process_group()  # gloo's threads, left running, can abort a process that ends

#!/usr/bin/env python
"""Adapt a vision transformer to a task with adapters, keep the layers that it needs (SLS), retrain, save the adapters.

    python examples/run_sls_peft.py --output_dir /tmp/sls                     # digits, on a small ViT made for it
    accelerate launch examples/run_sls_peft.py --dataset beans --output_dir beans-adapter \
        --model_name_or_path google/vit-base-patch16-224-in21k --alpha 0.3 --schedule CLR
    python examples/run_sls_peft.py --recipe sls-convpass --task eurosat --dataset EUROSAT --output_dir eurosat-adapter

A plain ``Trainer`` does the training; ``PruningCallback`` scores the layers at its end. What is saved is the adapter
of the kept layers, the head and the number of layers: the backbone is shared by all tasks. Started again with
``--resume_from_checkpoint True``, the run goes on in whichever stage it was.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from example_data import DataArguments
from hf_vitprune import PruningCallback, SLSConfig, count, get_pruning_model
from hf_vitprune.contrib.drop_path import attach_drop_path
from hf_vitprune.contrib.retraining import fresh_adapters, retrain
from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.evaluation.metrics import accuracy_of
from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig
from hf_vitprune.spec.architecture import unwrap
from hf_vitprune.utils.data import LabelledImages
from hf_vitprune_cli.classifier import load_classifier
from hf_vitprune_cli.digits import IMAGE_SIZE, tiny_vit
from hf_vitprune_cli.workflow import Schedule, evaluate
from recipe import Run

#: kind of adapters -> class of its settings, and what they are by default
ADAPTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "convpass": (ConvpassConfig, {"r": 8}),
    "repadapter": (RepAdapterConfig, {"r": 8}),
}


@dataclass
class ModelArguments:
    """What to adapt, and how much of it to keep."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "pretrained model folder or Hub id; by default a small ViT, first trained on half the classes"
        },
    )
    source_epochs: float = field(default=15.0, metadata={"help": "epochs of that first training"})
    recipe: str | None = field(
        default=None, metadata={"help": "name of a published run in examples/recipes, whose settings are the defaults"}
    )
    task: str | None = field(default=None, metadata={"help": "of VTAB-1k, whose adapter settings a recipe takes"})
    adapter: str = field(default="lora", metadata={"help": f"kind of adapters: {', '.join(ADAPTERS)}"})
    adapter_config: str = field(
        default="{}", metadata={"help": 'JSON of their settings, e.g. {"r": 4, "target_modules": ["q_proj"]}'}
    )
    drop_path: float = field(
        default=0.0, metadata={"help": "chance of the last layer's branches to be dropped in training"}
    )
    alpha: float = field(default=0.3, metadata={"help": "the threshold as a share of the last layer's score"})
    sls_config: str = field(default="{}", metadata={"help": 'JSON of further settings of SLS, e.g. {"fast": true}'})
    schedule: str = field(default="CLR", metadata={"help": "retraining: CLR, FT, TFS, or none"})
    retrain_epochs: float | None = field(default=None, metadata={"help": "epochs of it; as the first by default"})


def load_backbone(args: ModelArguments, images: LabelledImages, training: TrainingArguments) -> tuple[str, Any]:
    """(model folder or Hub id, image processor); without a model, a small one is made in the output folder."""
    if args.model_name_or_path is not None:
        return args.model_name_or_path, AutoImageProcessor.from_pretrained(args.model_name_or_path)
    folder = Path(training.output_dir) / "backbone"
    processor: Any = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    if not (folder / "config.json").is_file():
        set_seed(training.seed)
        model = tiny_vit(images.label_names)
        half = len(images.label_names) // 2
        source, _ = images.processed(processor, cache=True)
        source.dataset = source.dataset.select(
            [i for i, label in enumerate(source.dataset[images.label_column]) if label < half]
        )
        schedule = Schedule(args.source_epochs, 2e-3, seed=training.seed).arguments(str(folder / "training"))
        trainer = Trainer(model, schedule, train_dataset=source)
        trainer.train()
        if trainer.is_world_process_zero():
            processor.save_pretrained(folder)
            model.to("cpu").save_pretrained(folder)  # type: ignore[arg-type]
        trainer.accelerator.wait_for_everyone()
    return str(folder), processor


def adapted(backbone: str, args: ModelArguments, images: LabelledImages) -> Any:
    """The backbone with adapters and a new head: whatever classes its own had, it says nothing of these."""
    own = hasattr(AutoConfig.from_pretrained(backbone), "drop_path_rate")  # the others are hooked while they train
    settings = {"drop_path_rate": args.drop_path} if own else {}
    base, _ = load_classifier(backbone, images, new_head=True, **settings)
    if args.adapter not in ADAPTERS:
        raise InvalidConfigError(f"--adapter is one of {', '.join(ADAPTERS)}, not {args.adapter}")
    kind, settings = ADAPTERS[args.adapter]
    settings = {**settings, "modules_to_save": ["classifier"], **json.loads(args.adapter_config)}
    return get_peft_model(base, kind(**settings))


def dropping_paths(model: Any, rate: float) -> list[Any]:
    """Handles of hooks that drop paths; none where the model does so by itself."""
    return [] if hasattr(unwrap(model).config, "drop_path_rate") else attach_drop_path(model, rate)


def stage_arguments(args: TrainingArguments, stage: str, run: Run, name: str) -> TrainingArguments:
    """The user's arguments with an output folder of the stage's own, and what the recipe says of it."""
    changes = {"output_dir": str(Path(args.output_dir) / stage), "push_to_hub": False, **run.stage(name, args)}
    record = {**args.to_dict(), **changes}
    known = {name for name, f in TrainingArguments.__dataclass_fields__.items() if f.init}
    return TrainingArguments(**{name: value for name, value in record.items() if name in known})


def last_checkpoint(args: TrainingArguments, stage: TrainingArguments) -> str | None:
    folder = Path(stage.output_dir or "")
    return get_last_checkpoint(str(folder)) if args.resume_from_checkpoint and folder.is_dir() else None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))  # type: ignore[arg-type]
    recipes = Path(__file__).parent / "recipes"
    run, arguments = Run.of(sys.argv[1:] if argv is None else argv, recipes, adapters=True)
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(arguments)
    data_args.check_output(training_args, model_args.model_name_or_path)
    images = data_args.load(training_args.seed)
    backbone, processor = load_backbone(model_args, images, training_args)
    set_seed(training_args.seed)
    model = adapted(backbone, model_args, images)
    images = data_args.drawn(images, training_args.seed)
    train_set, eval_set = images.processed(processor, cache=data_args.in_memory)
    dense = count(model)
    for line in run.announcement(dense.macs, len(train_set), model_args, training_args):
        print(line)

    # 1. adapt; at the end the callback scores the layers from the top and decides
    pruning_model = get_pruning_model(model, SLSConfig(alpha=model_args.alpha, **json.loads(model_args.sls_config)))
    learning = stage_arguments(training_args, "adapt", run, "learn")
    learner = Trainer(pruning_model, learning, train_dataset=train_set, callbacks=[PruningCallback()])
    handles = dropping_paths(pruning_model, model_args.drop_path)
    learner.train(resume_from_checkpoint=last_checkpoint(training_args, learning))
    for handle in handles:
        handle.remove()
    selection = pruning_model.method.selection

    # 2. truncate: still a PeftModel, over the kept layers only
    small = pruning_model.export()
    accuracy = {"adapted": evaluate(pruning_model.unload(), eval_set), "truncated": evaluate(small, eval_set)}

    # 3. retrain adapters and head
    if model_args.schedule != "none":
        again = stage_arguments(training_args, "retrain", run, "tune")
        if model_args.schedule == "TFS":
            small = fresh_adapters(small, again.seed)
        handles = dropping_paths(small, model_args.drop_path)
        trainer = retrain(
            small,
            again,
            "CLR" if model_args.schedule == "TFS" else model_args.schedule,  # the same rates
            epochs=model_args.retrain_epochs,
            trainer_class=Trainer,
            resume_from_checkpoint=last_checkpoint(training_args, again),
            train_dataset=train_set,
            eval_dataset=eval_set,
            compute_metrics=accuracy_of,
        )
        for handle in handles:
            handle.remove()
        small = trainer.model
        accuracy["retrained"] = trainer.evaluate()["eval_accuracy"]

    summary = {
        "kept_layers": selection.kept_layers,
        "layers": selection.layers,
        "reason": selection.reason,
        "accuracy": accuracy,
        "macs_ratio": count(small).macs / dense.macs,
    }
    if learner.is_world_process_zero():
        folder = Path(training_args.output_dir or "") / "adapter"
        small.to("cpu", dtype=torch.float32).save_pretrained(folder)
        processor.save_pretrained(folder)
        summary["adapter_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        summary["backbone_params"] = dense.params
        print(json.dumps(summary, indent=2))
    return summary


if __name__ == "__main__":
    main()
    gc.collect()  # trainers refer to themselves, and so keep the process group and its threads alive
    PartialState().destroy_process_group()  # gloo's threads, left running, can abort a process that ends

"""The demo: a small ViT on scikit-learn's digits, pruned by every method, saved, and loaded back by a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline, set_seed

from hf_vitprune.compensate import Compensation
from hf_vitprune.errors import VitPruneError
from hf_vitprune.latency.measure import device_name
from hf_vitprune.losses.distillation import DistillationConfig
from hf_vitprune.methods import OneShotScores, PruningConfig, SLSConfig, config_class_of, method_names
from hf_vitprune.pruning import prune
from hf_vitprune.publish.report import comparison_table
from hf_vitprune.utils.data import DIGITS, LabelledImages, load_images
from hf_vitprune.utils.extras import need
from hf_vitprune.utils.sources import built_in_digits

from .workflow import PrunedResult, Schedule, compare, evaluate, prune_and_tune, save_result, train

IMAGE_SIZE = 16
#: folder of the model that is pruned
DENSE = "dense"
PRETRAIN = Schedule(epochs=30, learning_rate=2e-3)
LEARN = Schedule(epochs=8, learning_rate=3e-4)
TUNE = Schedule(epochs=15, learning_rate=1e-3)
DISTILLATION = DistillationConfig(kind="soft", weight=0.5, temperature=2.0)


class DemoMethod(NamedTuple):
    """A row of the table; with ``lora``, adapters are trained on the frozen model, and merged at the end."""

    name: str
    config: Callable[[], PruningConfig]
    lora: bool = False


#: settings for a model this small; a method that is not here gets what it chooses for itself
SETTINGS: dict[str, dict[str, Any]] = {
    "vtp": {"sparsity_weight": 1e-4, "sparsity_warmup": 0.2, "gate_learning_rate": 2e-2},
    "nvit": {"group_sizes": {"embedding": 4, "heads": 1, "qk": 4, "v": 4, "mlp": 8}},
    "spvit": {"gate_learning_rate": 6e-2, "patience": 0},
}


def _to_half(name: str) -> DemoMethod:
    """A registered method, at half of the multiply-adds."""
    config_class = config_class_of(name)
    label = config_class.__name__.removesuffix("Config")
    return DemoMethod(label, lambda: config_class.from_goal(0.5, **SETTINGS.get(name, {})))


METHODS = (*map(_to_half, method_names()), DemoMethod("SLS", lambda: SLSConfig(max_samples=500), lora=True))


def tiny_vit(label_names: list[str]) -> ViTForImageClassification:
    """An untrained 6-layer ViT for 16 x 16 images."""
    config = ViTConfig(  # type: ignore[call-arg]  # labels are keyword arguments of every config
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=IMAGE_SIZE,
        patch_size=4,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
    )
    return ViTForImageClassification(config)


def with_lora(model: ViTForImageClassification) -> Any:
    """The model with adapters and a head that are trained, and everything else frozen."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(model, config)


def run_demo(output: Path, seed: int = 0, console: Console | None = None) -> list[dict[str, Any]]:
    """Train, prune, fine-tune, export, save, load back, and print the table, whose rows it returns.

    Args:
        output: folder for ``dense`` and one model folder a method (weights, card, image processor, plot of what every
            layer keeps).

    Raises:
        VitPruneError: a reloaded model does not predict what the saved one did.
    """
    console = console or Console()
    need("the demo's figures", "matplotlib")
    set_seed(seed)
    images = load_images(DIGITS, seed=seed, parts=built_in_digits())
    processor = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    train_set, eval_set = images.processed(processor, cache=True)
    console.print(
        f"{len(train_set)} training and {len(eval_set)} test images: scikit-learn's digits, real handwriting."
    )
    dense = tiny_vit(images.label_names)
    train(dense, PRETRAIN, train_set, eval_set, what="training the dense ViT")
    for whole in (dense, processor):
        whole.save_pretrained(output / DENSE)

    results: dict[str, PrunedResult] = {}
    for method in METHODS:
        model = copy.deepcopy(dense)
        result = prune_and_tune(
            with_lora(model) if method.lora else model,
            method.config(),
            train_set,
            eval_set,
            learn=LEARN,
            tune=TUNE,
            distillation=DISTILLATION,
        )
        if method.lora:
            result.model = result.model.merge_and_unload()
        results[method.name] = result
    results["one-shot"] = _one_shot(dense, train_set, eval_set)
    rows, timings = compare(dense, results, batch_size=64)
    for name, result in results.items():
        folder = output / name.lower()
        pair = {"before": timings["dense"], "after": timings[name]}
        save_result(folder, result, processor, pair, dataset="scikit-learn digits")
        _check_pipeline(folder, result, images, console)
    console.print(comparison_table(rows, title=f"digits, measured on {device_name()}, batch 64"))
    console.print(
        f"Made in {output}: {', '.join([DENSE, *map(str.lower, results)])}; each folder loads with from_pretrained, "
        f"the pruned ones with a card.\nNext: hf-vitprune report {output / DENSE} {output / 'vtp'}",
        soft_wrap=True,
        highlight=False,
    )
    return rows


def _one_shot(dense: Any, images: Any, eval_set: Any) -> PrunedResult:
    """Half of the multiply-adds from 128 images, without their labels and without a training step."""
    dense.eval()
    scores = OneShotScores.measure(dense, images)
    plan = scores.plan(0.5, round_to=2)
    small = prune(dense, plan, calibration=images, compensate=Compensation(images=scores.images))
    return PrunedResult(small, plan, {"dense": evaluate(dense, eval_set), "pruned": evaluate(small, eval_set)})


def _check_pipeline(folder: Path, result: PrunedResult, images: LabelledImages, console: Console) -> None:
    """Load the folder as any user would, and compare with the model in memory."""
    classify: Any = pipeline("image-classification", model=str(folder), device="cpu")
    sample = images.evaluation[0][images.image_column].convert("RGB")
    answer = classify(sample)[0]
    with torch.no_grad():
        pixels = classify.image_processor(images=sample, return_tensors="pt")["pixel_values"]
        expected = result.model.cpu()(pixel_values=pixels).logits.softmax(-1).max().item()
    if abs(answer["score"] - expected) > 1e-6:
        raise VitPruneError(f"the model in {folder} predicts {answer}, the saved one {expected}")
    truth = images.label_names[images.evaluation[0][images.label_column]]
    console.print(
        f"[bold]{folder}[/]: loaded by pipeline('image-classification'), sees a {answer['label']} "
        f"({answer['score']:.1%}); it is a {truth}."
    )

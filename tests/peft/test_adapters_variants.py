"""Pruning PEFT models: variants of LoRA, and every way to say where adapters go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from hf_vitprune import VTPConfig, get_pruning_model
from hf_vitprune.errors import AdapterError
from hf_vitprune.modeling.peft_twin import tuner_layers
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune, truncate
from plans import PLANS
from tiny import images, make
from tiny_adapters import adapted, check

VIT = "ViTForImageClassification"


# ---------------------------------------------------------------------- variants of LoRA
VARIANTS: dict[str, dict[str, Any]] = {
    "QALoRA without quantised weights": {"use_qalora": True},
    "BD-LoRA": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=1, match_strict=False)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
    "KaSA": {"kasa_config": KasaConfig()},
    "VeLoRA": {"velora_config": VeloraConfig()},
    "MiCA": {"init_lora_weights": "mica"},
    "tied weights": {"ensure_weight_tying": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_lora(name: str) -> None:
    """They stay where their layer loses nothing, and are merged where it does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = adapted(make(VIT), LoraConfig(r=4, target_modules=["q_proj", "fc1"], **VARIANTS[name]))
    stays = name in ("QALoRA without quantised weights", "tied weights")
    trains = name != "MonteCLoRA"  # whose priors have no part in evaluation
    check(model, PruningPlan.dense(model).keep_layers([0, 2]), trains=trains)
    small = check(model, PruningPlan.random(model, 0.4, ["mlp"]), 0 if stays else 3, trains)
    assert len(tuner_layers(small.get_base_model())) == (6 if stays else 3)


@pytest.mark.parametrize("fields", [{"alora_invocation_tokens": [1, 2]}, {"arrow_config": ArrowConfig()}])
def test_variants_that_are_refused(fields: dict[str, Any]) -> None:
    model = get_peft_model(make(VIT), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, value in fields.items():
        setattr(model.peft_config["default"], name, value)
    for call in (lambda: truncate(model, 2), lambda: get_pruning_model(model, VTPConfig(target=0.5))):
        with pytest.raises(AdapterError, match=f"{next(iter(fields))} cannot be carried over"):
            call()


def test_layers_that_cannot_be_merged_are_named_with_the_cure() -> None:
    """PEFT gives no reason for Poly's; the cure works."""
    model = adapted(make(VIT), PolyConfig(r=4, target_modules=["q_proj"]))
    plan = PruningPlan.random(model, 0.4, ["qk"])
    with pytest.raises(AdapterError, match=r"q_proj cannot be merged into its weights \(.*Linear\): .*unload"):
        prune(model, plan)
    small = prune(model.unload(), plan)
    assert small(images(2)).logits.isfinite().all()


# ---------------------------------------------------------------------- targets, modules, flags
TARGETS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.[02]\..*(q_proj|fc2)"},
    "everything linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1, 2]},
    "excluded": {"target_modules": ["q_proj", "fc1"], "exclude_modules": r".*layers\.1\..*"},
    "ranks": {
        "target_modules": ["q_proj", "fc1"],
        "rank_pattern": {"layers.1.attention.q_proj": 5, r".*\.fc1": 2},
        "alpha_pattern": {"layers.2.attention.q_proj": 20},
    },
    "biases": {"target_modules": ["q_proj", "fc2"], "bias": "all"},
    "some biases": {"target_modules": ["q_proj", "fc2"], "bias": "lora_only"},
    "classifier": {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
    "norms": {"target_modules": ["fc1"], "modules_to_save": ["layernorm_after", "vit.layernorm"]},
    "a whole MLP": {"target_modules": ["q_proj"], "modules_to_save": ["layers.2.mlp", "layers.0.attention"]},
    "patches": {"target_modules": ["projection", "q_proj"]},
    "DoRA of patches": {"target_modules": ["projection", "classifier"], "use_dora": True},
    "PiSSA": {"target_modules": ["q_proj", "fc1"], "init_lora_weights": "pissa"},
}


NAMING = ("regex", "some layers", "excluded", "ranks", "a whole MLP")


CUTS: dict[str, Callable[[PruningPlan], PruningPlan]] = {
    **{name: PLANS[name] for name in ("everything", "removed branches")},
    "last layers": lambda plan: plan.keep_layers([1, 2]),
}


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        # layers and branches that go matter where a config names layers or holds whole modules
        pytest.param(name, cut, marks=[] if cut == "everything" or name in NAMING else [pytest.mark.slow])
        for name in TARGETS
        for cut in CUTS
    ],
)
def test_targets(name: str, cut: str) -> None:
    model = adapted(make(VIT), LoraConfig(r=3, **TARGETS[name]))
    small = check(model, CUTS[cut](PruningPlan.dense(model)))
    kept = {"last layers": {0: 1, 1: 2}}.get(cut, {0: 0, 1: 1, 2: 2})
    for new, layer in tuner_layers(small.get_base_model()).items():
        old = new
        for position, index in kept.items():
            old = old if f"layers.{position}." not in new else new.replace(f".{position}.", f".{index}.")
        original = tuner_layers(model.get_base_model())[old]
        assert layer.r == original.r and layer.scaling == original.scaling  # type: ignore[attr-defined]


def test_dinov2_classifier_reads_two_vectors() -> None:
    model = make("Dinov2ForImageClassification")
    model = adapted(model, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["classifier"]))
    plan = PruningPlan.random(model, 0.4, ["embedding"])
    small = check(model, plan)
    assert small.get_base_model().classifier.modules_to_save["default"].weight.shape == (5, 2 * 19)

"""Adapters on models that are not stock: custom heads that are trained as a whole, and subclasses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, ViTForImageClassification

from hf_vitprune.errors import UnsupportedUnitError
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from plans import uneven
from tiny import CLASSIFIERS, LABELS, assert_same, make, relative_error, run
from tiny_adapters import randomize, targets

VIT = "ViTForImageClassification"
UNITS: dict[str, list[str]] = {
    "narrow": ["heads", "qk", "v", "mlp"],
    "embedding": ["embedding", "mlp"],
    "layers": ["layers"],
}


class Doubled(ViTForImageClassification):
    """A user's class, with a module and a forward of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.temperature = nn.Linear(LABELS, LABELS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.temperature(2 * output.logits)
        return output


def with_head(case: str = VIT, seed: int = 0) -> Any:
    model = make(case)
    torch.manual_seed(seed)
    width = model.classifier.in_features
    model.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12), nn.GELU(), nn.Linear(12, LABELS))
    return model.eval()


def subclass() -> Any:
    plain = make(VIT)
    torch.manual_seed(0)
    model = Doubled(plain.config)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model.eval()


def adapted(model: Any, **fields: Any) -> Any:
    config = LoraConfig(r=3, **{"target_modules": targets(model), "modules_to_save": ["classifier"], **fields})
    return randomize(get_peft_model(model, config)).eval()


@pytest.mark.parametrize(
    ("case", "units"), [*(("head", units) for units in UNITS), ("subclass", "narrow"), ("subclass", "layers")]
)
def test_pruned_with_its_adapters(case: str, units: str, tmp_path: Path) -> None:
    model = adapted(with_head() if case == "head" else subclass())
    plan = uneven(PruningPlan.random(model, 0.4, UNITS[units]))
    small = prune(model, plan)
    expected = run(small)
    assert relative_error(expected["logits"], run(mask(model, plan))["logits"]) < 1e-5
    trained = {n for n, p in small.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save.default" in name for name in trained)
    assert not any("original_module" in name for name in trained)
    small.save_pretrained(tmp_path)
    fresh = prune(with_head(seed=1) if case == "head" else subclass(), plan)
    assert_same(run(PeftModel.from_pretrained(fresh, str(tmp_path)).eval()), expected)


def test_what_may_read_the_embedding_is_refused() -> None:
    model = adapted(subclass())
    with pytest.raises(UnsupportedUnitError, match="temperature"):
        prune(model, PruningPlan.random(model, 0.4, ["embedding"]))


@pytest.mark.parametrize("case", [c for c in CLASSIFIERS if c != VIT and hasattr(make(c), "classifier")])
def test_heads_of_families(case: str) -> None:
    model = adapted(with_head(case))
    plan = PruningPlan.random(model, 0.4, ["heads", "mlp"])
    assert relative_error(run(prune(model, plan))["logits"], run(mask(model, plan))["logits"]) < 1e-5


def test_lora_in_a_custom_head() -> None:
    model = with_head()
    model = adapted(model, target_modules=[*targets(model), "classifier.1", "classifier.3"], modules_to_save=None)
    for units in UNITS.values():
        plan = PruningPlan.random(model, 0.4, units)
        assert relative_error(run(prune(model, plan))["logits"], run(mask(model, plan))["logits"]) < 1e-5


def test_saved_by_trainer(tmp_path: Path) -> None:
    model = adapted(with_head())
    plan = uneven(PruningPlan.random(model, 0.4, UNITS["narrow"]))
    small = prune(model, plan)
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[])
    Trainer(small, args).save_model(str(tmp_path / "adapter"))
    fresh = PeftModel.from_pretrained(prune(with_head(), plan), str(tmp_path / "adapter"))
    assert_same(run(fresh.eval()), run(small))

"""Models built from an architecture, or layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
)

from hf_vitprune.cost import count
from hf_vitprune.errors import InvalidArchitectureError
from hf_vitprune.modeling import build
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.architecture import Architecture
from tiny import CASES, CLASSIFIERS, LargestTensor, make, run

VIT = "ViTForImageClassification"


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_build(case: str) -> None:
    config = CASES[case].config()
    architecture = PruningPlan.random(make(case), 0.4).architecture
    model = build(config, architecture)
    assert type(model).__name__ == f"Pruned{CASES[case].model_class}"
    assert Architecture.of(model) == architecture and count(model) == count(architecture)
    assert model.num_labels == 5 and not hasattr(config, "pruning_config")


def test_build_from_layers() -> None:
    config = ViTConfig(**CASES[VIT].fields, num_labels=5)
    rows = [{"heads": 2, "qk_dim": 4, "v_dim": 6, "mlp": 10}, {"mixer": "none"}, {"mlp": 0, "attention_in": 7}]
    model = build(config, Architecture.from_layers(config, rows, hidden_size=24))
    first, second, third = Architecture.of(model).layers
    assert (first.heads, first.qk_dim, first.v_dim, first.mlp) == (2, 4, 6, 10)
    assert (second.mixer, second.mlp, third.heads, third.mlp, third.attention_in) == ("none", 48, 4, 0, 7)
    assert run(model.eval())["logits"].shape == (2, 5)


SWIN = "SwinForImageClassification"


BAD_LAYERS: dict[str, tuple[str, Any]] = {
    "unknown key": (VIT, [{"head": 2}]),
    "no dict": (VIT, [3]),
    "no layer": (VIT, []),
    "too many": (VIT, [{}] * 4),
    "zero heads": (VIT, [{"heads": 0}]),
    "fraction": (VIT, [{"mlp": 2.5}]),
    "boolean": (VIT, [{"mlp": False}]),
    "huge": (VIT, [{"mlp": 10**9}]),
    "unknown mixer": (VIT, [{"mixer": "pool"}]),
    "inputs over the width": (VIT, [{"mlp_in": 33}]),
    "one list for stages": (SWIN, [{}, {}]),
    "a stage too many": (SWIN, [[{}], [{}], [{}]]),
    "too deep a stage": (SWIN, [[{}] * 3, [{}]]),
    "an empty stage": (SWIN, [[], [{}]]),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_from_layers_refuses(name: str) -> None:
    case, rows = BAD_LAYERS[name]
    with pytest.raises(InvalidArchitectureError):
        Architecture.from_layers(CASES[case].config(), rows)


@pytest.mark.parametrize("width", [0, -1, 2.0, True, 10**9])
def test_from_layers_refuses_widths(width: Any) -> None:
    with pytest.raises(InvalidArchitectureError, match="hidden_size"):
        Architecture.from_layers(CASES[VIT].config(), [{}], hidden_size=width)
    with pytest.raises(InvalidArchitectureError):
        Architecture.from_layers(CASES[SWIN].config(), [[{}], [{}]], hidden_size=8)


def test_build_for_another_family() -> None:
    architecture = Architecture.of(make(VIT))
    with pytest.raises(InvalidArchitectureError, match="deit"):
        build(CASES["DeiTForImageClassification"].config(), architecture)


# ---------------------------------------------------------------------- only what is kept is allocated
def test_dense_weights_are_never_allocated(tmp_path: Path) -> None:
    """The dense model of this one would take 2 layers x 800 MB."""
    config = CASES[VIT].config(hidden_size=4096, num_attention_heads=64, intermediate_size=16384, num_hidden_layers=2)
    rows = [{"heads": 1, "qk_dim": 4, "v_dim": 4, "mlp": 8}] * 2
    small = build(config, Architecture.from_layers(config, rows, hidden_size=16))
    small.save_pretrained(tmp_path)
    with LargestTensor() as largest:
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        AutoModelForImageClassification.from_config(loaded.config)
        prune(loaded, PruningPlan.random(loaded, 0.5, units=["mlp"]))
    assert largest.real == max(p.numel() for p in small.parameters())
    assert largest.size >= 4096  # what is on the meta device was seen too, and takes no memory

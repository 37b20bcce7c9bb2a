"""Every unit of every family, in a class of the user's, with a head of the user's, and under adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hf_vitprune import Architecture, PruningPlan, mask, prune
from hf_vitprune.modeling.structure import layer_paths
from plans import aligned, without_a_layer
from tiny import CASES, CLASSIFIERS, EVERY_FAMILY, NECKS, make, relative_error, reset_weights, run
from tiny_adapters import randomize


def own_class(case: str) -> PreTrainedModel:
    """A subclass whose forward doubles every output."""
    stock: Any = type(make(case))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock.forward(self, *args, **kwargs)
        for name, value in output.items():
            output[name] = value * 2 if isinstance(value, torch.Tensor) else tuple(v * 2 for v in value)
        return output

    made: Any = type(stock.__name__, (stock,), {"forward": forward, "__module__": __name__})  # inputs go by the name
    return reset_weights(made(make(case).config)).eval()  # type: ignore[return-value]


def own_head(case: str) -> PreTrainedModel:
    """Another classifier, where there is one; else an MLP with another activation and a hook."""
    model: Any = make(case)
    paths = layer_paths(model, Architecture.of(model))
    classifier = getattr(model, "classifier", None)
    if isinstance(classifier, nn.Linear):
        width = classifier.in_features
        model.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 3))
        if case.startswith("Dinov2"):  # two halves of the stream side by side: no norm over them
            model.classifier = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 3))
    else:
        mlp: Any = model.get_submodule(paths[0].mlp)
        for name, module in list(mlp.named_children()):
            if not isinstance(module, nn.Linear):
                setattr(mlp, name, nn.ReLU())
        mlp.register_forward_hook(lambda module, args, out: out * 2)
    reset_weights(model)
    return model.eval()


def adapted(case: str) -> Any:
    model = make(case)
    paths = layer_paths(model, Architecture.of(model))[0]
    names = [path.rpartition(".")[2] for path in (paths.q, paths.v, *paths.fc1)]
    layers = "|".join(path.layer.replace(".", r"\.") for path in layer_paths(model, Architecture.of(model)))
    return randomize(
        get_peft_model(model, LoraConfig(r=2, target_modules=rf"({layers})\..*({'|'.join(names)})"))
    ).eval()


GUISES: dict[str, Callable[[str], Any]] = {"class": own_class, "head": own_head, "PEFT": adapted}
ALL = [*EVERY_FAMILY, *NECKS]
#: for these, ``test_live_model.py`` has more of the kind
CHANGED = [case for case in ALL if case not in CLASSIFIERS]


def check(case: str, guise: str, plans: Callable[[Any, Any], list[PruningPlan]]) -> None:
    model = GUISES[guise](case)
    base = model.get_base_model() if guise == "PEFT" else model
    for plan in plans(model, base):
        small, full = prune(model, plan), mask(model, plan)
        pairs = aligned(run(small), run(full), plan)
        assert pairs
        for name, ours, theirs in pairs:
            assert relative_error(ours, theirs) < 1e-5, name
        if guise == "class":
            assert isinstance(small, type(model))
        if guise == "PEFT":
            assert small.peft_config["default"].r == 2


def layers(base: Any) -> list[PruningPlan]:
    return [without_a_layer(base)] if "layers" in Architecture.of(base).units else []


@pytest.mark.parametrize(
    ("case", "guise"),
    [
        pytest.param(case, guise, marks=() if i % 3 == j else pytest.mark.slow)  # quickly, each in one, and all guises
        for i, case in enumerate(CHANGED)
        for j, guise in enumerate(GUISES)
    ],
)
def test_all_units_are_cut_as_their_mask_says(case: str, guise: str) -> None:
    check(case, guise, lambda model, base: [PruningPlan.random(model, 0.5, seed=3), *layers(base)])


@pytest.mark.slow
@pytest.mark.parametrize("guise", GUISES)
@pytest.mark.parametrize("case", ALL)
def test_every_unit_is_cut_as_its_mask_says(case: str, guise: str) -> None:
    def plans(model: Any, base: Any) -> list[PruningPlan]:
        units = sorted(Architecture.of(base).units - {"layers"})
        return [*(PruningPlan.random(model, 0.5, [unit], seed=3) for unit in units), *layers(base)]

    check(case, guise, plans)


def test_every_family_is_here() -> None:
    alike = {"CLIPVision", "SiglipVision", "Siglip2Vision", "SiglipText", "Siglip2Text"}  # layers of CLIP and SigLIP
    assert {case.family for case in CASES.values()} - {CASES[name].family for name in ALL} <= alike

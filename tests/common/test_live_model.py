"""Pruning the model that is there: classes, heads, activations, hooks and attributes of one's own; and the door."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_vitprune.cost import count
from hf_vitprune.errors import ModelMismatchError, UnsupportedModelError, UnsupportedUnitError
from hf_vitprune.methods import VTPConfig
from hf_vitprune.modeling.structure import layer_paths
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune, truncate
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.training.model import get_pruning_model
from plans import few, plan_named, pruning_plans
from tiny import CASES, CLASSIFIERS, images, make, relative_error, reset_weights, run
from tiny_adapters import randomize

VIT = "ViTForImageClassification"


class Unknown(nn.Module):
    """Reads the residual stream in a way that nobody can guess."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(width, 3))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.softmax(-1) @ self.table


#: head -> whether its input is cut with the residual stream
HEADS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "MLP": (lambda width: nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 3)), True),
    "Dropout+Linear": (lambda width: nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 5)), True),
    "Linear of other labels": (lambda width: nn.Linear(width, 7), True),
    "Identity": (lambda width: nn.Identity(), True),
    "LayerNorm+Linear": (lambda width: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5)), True),
    "unknown": (Unknown, False),
}


def own_class(case: str) -> PreTrainedModel:
    """A class of a user's: another forward and a Linear more."""
    stock: Any = type(make(case))

    class Own(stock):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.extra = nn.Linear(self.classifier.in_features, 2)
            self.post_init()

        def forward(self, pixel_values: Any, **kwargs: Any) -> ImageClassifierOutput:
            features: list[torch.Tensor] = []
            handle = self.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
            logits = super().forward(pixel_values, **kwargs).logits
            handle.remove()
            return ImageClassifierOutput(logits=torch.cat([logits.flip(-1), self.extra(features[0])], -1))

    model = Own(make(case).config)
    return reset_weights(model).eval()  # type: ignore[return-value]


def headed(case: str, head: str) -> PreTrainedModel:
    model: Any = make(case)
    model.classifier = HEADS[head][0](model.classifier.in_features)
    reset_weights(model)
    return model.eval()


def units_of(case: str) -> list[str]:
    return sorted({"heads", "mlp", "qk", "v", "embedding"} & Architecture.of(make(case)).units)


def assert_pruned_is_masked(model: Any, plan: PruningPlan) -> Any:
    small, full = prune(model, plan, allow_unchanged=True), mask(model, plan)
    ours, theirs = run(small)["logits"], run(full)["logits"]
    if ours.shape != theirs.shape:  # the stream itself comes out
        theirs = theirs.unflatten(-1, (-1, plan.source.hidden_size))[..., list(plan.embedding or ())].flatten(-2)
    assert relative_error(ours, theirs) < 1e-5
    return small


# ---------------------------------------------------------------------- what is the user's stays
@pytest.mark.parametrize("case", CLASSIFIERS)
@few
@given(data=st.data())
def test_a_class_of_ones_own(case: str, data: st.DataObject) -> None:
    model = own_class(case)
    model.double()
    plan, pixels = data.draw(pruning_plans(Architecture.of(model))), images().double()
    small = prune(model, plan, allow_unchanged=True)
    ours, theirs = run(small, pixels)["logits"], run(mask(model, plan), pixels)["logits"]
    assert ours.shape == (2, 7) and relative_error(ours, theirs) < 1e-9  # norms over one channel need doubles
    assert isinstance(small, type(model))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_heads_of_ones_own(case: str, head: str) -> None:
    model = headed(case, head)
    units = units_of(case)
    for chosen in (["mlp"], ["heads"], units):
        plan = PruningPlan.random(model, 0.5, units=chosen)
        two_halves = case.startswith("Dinov2") and "LayerNorm" in head  # of the class token and the mean of the rest
        if "embedding" in chosen and (not HEADS[head][1] or two_halves):
            for call in (prune, mask):
                with pytest.raises(UnsupportedUnitError, match=r"classifier.*leave the unit 'embedding' out"):
                    call(model, plan)
            continue
        small = assert_pruned_is_masked(model, plan)
        assert [type(m) for m in small.classifier.modules()] == [type(m) for m in model.classifier.modules()]


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_activations_hooks_attributes_and_modes(case: str) -> None:
    model = make(case)
    paths = layer_paths(model, Architecture.of(model))
    calls: list[str] = []
    for path in paths:
        mlp: Any = model.get_submodule(path.mlp)
        for name, module in list(mlp.named_children()):
            if not isinstance(module, nn.Linear):
                setattr(mlp, name, nn.ReLU())
    last: Any = model.get_submodule(paths[-1].layer)
    model.get_submodule(paths[-1].mlp).register_forward_hook(lambda m, a, out: calls.append("mlp") or out * 2)
    model.get_submodule(paths[-1].mlp).register_forward_pre_hook(lambda m, a: calls.append("pre"))
    last.register_forward_hook(lambda m, a, out: calls.append("layer"))
    last.note = {"mine": [1, 2]}
    last.requires_grad_(False)
    last.train()
    for plan_name in ("mlp", "uneven heads", "padded values"):
        plan = plan_named(plan_name, model)
        assert plan is not None
        small = assert_pruned_is_masked(model, plan)
        there: Any = small.get_submodule(paths[-1].layer)
        assert there.note == last.note and there.training and not small.get_submodule(paths[0].layer).training
        assert all(p.requires_grad != (n.startswith(paths[-1].layer)) for n, p in small.named_parameters())
        assert any(isinstance(module, nn.ReLU) for module in there.modules()) or "swiglu" in case
        calls.clear()
        run(small)
        assert sorted(calls) == ["layer", "mlp", "pre"]


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_recorders_still_record(case: str) -> None:
    model = make(case)
    model.set_attn_implementation("eager")
    small = prune(model, PruningPlan.random(model, 0.5, units=["mlp"]))
    both = {"output_hidden_states": True, "output_attentions": True}
    assert run(small, **both).keys() == run(model, **both).keys()


def test_tied_parameters_stay_tied() -> None:
    model: Any = make(VIT)
    model.second = nn.Linear(32, 5)
    model.second.weight = model.classifier.weight
    for units in (["mlp"], ["embedding", "mlp"]):
        small = prune(model, PruningPlan.random(model, 0.5, units=units))
        assert small.second.weight is small.classifier.weight


@pytest.mark.parametrize("make_model", [own_class, lambda case: headed(case, "MLP")], ids=["class", "head"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_adapters_on_what_is_the_users(case: str, make_model: Any) -> None:
    model = make_model(case)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomize(tuned).eval()
    plan = PruningPlan.random(tuned, 0.5, units=["mlp", "heads"])
    small = prune(tuned, plan)
    assert relative_error(run(small)["logits"], run(mask(tuned, plan))["logits"]) < 1e-5
    assert isinstance(small.get_base_model(), type(model))


# ---------------------------------------------------------------------- the door
def shorter(model: Any) -> Callable[[], None]:
    model.vit.layers = model.vit.layers[:2]
    return lambda: setattr(model.config, "num_hidden_layers", 2)


def new_weight_norm(model: Any) -> Callable[[], None]:
    fc1 = model.vit.layers[0].mlp.fc1
    parametrizations.weight_norm(fc1)
    return lambda: torch.nn.utils.parametrize.remove_parametrizations(fc1, "weight") and None


def old_weight_norm(model: Any) -> Callable[[], None]:
    fc1 = model.vit.layers[0].mlp.fc1
    torch.nn.utils.weight_norm(fc1)
    return lambda: torch.nn.utils.remove_weight_norm(fc1) and None


def masked_by_torch(model: Any) -> Callable[[], None]:
    fc1 = model.vit.layers[0].mlp.fc1
    torch_prune.l1_unstructured(fc1, "weight", 0.5)
    return lambda: torch_prune.remove(fc1, "weight") and None


def grey(model: Any) -> Callable[[], None]:
    patches = model.vit.embeddings.patch_embeddings
    patches.projection = nn.Conv2d(1, 32, 8, 8)

    def cure() -> None:
        model.config.num_channels = patches.num_channels = 1

    return cure


def wider(model: Any) -> Callable[[], None]:
    mlp = model.vit.layers[1].mlp
    before = mlp.fc1
    mlp.fc1 = nn.Linear(32, 64)
    return lambda: setattr(mlp, "fc1", before)


DOOR = {
    shorter: r"vit.layers holds 2 layers, and by the config there are 3.*num_hidden_layers",
    new_weight_norm: r"vit.layers.0.mlp.fc1 is computed.*remove_parametrizations",
    old_weight_norm: r"vit.layers.0.mlp.fc1 has weight norm.*remove_weight_norm",
    masked_by_torch: r"vit.layers.0.mlp.fc1 is masked.*prune.remove",
    grey: r"projection takes 1 channels, and config.num_channels is 3",
    wider: r"vit.layers.1.mlp.fc1 has a weight of \(64, 32\), and by the config it has \(48, 32\)",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", DOOR, ids=lambda change: change.__name__)
def test_changed_models_are_refused_by_name_and_the_cure_works(change: Any) -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.5, units=["mlp"])
    cure = change(model)
    calls: list[Callable[[], Any]] = [
        lambda: prune(model, plan),
        lambda: truncate(model, 1),
        lambda: count(model),
        lambda: PruningPlan.magnitude(model, 0.5),
        lambda: get_pruning_model(model, VTPConfig(target=0.5)),
    ]
    for call in calls:
        with pytest.raises(ModelMismatchError, match=DOOR[change]):
            call()
    cure()
    plan = PruningPlan.random(model, 0.5, units=["mlp"])
    channels = model.config.num_channels
    ours, theirs = (run(m, images()[:, :channels])["logits"] for m in (prune(model, plan), mask(model, plan)))
    assert relative_error(ours, theirs) < 1e-5
    assert count(model).params == sum(parameter.numel() for parameter in model.parameters())


def test_wrapped_models_are_refused_by_name_and_the_cure_works() -> None:
    model = make(VIT)
    plan = PruningPlan.random(model, 0.5, units=["mlp"])
    compiled: Any = torch.compile(copy.deepcopy(model), backend="eager")
    parallel = nn.DataParallel(copy.deepcopy(model))
    for wrapped, inner, cure in (
        (compiled, compiled._orig_mod, "model._orig_mod"),
        (parallel, parallel.module, "model.module"),
    ):
        with pytest.raises(UnsupportedModelError, match=cure):
            prune(wrapped, plan)
        assert relative_error(run(prune(inner, plan))["logits"], run(mask(model, plan))["logits"]) < 1e-5


def test_every_classifier_is_here() -> None:
    assert {CASES[case].family for case in CLASSIFIERS} >= {"ViT", "DeiT", "Swin", "Dinov2", "CLIP", "Siglip"}

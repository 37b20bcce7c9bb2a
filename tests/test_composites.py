"""Towers inside bigger models: pruned with everything else shared, saved and loaded as the bigger model."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

from hf_vitprune import PruningPlan, count, mask, prune, towers, truncate
from hf_vitprune.errors import (
    InvalidPlanError,
    UnsupportedModelError,
    UnsupportedUnitError,
    VitPruneError,
)
from hf_vitprune.spec.architecture import Architecture
from plans import pruning_plans
from tiny import make, relative_error
from tiny_composites import COMPOSITES, captioner, dual, llava, outputs, pixels

UNITS: dict[str, list[str]] = {
    "qk": ["qk"],
    "all": ["heads", "qk", "v", "mlp"],
    "embedding": ["embedding", "heads"],
    "layers": ["layers"],
}
#: (composite, units) that no loading or reader could follow -> what the error says
REFUSED = {
    ("Gemma 3", "embedding"): "Gemma3MultiModalProjector",
    ("DPT", "embedding"): "neck.reassemble_stage",
    ("DepthAnything", "embedding"): "what reads the tower",
    ("UperNet", "embedding"): "beside something else",
    ("VisionTextDualEncoder", "embedding"): "what reads the tower",
    ("DPT", "layers"): "out_features",
    ("DepthAnything", "layers"): "out_features",
    ("UperNet", "layers"): "out_features",
    ("VipLLaVA", "layers"): "config.vision_feature_layer",
}


@cache
def made(name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, inputs = COMPOSITES[name]()
    return model, inputs, outputs(model, inputs)


def each_part(name: str, units: str) -> list[tuple[Any, str, PruningPlan]]:
    """Every tower that has the units, with a plan for it."""
    model = made(name)[0]
    found = []
    for part in towers(model):
        source = Architecture.of(model, part)
        if set(UNITS[units]) <= set(source.family.units) | {"layers"}:
            dropped = 1 if source.depths is None else 3  # the second of Swin's third stage
            plan = PruningPlan.dense(source).keep_layers({*range(len(source.layers))} - {dropped})
            found.append((part, plan if units == "layers" else PruningPlan.random(source, 0.4, UNITS[units])))
    return [(model, part, plan) for part, plan in found]


def compare(small: Any, full: Any, inputs: dict[str, torch.Tensor], kept: Any = None) -> None:
    """1e-5 relative, on every tensor of the output; of the tower's own states, the channels that stay."""
    ours, theirs = outputs(small, inputs), outputs(full, inputs)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        other = theirs[name]
        if kept is not None and tensor.shape != other.shape:
            other = other[..., list(kept)]
        assert relative_error(tensor, other) < 1e-5, name


def addresses(model: Any, outside: str) -> dict[str, int]:
    return {n: t.data_ptr() for n, t in model.state_dict().items() if not n.startswith(f"{outside}.")}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_pruned_is_masked_and_the_rest_is_shared(name: str, units: str) -> None:
    """Outputs as with the units silenced; the model untouched; what lies outside the tower is not copied."""
    cases = each_part(name, units)
    assert cases or units == "embedding"
    for model, part, plan in cases:
        before = copy.deepcopy(model.state_dict())
        said = REFUSED.get((name, units))
        if said is not None:
            with pytest.raises(VitPruneError, match=said):
                prune(model, plan)
            with pytest.raises(VitPruneError, match=said):
                mask(model, plan)
            continue
        small, full = prune(model, plan), mask(model, plan)
        assert plan.part == part
        compare(small, full, made(name)[1], plan.embedding)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
        dense = outputs(model, made(name)[1])
        assert all(torch.equal(tensor, made(name)[2][key]) for key, tensor in dense.items())
        changed = outputs(small, made(name)[1])
        assert any(t.shape != dense[n].shape or relative_error(t, dense[n]) > 1e-4 for n, t in changed.items())
        if plan.embedding is None:
            path = towers(model)[part].path
            assert addresses(small, path) == addresses(model, path)
        assert count(small, part=part).macs < count(model, part=part).macs


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_random_plans(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["LLaVA", "VisionEncoderDecoder", "CLIP", "DepthAnything", "UperNet on Swin"]))
    model, inputs, _ = made(name)
    part = data.draw(st.sampled_from(sorted(towers(model))))
    source = Architecture.of(model, part)
    plan = data.draw(pruning_plans(source, keep=tuple(range(len(source.layers)))))
    if plan.embedding is not None and name == "DepthAnything":
        plan = replace(plan, embedding=None)
    if plan.removes_nothing:
        return
    compare(prune(model, plan), mask(model, plan), inputs, plan.embedding)


# ---------------------------------------------------------------------- loading
@pytest.mark.parametrize("name", COMPOSITES)
def test_saved_is_loaded(name: str, tmp_path: Path) -> None:
    """Bit for bit, by the class itself and by the Auto class; two loads give the same outputs."""
    model, inputs, _ = made(name)
    for part in towers(model):
        small = prune(model, PruningPlan.random(model, 0.4, UNITS["all"], part=part))
        small.save_pretrained(tmp_path / part)
        loaded = type(small).from_pretrained(tmp_path / part).eval()
        again = auto_class(model).from_pretrained(tmp_path / part).eval()
        assert type(again) is type(loaded) is type(small)
        state, own = loaded.state_dict(), small.state_dict()
        assert state.keys() == own.keys() and all(torch.equal(state[n], t) for n, t in own.items())
        first, second, third = (outputs(m, inputs) for m in (loaded, again, small))
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key])
            assert relative_error(tensor, third[key]) < 1e-6  # kernels differ with the alignment of memory


def auto_class(model: PreTrainedModel) -> Any:
    """The Auto class that maps a model's class."""
    tasks = ("ImageTextToText", "DepthEstimation", "SemanticSegmentation", "UniversalSegmentation", "Vision2Seq", "")
    for task in tasks:
        found = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel", None)
        names = {} if found is None else found._model_mapping._model_mapping
        if type(model).__name__ in names.get(model.config.model_type, ()):
            return found
    raise AssertionError(type(model))


# ---------------------------------------------------------------------- refusals
def test_a_model_without_a_known_tower_lists_what_was_looked_at() -> None:
    config = UperNetConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage1", "stage2"]
        ),
        hidden_size=32,
        auxiliary_in_channels=8,
        auxiliary_loss_weight=0.0,
        use_auxiliary_head=False,
    )
    model = UperNetForSemanticSegmentation(config)
    assert towers(model) == {}
    for call in (
        lambda: PruningPlan.random(model, 0.5),
        lambda: count(model),
        lambda: truncate(model, 1),
    ):
        with pytest.raises(UnsupportedModelError, match="looked at models of type resnet, upernet"):
            call()


def test_parts_that_do_not_exist() -> None:
    model = made("CLIP")[0]
    with pytest.raises(UnsupportedModelError, match=r"has no part 'backbone': .*'vision' \(clip_vision_model"):
        PruningPlan.random(model, 0.5, part="backbone")
    plan = PruningPlan.random(model, 0.4, UNITS["all"], part="vision")
    with pytest.raises(UnsupportedModelError, match="has no part 'vision'"):
        prune(made("UperNet")[0], plan)
    other = llava()[0]
    with pytest.raises(InvalidPlanError, match="another shape"):
        prune(other, PruningPlan.random(made("PaliGemma")[0], 0.4, UNITS["all"]))
    assert PruningPlan.from_dict(plan.to_dict()).part == "vision"


def test_a_plan_of_the_tower_by_itself_and_of_its_part() -> None:
    """The tower's own plan prunes it in place of its part's, and the other way round."""
    model, inputs = captioner()
    alone = PruningPlan.random(model.encoder, 0.4, UNITS["all"])
    plan = PruningPlan.random(model, 0.4, UNITS["all"])
    assert (alone.part, plan.part) == (None, "encoder") and alone.layers == plan.layers
    ours, theirs = prune(model, alone), prune(model, plan)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert relative_error(outputs(ours, inputs)["logits"], outputs(theirs, inputs)["logits"]) == 0


def test_models_with_heads_of_the_users_own() -> None:
    """A torch module of the user's around a tower; what reads a narrower one is not known."""

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = make("ViTModel")
            self.score = nn.Linear(32, 1)

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return {"score": self.score(self.tower(pixel_values).last_hidden_state)}

    model, inputs = Scored().eval(), {"pixel_values": pixels()}
    assert towers(model)["tower"].path == "tower"
    plan = PruningPlan.random(model, 0.4, UNITS["all"])
    small = prune(model, plan)
    assert type(small) is Scored and small.score is model.score
    compare(small, mask(model, plan), inputs)
    plan = PruningPlan.random(model, 0.4, UNITS["embedding"])
    for call in (prune, mask):
        with pytest.raises(UnsupportedUnitError, match="no transformers model"):
            call(model, plan)


def test_q_k_of_other_widths_stay_in_stock_hosts() -> None:
    """CLIP's twin takes shapes that no stock class can hold, and narrows its projection with the tower."""
    model, inputs = dual("CLIP")()
    small = prune(model, PruningPlan.random(model, 0.4, ["embedding", "qk"], part="vision"))
    assert type(small).__name__ == "PrunedCLIPModel"
    assert small.visual_projection.in_features < model.visual_projection.in_features
    with torch.no_grad():
        assert small.get_image_features(pixel_values=pixels()) is not None
    with pytest.raises(UnsupportedUnitError, match="'wings'"):
        PruningPlan.random(model, 0.4, ["wings"], part="vision")
    assert outputs(small, inputs)["image_embeds"].shape == outputs(model, inputs)["image_embeds"].shape

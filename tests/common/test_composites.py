"""Towers inside bigger models: pruned with everything else shared, saved and loaded as the bigger model."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

from hf_vitprune import (
    OneShotScores,
    PruningPlan,
    SLSConfig,
    VTPConfig,
    count,
    get_pruning_model,
    mask,
    prune,
    select_layers,
    towers,
    truncate,
)
from hf_vitprune.compensate import compensate_plan
from hf_vitprune.errors import (
    InvalidDataError,
    InvalidPlanError,
    UnsupportedModelError,
    UnsupportedUnitError,
    VitPruneError,
)
from hf_vitprune.methods import OneShotSettings
from hf_vitprune.spec.architecture import Architecture
from plans import pruning_plans
from processes import ROOT, run_python
from tiny import LargestTensor, make, relative_error, reset_weights
from tiny_composites import COMPOSITES, auto_class, captioner, dual, llava, outputs, pixels, vip_llava

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
    ("RF-DETR", "layers"): "no prunable unit 'layers'.*out_features",
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
        if set(UNITS[units]) <= set(source.units) | {"layers"}:
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
        lambda: PruningPlan.magnitude(model, 0.5),
        lambda: Architecture.of(model),
        lambda: OneShotScores.measure(model, pixels()),
        lambda: get_pruning_model(model, VTPConfig(target=0.5)),
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
    for call in (
        lambda: prune(model, plan.of_part("text")),  # of another part
        lambda: mask(model, plan.of_part("text")),
    ):
        with pytest.raises(InvalidPlanError, match="this clip_text_model of 2 layers"):
            call()
    for call in (
        lambda: truncate(model, 1, part="wings"),
        lambda: count(model, part="wings"),
        lambda: Architecture.of(model, "wings"),
        lambda: OneShotScores.measure(model, pixels(), part="wings"),
        lambda: select_layers(model, {"pixel_values": pixels(), "labels": torch.arange(2)}, part="wings"),
        lambda: prune(model, plan.of_part("wings")),
    ):
        with pytest.raises(UnsupportedModelError, match="has no part 'wings': choose one with part="):
            call()


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


# ---------------------------------------------------------------------- layers that nobody reads
@pytest.mark.parametrize("name", ["LLaVA", "LLaVA-NeXT"])
def test_unused_layers_are_dropped_exactly(name: str, tmp_path: Path) -> None:
    model, inputs, expected = made(name)
    shorter = truncate(model, "unused")
    assert shorter.config.vision_feature_layer == -1 and towers(shorter)["vision"].layers == 3
    assert torch.equal(outputs(shorter, inputs)["logits"], expected["logits"])
    with pytest.raises(InvalidPlanError, match="every one of the 3 layers is read"):
        truncate(shorter, "unused")
    shorter.save_pretrained(tmp_path)
    assert type(shorter.get_submodule(towers(shorter)["vision"].path)).__module__.startswith("transformers.")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path).eval(), inputs)["logits"], expected["logits"])


def test_unused_layers_of_a_list_of_layers() -> None:
    """Negative numbers and others: each names the same layer as before."""
    model, inputs = vip_llava([-3, -2, 1])
    shorter = truncate(model, "unused")
    assert shorter.config.vision_feature_layer == [-2, -1, 1]
    assert torch.equal(outputs(shorter, inputs)["logits"], outputs(model, inputs)["logits"])
    with pytest.raises(InvalidPlanError, match=r"removes layer 1 .*config.vision_feature_layer"):
        prune(model, PruningPlan.dense(model).keep_layers([0, 2, 3]))
    with pytest.raises(InvalidPlanError, match="removes layer 2, whose output this model reads"):
        truncate(made("UperNet")[0], 2)


# ---------------------------------------------------------------------- scores, and what a processor makes
def test_one_shot_of_a_tower() -> None:
    """From the whole model's batches; scores of the part are those of the tower by itself."""
    model, inputs, _ = made("LLaVA")
    rows = [{name: value[i % 2] for name, value in inputs.items()} for i in range(6)]
    settings_ = OneShotSettings(statistics=True)
    scores = OneShotScores.measure(model, rows, settings_, part="vision")
    alone = OneShotScores.measure(model.model.vision_tower, inputs["pixel_values"].repeat(3, 1, 1, 1), settings_)
    assert scores.tensors.keys() == alone.tensors.keys() and scores.fingerprint == alone.fingerprint
    assert all(torch.allclose(t, alone.tensors[n], rtol=1e-3, atol=1e-6) for n, t in scores.tensors.items())
    plan = scores.plan(0.6, round_to=1)
    assert plan.part == "vision"
    sliced = outputs(prune(model, plan), inputs)["logits"]
    fitted = [prune(model, plan, calibration=rows), prune(model, scores.compensate(model, plan))]
    fitted += [prune(model, compensate_plan(model, plan, rows))]
    dense = outputs(model, inputs)["logits"]
    for small in fitted:
        assert relative_error(outputs(small, inputs)["logits"], dense) < relative_error(sliced, dense)
    with pytest.raises(InvalidDataError, match="other weights"):
        scores.check(llava_with_other_weights())


def llava_with_other_weights() -> Any:
    return reset_weights(llava()[0], seed=1)


def test_layers_are_selected_in_a_tower() -> None:
    """No layer under the highest that is read is looked at; without such fields, all are."""
    images = {"pixel_values": pixels(12), "labels": torch.arange(12) % 2}
    selection = select_layers(made("LLaVA")[0], images, SLSConfig(perplexity=3))
    assert set(selection.scores) <= {3, 4} and selection.layers == 4
    alone = select_layers(made("CLIP")[0].vision_model, images, SLSConfig(perplexity=3))
    assert select_layers(made("CLIP")[0], images, SLSConfig(perplexity=3), part="vision") == alone


# ---------------------------------------------------------------------- memory
def test_the_language_model_is_not_touched() -> None:
    """It may be on the meta device, where nothing could be copied, and no tensor as large as one of its is made."""
    model, inputs = llava()
    language = model.model.language_model
    ours = {n: t.data_ptr() for n, t in language.state_dict().items()}
    small = prune(model, PruningPlan.random(model, 0.4, UNITS["all"]))
    assert {n: t.data_ptr() for n, t in small.model.language_model.state_dict().items()} == ours
    assert small.model.language_model is language
    config = copy.deepcopy(model.config)
    config.text_config.vocab_size, config.text_config.hidden_size = 32_000, 512
    with torch.device("meta"):
        large = type(model)(config)
    large.model.vision_tower = model.model.vision_tower
    plan = PruningPlan.random(large, 0.4, UNITS["all"])
    with LargestTensor() as made_:
        small = prune(large, plan)
    assert made_.real <= 16 * 32 * 48
    assert small.model.language_model.embed_tokens.weight is large.model.language_model.embed_tokens.weight
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in prune(half, plan_of(half)).parameters()} == {torch.bfloat16}


def plan_of(model: Any) -> PruningPlan:
    return PruningPlan.random(model, 0.4, UNITS["all"])


@pytest.mark.slow
def test_the_zero_shot_example() -> None:
    """A few steps: every line is there, and the cost is what was asked for."""
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    small = ["--steps", "3", "--images", "32", "--test-images", "40"]
    printed = run_python(code, str(ROOT / "examples" / "prune_clip_zero_shot.py"), *small).splitlines()
    assert printed[0].startswith("dense: zero-shot accuracy")
    shares = [int(line.partition("%")[0]) / 100 for line in printed[1:]]
    assert len(shares) == 3 and all(0.9 * t < s <= t for s, t in zip(shares, (0.75, 0.5, 0.35), strict=True))


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_stock_hosts_refuse_pruned_towers_and_say_why(name: str, tmp_path: Path) -> None:
    """Without the attention of one layer, every tensor that is there fits the stock class."""
    model, _ = dual(name)()
    plan = PruningPlan.dense(model, part="vision")
    small = prune(model, plan.with_layers([plan.layers[0].with_mixer("none"), *plan.layers[1:]]))
    small.save_pretrained(tmp_path)
    for loose in (False, True):
        with pytest.raises(Exception, match="pruned with hf_vitprune: import hf_vitprune before loading"):
            type(model).from_pretrained(tmp_path, ignore_mismatched_sizes=loose)
    loaded = type(small).from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in small.state_dict().items())

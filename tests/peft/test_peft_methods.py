"""Convpass and RepAdapter: they start as nothing, train, merge (or say why not), and outlive pruning and disks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from hf_vitprune import SLSConfig, VTPConfig, get_pruning_model
from hf_vitprune.errors import AdapterError, InvalidConfigError, UnsupportedModelError
from hf_vitprune.peft import ConvpassConfig, RepAdapterConfig
from hf_vitprune.peft.kinds.convpass import patch_grid
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune, truncate
from plans import PLANS
from tiny import CLASSIFIERS, assert_same, images, make, relative_error, run, total_loss
from tiny_adapters import randomize

VIT, SWIN = "ViTForImageClassification", "SwinForImageClassification"
BOTH: dict[str, Any] = {"convpass": ConvpassConfig, "repadapter": RepAdapterConfig}
FITTING = [(case, kind) for case in CLASSIFIERS for kind in BOTH if "Swinv2" not in case or kind == "repadapter"]


def wrap(case: str, kind: str, **settings: Any) -> Any:
    """With the classifier trained along, adapter weights still fresh."""
    return get_peft_model(make(case), BOTH[kind](r=4, modules_to_save=["classifier"], **settings)).eval()


@pytest.mark.parametrize(("case", "kind"), FITTING)
def test_nothing_at_first_and_then_trained(case: str, kind: str) -> None:
    model = wrap(case, kind, dropout=0.0)
    assert_same(run(model), run(make(case)))
    fresh = {name: p.clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # the down-projection has a gradient once the up-projection is not zero
        optimizer.zero_grad()
        total_loss(model.train()).backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, fresh[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    layers = len(PruningPlan.dense(model).layers)
    assert len({name.partition(f".{kind}_")[0] for name in changed if f".{kind}_" in name}) == 2 * layers


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_repadapter_merges(case: str) -> None:
    model = randomize(wrap(case, "repadapter", scale=0.7))
    stock, expected = make(case), run(model)["logits"]
    model.merge_adapter(safe_merge=True)
    assert relative_error(run(model)["logits"], expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(run(model)["logits"], expected)
    merged = model.merge_and_unload()
    assert relative_error(run(merged)["logits"], expected) < 1e-5
    assert {n: t.shape for n, t in merged.state_dict().items()} == {n: t.shape for n, t in stock.state_dict().items()}


@torch.no_grad()
def test_repadapter_by_hand() -> None:
    """The layer computes ``branch(x + s * up(down(x)))`` with an up-projection of two halves."""
    model = randomize(wrap(VIT, "repadapter", scale=0.7))
    layer = model.get_base_model().vit.layers[1].mlp
    x = torch.randn(2, 5, 32)
    hidden = layer.repadapter_down["default"](x)
    weight, bias = layer.repadapter_up["default"].weight, layer.repadapter_up["default"].bias
    up = torch.cat([hidden[..., :2] @ weight[:16].T, hidden[..., 2:] @ weight[16:].T], -1) + bias
    assert relative_error(layer(x), layer.base_layer(x + 0.7 * up)) < 1e-6


@torch.no_grad()
def test_convpass_by_hand() -> None:
    """Patches see their neighbours; each token that is no patch is an image of one pixel."""
    model = randomize(wrap("DeiTForImageClassification", "convpass", scale=0.7))
    layer = model.get_base_model().deit.layers[1].mlp
    x = torch.randn(2, 6, 32)
    down, conv, up = (getattr(layer, f"convpass_{name}")["default"] for name in ("down", "conv", "up"))
    hidden = F.gelu(down(x))
    out = torch.empty_like(hidden)
    for token in range(2):
        out[:, token] = conv(hidden[:, token, :, None, None])[..., 0, 0]
    grid = conv(hidden[:, 2:].transpose(1, 2).reshape(2, 4, 2, 2))
    for i in range(4):
        out[:, 2 + i] = grid[:, :, i // 2, i % 2]
    expected = layer.base_layer(x) + 0.7 * up(F.gelu(out))
    assert relative_error(layer(x), expected) < 1e-6


def test_convpass_grids() -> None:
    assert (
        patch_grid(196, (14, 14)) == (14, 14) and patch_grid(8, (1, 2)) == (2, 4) and patch_grid(6, (3, 2)) == (3, 2)
    )
    for patches, own in ((8, (14, 14)), (196, (1, 2)), (5, (1, 5 * 5))):
        with pytest.raises(AdapterError, match="aspect ratio"):
            patch_grid(patches, own)
    model = randomize(wrap(VIT, "convpass"))
    assert run(model, images(size=32), interpolate_pos_encoding=True)["logits"].isfinite().all()
    with pytest.raises(AdapterError, match="aspect ratio"):
        run(model, images(size=(16, 32)), interpolate_pos_encoding=True)


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_convpass_by_hand_on_the_whole_grid_of_swin(shifted: bool) -> None:
    """A 5 x 3 grid of windows of 2: the bypass beside attention sees no windows, no shift and no padding."""
    model = randomize(wrap(SWIN, "convpass", scale=0.7)).double()
    adapted = model.get_base_model().swin.encoder.layers[0].blocks[int(shifted)]
    attention, mlp = adapted.attention, adapted.mlp
    plain = copy.deepcopy(model).unload().swin.encoder.layers[0].blocks[int(shifted)]
    x = torch.randn(2, 15, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def bypass(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
        down, conv, up = (getattr(layer, f"convpass_{name}")["default"] for name in ("down", "conv", "up"))
        hidden = F.pad(F.gelu(down(tokens)).reshape(2, 5, 3, 4), (0, 0, 1, 1, 1, 1))
        out = sum(hidden[:, i : i + 5, j : j + 3] @ conv.weight[:, :, i, j].T for i in range(3) for j in range(3))
        return 0.7 * up(F.gelu((out + conv.bias).reshape(2, 15, 4)))

    plain.mlp = nn.Sequential(nn.Linear(16, 16)).double()  # what is added behind the attention is then known
    nn.init.zeros_(plain.mlp[0].weight)
    nn.init.zeros_(plain.mlp[0].bias)
    attended = plain(x, (5, 3))[0] + bypass(attention, plain.layernorm_before(x))
    normed = adapted.layernorm_after(attended)
    expected = attended + mlp.base_layer(normed) + bypass(mlp, normed)
    assert relative_error(adapted(x, (5, 3))[0], expected) < 1e-12
    assert attention.place.tokens is None and (plain.shift_size > 0) == shifted


def test_convpass_leaves_no_trace_in_swin(tmp_path: Path) -> None:
    model = randomize(wrap(SWIN, "convpass"))
    expected, other = run(model), run(model, images(size=(24, 40)))
    copied = copy.deepcopy(model)
    hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert hooks
    bare = model.unload()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bare.modules())
    assert_same(run(copied), expected)  # a copy looks at its own grids
    assert relative_error(run(copied, images(size=(24, 40)))["logits"], other["logits"]) == 0
    with copied.disable_adapter():
        assert_same(run(copied), run(make(SWIN)))
    copied.get_base_model().gradient_checkpointing_enable()
    total_loss(copied.train()).backward()
    assert all(p.grad is not None for p in copied.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", BOTH)
def test_more_than_one_adapter(kind: str) -> None:
    model = randomize(get_peft_model(make(VIT), BOTH[kind](r=4))).eval()
    one = run(model)["logits"]
    model.add_adapter("second", BOTH[kind](r=6, scale=0.5, target_modules=["mlp"]))
    assert torch.equal(run(model)["logits"], one)
    model.set_adapter("second")
    randomize(model, seed=4)
    two = run(model)["logits"]
    assert relative_error(two, one) > 1e-2
    model.base_model.set_adapter(["default", "second"])
    both = run(model)["logits"]
    assert relative_error(both, one) > 1e-2 and relative_error(both, two) > 1e-2
    if kind == "repadapter":
        assert relative_error(run(copy.deepcopy(model).merge_and_unload())["logits"], both) < 1e-5
    with model.disable_adapter():
        assert_same(run(model), run(make(VIT)))
    model.base_model.set_adapter("default")
    assert torch.equal(run(model)["logits"], one)
    with pytest.raises(AdapterError, match="choose one with set_adapter, not by image"):  # which PEFT would drop
        model(pixel_values=images(), adapter_names=["default"] + ["second"] * (len(images()) - 1))
    model.delete_adapter("second")
    assert torch.equal(run(model)["logits"], one)
    assert_same(run(model.unload()), run(make(VIT)))


@pytest.mark.parametrize(("case", "kind"), [row for row in FITTING if row[0][:4] in ("ViTF", "Swin", "CLIP")])
def test_on_disk(case: str, kind: str, tmp_path: Path) -> None:
    make(case).save_pretrained(tmp_path / "dense")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    model = randomize(get_peft_model(dense, BOTH[kind](r=4, modules_to_save=["classifier"]))).eval()
    expected = run(model)
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(f".{kind}_" in key or "classifier" in key for key in keys)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert_same(run(PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()), expected)
    assert_same(run(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").eval()), expected)


# ---------------------------------------------------------------------- pruning
@pytest.mark.parametrize("units", ["heads", "qk", "v", "mlp", "embedding", "layers"])
@pytest.mark.parametrize("case", [VIT, "Dinov2ForImageClassification-swiglu", "SwinForImageClassification"])
def test_pruned_repadapter(case: str, units: str) -> None:
    model = randomize(wrap(case, "repadapter"))
    if units == "embedding" and "Swin" in case:
        return
    plan = PruningPlan.random(model, 0.4, [units])
    small = prune(model, plan)
    assert relative_error(run(small)["logits"], run(mask(model, plan))["logits"]) < 1e-5
    merged = "repadapter" not in " ".join(small.state_dict())
    assert merged == (units == "embedding")  # where inputs go, it is merged; else it trains on


@pytest.mark.parametrize("units", ["heads", "qk", "v", "mlp"])
def test_pruned_inside_of_convpass(units: str) -> None:
    """The bypass runs beside the branch: what is cut inside of it is the branch's own business."""
    model = randomize(wrap(VIT, "convpass"))
    plan = PruningPlan.random(model, 0.4, [units])
    base = model.get_base_model()
    masked = mask(base_without(model), plan)
    expected = copy.deepcopy(model)
    for mine, theirs in zip(expected.get_base_model().vit.layers, masked.vit.layers, strict=True):
        mine.attention.base_layer.load_state_dict(theirs.attention.state_dict())
        mine.mlp.base_layer.load_state_dict(theirs.mlp.state_dict())
    assert relative_error(run(prune(model, plan))["logits"], run(expected)["logits"]) < 1e-5
    assert base is model.get_base_model()


def base_without(model: Any) -> Any:
    return copy.deepcopy(model).unload()


@pytest.mark.parametrize("plan_name", ["everything", "narrow inputs", "removed branches"])
@pytest.mark.parametrize("kind", BOTH)
def test_on_pruned_models(kind: str, plan_name: str, tmp_path: Path) -> None:
    """Adapters go on a pruned model as on a stock one; its branches take whatever channels the stream has."""
    small = prune(make(VIT), PLANS[plan_name](PruningPlan.dense(make(VIT))))
    small.save_pretrained(tmp_path / "small")
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    expected = run(small)
    model = get_peft_model(small, BOTH[kind](r=4, groups=1) if kind == "repadapter" else BOTH[kind](r=4)).eval()
    assert_same(run(model), expected)
    expected = run(randomize(model))
    model.save_pretrained(str(tmp_path / "adapter"))
    assert_same(run(AutoModelForImageClassification.from_pretrained(tmp_path / "adapter").eval()), expected)
    if kind == "repadapter" and plan_name == "narrow inputs":
        with pytest.raises(AdapterError, match="reads only some channels"):
            model.merge_and_unload()
    elif kind == "repadapter":
        assert relative_error(run(model.merge_and_unload())["logits"], expected["logits"]) < 1e-5


def test_gates_around_repadapter() -> None:
    """A gate before the adapter is a gate before the merged weights: the gated model and the small one are equal."""
    gated = get_pruning_model(randomize(wrap(VIT, "repadapter")), VTPConfig(pruning_ratio=0.4))
    generator = torch.Generator().manual_seed(1)
    for parameter in gated.method.gate_parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.1
    gated.decide()
    small = gated.export()
    assert "pruned_vit" in small.config.model_type
    assert relative_error(run(gated.eval())["logits"], run(small.eval())["logits"]) < 1e-5


@pytest.mark.parametrize(
    ("case", "kind", "kept"), [(VIT, "repadapter", 2), (VIT, "convpass", 2), (SWIN, "convpass", 4)]
)
def test_layers_removed_by_a_method(case: str, kind: str, kept: int) -> None:
    """Methods that remove layers only take both, and keep the adapters of the layers that stay."""
    model = randomize(wrap(case, kind))
    gated = get_pruning_model(model, SLSConfig()).eval()
    gated.method.keep(kept)  # type: ignore[operator]
    small = truncate(model, kept)
    assert small.peft_type == f"VITPRUNE_{kind.upper()}"
    assert_same(run(small), run(gated))
    layers = {name.partition(f".{kind}_")[0].rpartition(".")[0] for name in small.state_dict() if f".{kind}_" in name}
    assert len(layers) == kept


def test_convpass_refusals() -> None:
    model = randomize(wrap(VIT, "convpass"))
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(AdapterError, match="cannot be merged"):
            call()
    run(model)  # still whole
    with pytest.raises(AdapterError, match="cannot be sliced"):
        prune(model, PruningPlan.random(model, 0.4, ["embedding"]))
    with pytest.raises(AdapterError, match="merged"):
        mask(model, PruningPlan.random(model, 0.4, ["mlp"]))
    with pytest.raises(AdapterError, match="would be lost"):
        prune(model, PLANS["removed branches"](PruningPlan.dense(model)))
    with pytest.raises(AdapterError, match="whole layers"):
        get_pruning_model(model, VTPConfig(pruning_ratio=0.4))


@pytest.mark.parametrize(
    ("case", "why"),
    {
        "Swinv2ForImageClassification": "sees windows of it",
        "RfDetrDinov2Backbone": "other tokens",
        "ViTMAEModel": "other tokens",
        "VideoMAEForVideoClassification": "reads frames of videos",
        "Siglip2VisionModel": "reads patches of images of any shape",
        "CLIPTextModel": "reads text",
        "Data2VecVisionForImageClassification": "beside its attention",
        "VitPoseBackbone": "beside its attention",
    }.items(),
)
def test_convpass_needs_a_grid_and_whole_branches(case: str, why: str) -> None:
    with pytest.raises(AdapterError, match=why):
        get_peft_model(make(case), ConvpassConfig())


@pytest.mark.parametrize("kind", BOTH)
def test_bad_settings(kind: str) -> None:
    for settings in ({"r": 0}, {"r": 2.5}, {"scale": 0}, {"scale": "1"}, {"dropout": 1.0}, {"dropout": None}):
        with pytest.raises(InvalidConfigError):
            BOTH[kind](**settings)
    own = [{"activation": "none"}, {"initial": "zeros"}]
    for settings in own if kind == "convpass" else [{"groups": 0}, {"groups": 3}, {"groups": 2.0}]:
        with pytest.raises(InvalidConfigError):
            BOTH[kind](**settings)
    with pytest.raises(AdapterError, match="attention and MLP"):
        get_peft_model(make(VIT), BOTH[kind](target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="no family"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), BOTH[kind]())

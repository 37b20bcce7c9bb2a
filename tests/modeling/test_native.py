"""Export to stock classes: same outputs, readable without this library, and a reason wherever it is impossible."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_vitprune.errors import NativeExportError
from hf_vitprune.modeling import build
from hf_vitprune.modeling.native import native_config, to_native
from hf_vitprune.modeling.pretrained import PrunedModelMixin
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.architecture import Architecture
from plans import without_a_layer
from quick import mostly_slow
from tiny import ALL_LAYERS, CASES, images, make, relative_error, reset_weights, run

SIZES = ["heads", "qk", "v", "mlp"]
SWIN = [name for name in CASES if name.startswith("Swin")]
WHOLE_LAYERS = ["SwinForImageClassification", "SiglipForImageClassification"]
#: stems of classes whose stock configs honour head_dim (ViT-MAE's decoder would take it, too)
FREE = ("ViTF", "ViTModel", "ViTMSN", "IJepa", "DeiT", "Dinov2", "Pixio", "Radio")
#: transformers does not load it as it saved it
NOT_STOCK = ("PixioBackbone",)
FREE_SIZES = [name for name in CASES if name.startswith(FREE) and name not in NOT_STOCK]


def pruned(name: str, units: list[str], ratio: float = 0.5, **changes: object) -> PreTrainedModel:
    model = make(name, **changes)
    return prune(model, PruningPlan.random(model, ratio, units), stock=False)


def assert_native(small: PreTrainedModel, tolerance: float = 1e-5) -> PreTrainedModel:
    native = to_native(small)
    assert type(native).__module__.startswith("transformers.models.")
    assert type(native).__name__ == type(small).__name__.removeprefix("Pruned")
    assert not {"pruning_config", "auto_map"} & native.config.to_dict().keys()
    expected, actual = run(small), run(native)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= tolerance, key
    return native


def without_layers(name: str) -> PreTrainedModel:
    model = make(name)
    return prune(model, without_a_layer(model), stock=False)


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*NOT_STOCK, ALL_LAYERS)])
def test_layers_removed(name: str) -> None:
    small = without_layers(name)
    native = assert_native(small, tolerance=0.0)
    layers = Architecture.of(native).layers
    assert len(layers) == len(Architecture.of(small).layers) < len(Architecture.of(make(name)).layers)


@pytest.mark.parametrize("units", [SIZES, ["qk", "v"], ["heads"], [*SIZES, "layers"]], ids="+".join)
@pytest.mark.parametrize("name", FREE_SIZES)
def test_uniform_sizes(name: str, units: list[str]) -> None:
    if "swiglu" in name:
        units = [unit for unit in units if unit != "mlp"]  # an MLP of 48: no smaller whole ratio makes half of it
    if name.endswith("Backbone"):
        units = [unit for unit in units if unit != "layers"]
    assert_native(pruned(name, units))


@pytest.mark.parametrize("name", ["ViTModel", "DeiTForImageClassificationWithTeacher", "Dinov2ForImageClassification"])
def test_narrower_residual_stream(name: str) -> None:
    model = make(name)
    plan = PruningPlan.random(model, 0.5, ["heads", "mlp", "embedding"], round_to=8)
    if "Dinov2" in name:
        plan = PruningPlan.random(model, 0.5, ["embedding", "mlp"])  # mlp_ratio stays whole
    assert_native(prune(model, plan, stock=False))


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"])
def test_clip_widths(name: str) -> None:
    assert_native(pruned(name, ["mlp"]))
    model = make(name)
    # width 16 with 4 heads of 4: what a stock CLIP of that width has
    assert_native(prune(model, PruningPlan.random(model, 0.5, ["qk", "v", "embedding"]), stock=False))
    with pytest.raises(NativeExportError, match="head_dim = hidden_size / heads, here 2 heads of 8 at width 32"):
        to_native(pruned(name, ["heads"]))


def test_siglip_sizes_only_without_its_pooling_head() -> None:
    assert_native(pruned("SiglipVisionModel-headless", ["mlp"]))
    assert_native(pruned("SiglipVisionModel-headless", ["qk", "v", "embedding", "mlp"]))
    for name in ("SiglipVisionModel", "SiglipForImageClassification"):
        for units in (["mlp"], ["qk", "v", "embedding"], ["heads", "embedding"]):
            with pytest.raises(NativeExportError, match="pooling head"):
                to_native(pruned(name, units))


def test_swin_takes_whole_layers_in_turn() -> None:
    model = make("SwinForImageClassification", depths=[2, 4])
    dense = PruningPlan.dense(model)
    assert_native(prune(model, dense.keep_layers([0, 1, 2, 5]), stock=False), tolerance=0.0)
    with pytest.raises(NativeExportError, match="layer 3 has plain windows.*shifted ones at place 1 of stage 1"):
        to_native(prune(model, dense.keep_layers([0, 1, 2, 4])))
    with pytest.raises(NativeExportError, match="layer 0 has heads 1, .*stage 0 have 2; only whole layers"):
        to_native(prune(model, PruningPlan.random(model, 0.5, ["heads"])))


def test_each_reason_is_named() -> None:
    model = make("ViTForImageClassification")
    plan = PruningPlan.dense(model)

    def reason(index: int, **changes: object) -> str:
        layers = [replace(entry, **changes) if entry.index == index else entry for entry in plan.layers]
        with pytest.raises(NativeExportError) as caught:
            to_native(prune(model, plan.with_layers(layers)))
        return str(caught.value)

    eight = tuple(range(8))
    assert reason(1, mixer="none", heads=(), qk=(), v=()).startswith("layer 1 has no attention")
    assert reason(2, mlp=()).startswith("layer 2 has no MLP")
    assert reason(2, mlp=eight).startswith("layer 2 has mlp 8, layer 0 has 48")
    assert reason(0, qk=(eight[:4],) * 4).startswith("layer 0 has qk_dim 4 and v_dim 8")
    assert reason(1, heads=(0, 1), qk=(eight,) * 2, v=(eight,) * 2).startswith("layer 1 has heads 2, layer 0 has 4")
    assert "attention of layer 0 reads 8 of 32 channels (attention_in)" in reason(0, attention_in=eight)
    assert "MLP of layer 1 reads 8 of 32 channels (mlp_in)" in reason(1, mlp_in=eight)
    with pytest.raises(NativeExportError, match="whole mlp_ratio, and none makes an MLP of 40 at width 32"):
        to_native(pruned("Dinov2ForImageClassification", ["mlp"], ratio=3 / 8))
    with pytest.raises(NativeExportError, match="merge the adapters"):
        to_native(get_peft_model(pruned("ViTModel", ["heads"]), LoraConfig(target_modules=["q_proj"])))


def test_merged_adapters_are_plain() -> None:
    tuned = get_peft_model(pruned("ViTForImageClassification", SIZES), LoraConfig(target_modules=["q_proj", "fc1"]))
    reset_weights(tuned)
    assert_native(tuned.merge_and_unload())


@pytest.mark.parametrize("name", mostly_slow(name for name in CASES if name not in (*NOT_STOCK, ALL_LAYERS)))
def test_prune_gives_what_to_native_gives(name: str) -> None:
    model = make(name)
    plan = without_a_layer(model)
    small, native = prune(model, plan), to_native(prune(model, plan, stock=False))
    assert type(small) is type(native) is type(model)
    assert small.config.to_dict() == native.config.to_dict()
    assert all(torch.equal(tensor, native.state_dict()[key]) for key, tensor in small.state_dict().items())
    assert isinstance(prune(small, PruningPlan.random(small, 0.5, ["mlp"]), stock=False), PrunedModelMixin)


def test_added_tensors_are_named() -> None:
    small = pruned("ViTForImageClassification", SIZES)
    small.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NativeExportError, match="in only one of the pruned and the stock encoder"):
        to_native(small)
    small = pruned("ViTForImageClassification", SIZES)
    small.classifier = torch.nn.Linear(32, 9)
    native = to_native(small)  # a head of the user's is the user's own matter
    assert native.classifier.out_features == 9
    assert relative_error(run(native)["logits"], run(small)["logits"]) < 1e-5


def test_wide_and_narrow_layers_need_not_divide() -> None:
    config = make("ViTModel").config
    layer = {"heads": 3, "qk_dim": 10, "v_dim": 10, "mlp": 7}
    small = build(config, Architecture.from_layers(config, [layer] * 2, hidden_size=13)).eval()
    reset_weights(small)
    native = assert_native(small)
    assert (native.config.head_dim, native.config.num_attention_heads, native.config.hidden_size) == (10, 3, 13)
    assert native_config(Architecture.of(small)).hidden_size == 13


def test_what_is_kept() -> None:
    model = make("ViTForImageClassification").to(torch.bfloat16).train()
    model.config.id2label = {i: f"kind {i}" for i in range(5)}
    model.vit.embeddings.requires_grad_(False)
    model.set_attn_implementation("eager")
    small = prune(model, PruningPlan.random(model, 0.5, SIZES), stock=False)
    native = to_native(small)
    assert native.training and native.dtype == torch.bfloat16 and native.config.id2label[3] == "kind 3"
    assert native.config._attn_implementation == "eager"
    assert (
        {n for n, p in native.named_parameters() if not p.requires_grad}
        == {n for n, p in small.named_parameters() if not p.requires_grad}
        != set()
    )
    pointers = {p.data_ptr() for p in small.parameters()}
    assert not any(p.data_ptr() in pointers for p in native.parameters())
    assert not any(b.device.type == "meta" for b in native.buffers())


def test_stock_models_pass_through() -> None:
    model = make("DeiTForImageClassification")
    assert to_native(model) is model


def test_base_model_without_pooler() -> None:
    from transformers import ViTModel

    model = ViTModel(CASES["ViTModel"].config(), add_pooling_layer=False).eval()
    assert_native(prune(model, PruningPlan.random(model, 0.5, SIZES), stock=False))


PLAIN_LOAD = """
import sys
from pathlib import Path
import torch
import transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)  # as in the tests: other numbers of threads add up in another order
for folder in Path("models").iterdir():
    model = getattr(transformers, sys.argv[1] if "Backbone" in folder.name else sys.argv[2]).from_pretrained(folder)
    for parameter in model.parameters():  # tensors in a mapped file are not aligned, which changes kernels too
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        output = model.eval()(load_file("in.safetensors")["pixels"])
    tensors = output.feature_maps if "feature_maps" in output else output[:1]
    save_file({str(i): tensor.contiguous() for i, tensor in enumerate(tensors)}, folder / "out.safetensors")
assert "hf_vitprune" not in sys.modules
"""


def test_loads_in_plain_transformers(tmp_path: Path) -> None:
    expected = {}
    for name in ("ViTForImageClassification", "Dinov2Backbone", *WHOLE_LAYERS):
        native = to_native(without_layers(name) if name in WHOLE_LAYERS else pruned(name, SIZES))
        native.save_pretrained(tmp_path / "models" / name)
        assert {path.name for path in (tmp_path / "models" / name).iterdir()} == {"config.json", "model.safetensors"}
        expected[name] = list(run(native).values())
    save_file({"pixels": images()}, tmp_path / "in.safetensors")
    command = [sys.executable, "-c", PLAIN_LOAD, "Dinov2Backbone", "AutoModelForImageClassification"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, tensors in expected.items():
        loaded = load_file(tmp_path / "models" / name / "out.safetensors")
        assert loaded and all(torch.equal(tensor, tensors[int(i)]) for i, tensor in loaded.items()), name

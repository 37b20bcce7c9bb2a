"""Pruned models in the hands of transformers: every way to save and load them, pipelines, compilation, export."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)

from hf_vitprune import modeling
from hf_vitprune.errors import CheckpointMismatchError, UnsupportedModelError
from hf_vitprune.modeling import pruned_model_class
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune
from hf_vitprune.spec.architecture import Architecture
from plans import every_word, plan_named
from processes import run_python
from quick import mostly_slow
from tiny import CASES, CLASSIFIERS, assert_same, images, make, relative_error, run, total_loss

VIT = "ViTForImageClassification"
ODD = ("padded values", "removed branches", "narrow inputs")


def pruned(case: str = VIT, plan: str = "everything", **changes: Any) -> PreTrainedModel:
    model = make(case, **changes)
    return prune(model, plan_named(plan, model), stock=False)


# ---------------------------------------------------------------------- ways to save and load
@pytest.mark.parametrize("case", ["ViTForImageClassification", "SwinForImageClassification", "SiglipVisionModel"])
def test_sharded(case: str, tmp_path: Path) -> None:
    small = pruned(case)
    small.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(run(type(small).from_pretrained(tmp_path)), run(small))


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_bf16(case: str, tmp_path: Path) -> None:
    small = pruned(case).bfloat16()
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_same(dict(loaded.state_dict()), dict(small.state_dict()))
    as_float = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert as_float.dtype == torch.float32
    assert relative_error(run(as_float)["logits"], run(small.float())["logits"]) < 1e-6


@pytest.mark.parametrize("plan", ["everything", *ODD])
def test_device_map(plan: str, tmp_path: Path) -> None:
    small = pruned(plan=plan)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, device_map="auto")
    assert_same(run(loaded), run(small))


@pytest.mark.parametrize("plan", ["everything", *ODD])
def test_disk_offload(plan: str, tmp_path: Path) -> None:
    small = pruned(plan=plan)
    small.save_pretrained(tmp_path / "model")
    device_map = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    loaded = AutoModelForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(p.device.type == "meta" for p in loaded.parameters())
    assert_same(run(loaded), run(small))


def test_no_pickle_is_read_or_written(tmp_path: Path) -> None:
    small = pruned()
    small.save_pretrained(tmp_path)
    torch.save(small.state_dict(), tmp_path / "pytorch_model.bin")
    for use_safetensors in (False, True):
        (tmp_path / "model.safetensors").rename(tmp_path / "hidden") if use_safetensors else None
        with pytest.raises((CheckpointMismatchError, OSError), match="safetensors"):
            AutoModelForImageClassification.from_pretrained(tmp_path, use_safetensors=use_safetensors)


def test_save_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="needs a folder"):
        pruned().save_pretrained(tmp_path / "file")


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("*.py"))


def test_image_processor_beside_the_model_makes_a_pipeline(tmp_path: Path) -> None:
    small = pruned(id2label={i: f"kind {i}" for i in range(5)}, label2id={f"kind {i}": i for i in range(5)})
    small.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    picture = Image.fromarray(np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3))
    classify = pipeline("image-classification", model=str(tmp_path))
    assert type(classify.model) is type(small)
    found = {row["label"]: row["score"] for row in classify(picture, top_k=5)}
    pixels = ViTImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    expected = run(small, pixels)["logits"].softmax(-1)[0]
    assert found == pytest.approx({f"kind {i}": expected[i].item() for i in range(5)}, abs=1e-6)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_copies(case: str) -> None:
    small = pruned(case)
    assert_same(run(copy.deepcopy(small)), run(small))
    assert_same(run(pickle.loads(pickle.dumps(small))), run(small))


# ---------------------------------------------------------------------- untrained models
@pytest.mark.parametrize("case", CASES)
def test_from_config_has_the_shape_and_fresh_weights(case: str) -> None:
    small = pruned(case)
    fresh = type(small)(small.config).eval()
    assert {n: p.shape for n, p in fresh.state_dict().items()} == {n: p.shape for n, p in small.state_dict().items()}
    assert all(torch.isfinite(tensor).all() for tensor in run(fresh).values())
    for name, buffer in fresh.named_buffers():
        if not name.endswith(("input_index", "qk_index")):
            assert torch.equal(buffer, small.get_buffer(name)), name
    weights = [p for n, p in fresh.named_parameters() if n.endswith(("q_proj.weight", "query.weight", "fc1.weight"))]
    assert weights and all(0.005 < w.std() < 0.5 for w in weights)
    norms = [p for n, p in fresh.named_parameters() if "norm" in n and n.endswith("weight")]
    assert norms and all((p == 1).all() for p in norms)


def test_fresh_weights_follow_the_seed() -> None:
    config = pruned().config
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(AutoModelForImageClassification.from_config(config).vit.layers[0].mlp.fc1.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_from_config_on_the_meta_device_and_in_bf16() -> None:
    config = pruned().config
    with torch.device("meta"):
        assert all(p.device.type == "meta" for p in AutoModelForImageClassification.from_config(config).parameters())
    assert AutoModelForImageClassification.from_config(config, dtype=torch.bfloat16).dtype == torch.bfloat16


# ---------------------------------------------------------------------- between stock and pruned, base and head
@pytest.mark.parametrize(("case", "legacy"), mostly_slow((case, legacy) for case in CASES for legacy in (True, False)))
def test_stock_checkpoints_load_into_pruned_classes(case: str, legacy: bool, tmp_path: Path) -> None:
    """Key names of transformers 4 and 5; the result is the dense model, and can be saved as a pruned one."""
    model = make(case)
    model.save_pretrained(tmp_path / "stock", save_original_format=legacy)
    loaded = pruned_model_class(type(model)).from_pretrained(tmp_path / "stock").eval()
    assert_same(run(copy.deepcopy(loaded)), run(model))  # kernels round otherwise on weights mapped from a file
    loaded.save_pretrained(tmp_path / "again")
    assert_same(run(copy.deepcopy(type(loaded).from_pretrained(tmp_path / "again"))), run(model))


@pytest.mark.parametrize(
    "pair",
    [
        ("ViTModel", "ViTForImageClassification"),
        ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
        ("SwinModel", "SwinForImageClassification"),
        ("Dinov2Model", "Dinov2ForImageClassification"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    ],
)
def test_base_and_head_load_from_one_another(pair: tuple[str, str], tmp_path: Path) -> None:
    base_class, head_class = (getattr(modeling, f"Pruned{name}") for name in pair)
    head = pruned(pair[1])
    head.save_pretrained(tmp_path / "head")
    base = base_class.from_pretrained(tmp_path / "head").eval()
    encoder = getattr(head, head.base_model_prefix)
    assert_same(
        {"last": run(base)["last_hidden_state"]},
        {"last": run(encoder)["last_hidden_state"]},
    )
    base.save_pretrained(tmp_path / "base")
    again = head_class.from_pretrained(tmp_path / "base").eval()
    encoder = getattr(again, again.base_model_prefix)
    assert_same({"last": run(encoder)["last_hidden_state"]}, {"last": run(base)["last_hidden_state"]})


def test_another_number_of_labels(tmp_path: Path) -> None:
    small = pruned()
    small.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert loaded.classifier.weight.shape[0] == 9
    assert torch.equal(loaded.vit.layers[0].mlp.fc1.weight, small.vit.layers[0].mlp.fc1.weight)


# ---------------------------------------------------------------------- loading loudly
def edit_weights(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})


def without(prefix: str) -> Any:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def renamed(old: str, new: str) -> Any:
    return lambda state: state | {n.replace(old, new): t.clone() for n, t in state.items() if old in n}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("vit.layers.2."), "lacks"),
        (without("vit.layers.1.mlp.fc1.bias"), "lacks"),
        (without("vit.embeddings.cls_token"), "lacks"),
        (without("vit.embeddings.patch_embeddings"), "lacks"),
        (without("vit.layernorm."), "lacks"),
        (renamed("vit.layers.2.", "vit.layers.3."), "also holds"),
        (lambda s: s | {"vit.layers.0.mlp.fc1.bias": s["vit.layers.0.mlp.fc1.bias"][:-1].clone()}, "other sizes"),
        (lambda s: {n: t for n, t in s.items() if "classifier" in n}, "lacks"),
    ],
)
@pytest.mark.parametrize("loose", [False, True])
def test_incomplete_checkpoints(change: Any, message: str, loose: bool, tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    edit_weights(tmp_path, change)
    for auto in (AutoModelForImageClassification, AutoModel):
        with pytest.raises(CheckpointMismatchError, match=message) as caught:
            auto.from_pretrained(tmp_path, ignore_mismatched_sizes=loose)
        assert isinstance(caught.value, RuntimeError)


def test_weights_of_another_pruning(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    other = pruned(plan="mlp")
    save_file(dict(other.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for loose in (False, True):
        with pytest.raises(CheckpointMismatchError, match="other sizes"):
            AutoModelForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=loose)


def test_no_pruned_twin() -> None:
    class Unmapped(PreTrainedModel):
        config_class = ViTConfig

    with pytest.raises(UnsupportedModelError, match="no pruned class"):
        pruned_model_class(Unmapped)
    with pytest.raises(UnsupportedModelError, match="no class"):
        modeling.class_for_task(Architecture.of(make(VIT)).family, "ForDepthEstimation")
    with pytest.raises(AttributeError, match="PrunedNothing"):
        modeling.PrunedNothing  # noqa: B018


# ---------------------------------------------------------------------- without the library, or before its import
TRUSTED_LOAD = """
import sys, torch, transformers
from transformers import AutoModelForImageClassification

def refused(trust, error_class, words):
    try:
        AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=trust)
    except error_class as error:
        assert words in str(error), error
    else:
        raise AssertionError("loaded without the library")
    assert "hf_vitprune" not in sys.modules

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vitprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

refused(False, ValueError, "trust_remote_code=True")
sys.meta_path.insert(0, NotInstalled())
refused(True, ImportError, "pip install hf_vitprune")
del sys.meta_path[0]
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "PrunedViTForImageClassification", type(model)
from tiny import run
expected = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(run(model)["logits"], expected)
model.save_pretrained(sys.argv[3])
again = AutoModelForImageClassification.from_pretrained(sys.argv[3])
assert torch.equal(run(again)["logits"], expected)
print("exact")
"""


def test_processes_that_did_not_import_the_library(tmp_path: Path) -> None:
    small = pruned()
    small.save_pretrained(tmp_path / "model")
    torch.save(run(small)["logits"], tmp_path / "logits.pt")
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    folder = str(tmp_path / "model")
    arguments = (folder, str(tmp_path / "logits.pt"), str(tmp_path / "again"))
    assert run_python(TRUSTED_LOAD, *arguments, **cache) == "exact\n"
    stub = (tmp_path / "model" / "modeling_hf_vitprune.py").read_text()
    assert stub == (tmp_path / "again" / "modeling_hf_vitprune.py").read_text()


@pytest.mark.parametrize("case", CASES)
def test_stub_names_existing_classes(case: str, tmp_path: Path) -> None:
    small = pruned(case)
    small.save_pretrained(tmp_path)
    namespace: dict[str, Any] = {}
    exec((tmp_path / "modeling_hf_vitprune.py").read_text(), namespace)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {path.split(".")[1] for path in auto_map.values()} == set(namespace["__all__"])
    assert namespace[auto_map["AutoConfig"].split(".")[1]] is type(small.config)
    for auto, path in auto_map.items():
        if auto != "AutoConfig":
            assert namespace[path.split(".")[1]] is type(small)
            mapped = getattr(transformers, auto)._model_mapping[type(small.config)]
            assert type(small) in (mapped if isinstance(mapped, tuple) else (mapped,))


def test_config_loads_by_itself(tmp_path: Path) -> None:
    small = pruned("CLIPForImageClassification")
    small.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(small.config) and config.pruning_config == small.config.pruning_config
    assert Architecture.from_config(config) == Architecture.of(small)


# ---------------------------------------------------------------------- training and execution
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["ViTForImageClassification", "SwinForImageClassification"])
def test_gradient_checkpointing(case: str, reentrant: bool) -> None:
    small = pruned(case, "removed branches").train()
    expected = gradients(small)
    small.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    mlp = next(m for m in small.modules() if type(m).__name__.endswith("MLP"))
    handle = mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients(small)
    handle.remove()
    assert len(runs) > 1  # in forward, and again in backward
    assert again.keys() == expected.keys()
    assert all(relative_error(again[n], g) < 1e-4 for n, g in expected.items() if g.abs().max() > 1e-5)


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total_loss(model, images().requires_grad_()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("case", [VIT, "Dinov2ForImageClassification-swiglu"])
def test_compiled(case: str) -> None:
    model = make(case, num_hidden_layers=4)
    small = prune(model, every_word(PruningPlan.dense(model)))
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True)
    assert relative_error(run(compiled)["logits"], run(small)["logits"]) < 1e-5


@pytest.mark.parametrize("plan", ["everything", *ODD])
def test_torch_export(plan: str) -> None:
    small = pruned(plan=plan)
    program = torch.export.export(small, (), {"pixel_values": images()}, strict=False)
    pixels = images(seed=3)
    assert relative_error(program.module()(pixel_values=pixels).logits, run(small, pixels)["logits"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_onnx_export(case: str, tmp_path: Path) -> None:
    """transformers' own exporter, run by onnxruntime, at another batch size than it was traced with."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    small = pruned(case)
    dynamic = not case.startswith("Swin")  # whose windows take the tracer minutes with symbolic sizes
    exported = OnnxExporter().export(small, {"pixel_values": images()}, config=OnnxConfig(dynamic=dynamic))
    exported.save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(next(tmp_path.glob("*.onnx")))
    pixels = images(3 if dynamic else 2, seed=3)
    (name,) = [node.name for node in session.get_inputs()]
    logits = session.run(["logits"], {name: pixels.numpy()})[0]
    assert relative_error(torch.from_numpy(logits), run(small, pixels)["logits"]) < 1e-5

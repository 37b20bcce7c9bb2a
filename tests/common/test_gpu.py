"""On a CUDA device: what is pruned there is what is pruned on the CPU, in every precision, kernel and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageClassification

import pruning_runs
from hf_vitprune import (
    DistillationConfig,
    LatencyTable,
    OneShotScores,
    PruningPlan,
    PruningTrainer,
    mask,
    prune,
)
from hf_vitprune.latency.measure import measure_speed
from tiny import CLASSIFIERS, EVERY_FAMILY, assert_same, feed, images, make, relative_error, run
from tiny_composites import llava, outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
VIT = "ViTForImageClassification"
#: of half precision against float32, on models of a few layers with weights of std 0.2
ROUGH = 0.1


@pytest.fixture(autouse=True)
def _full_float32() -> Any:
    """No TF32: a comparison with the CPU is one of float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_device(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs on the CPU, in float32, of a model that may be elsewhere and in another precision."""
    dtype = next(model.parameters()).dtype
    moved = {
        name: value.to(DEVICE, dtype) if value.is_floating_point() else value.to(DEVICE)
        for name, value in feed(model, pixels).items()
    }
    with torch.no_grad():
        output = model(**moved)
    return {k: v.float().cpu() for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_pruning_there_is_pruning_here(name: str) -> None:
    model = make(name)
    plan = PruningPlan.random(model, 0.4, ["mlp"], seed=3)
    expected = run(mask(model, plan))
    small = prune(model.to(DEVICE), plan)
    assert all(tensor.device.type == DEVICE for tensor in small.state_dict().values())
    assert_same({k: v.cpu() for k, v in small.state_dict().items()}, prune(make(name), plan).state_dict())
    for key, value in on_device(small, images()).items():
        if key in expected:
            assert relative_error(value, expected[key]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    small = prune(make(name), PruningPlan.random(make(name), 0.4))
    expected = run(small)["logits"]
    assert relative_error(on_device(small.to(DEVICE, dtype), images())["logits"], expected) < ROUGH


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("unit", ["qk", "v", "heads"])
def test_kernels_take_queries_and_values_of_different_widths(unit: str, backend: SDPBackend) -> None:
    small = prune(make(VIT), PruningPlan.random(make(VIT), 0.5, [unit]))
    expected = run(small)["logits"]
    small = small.to(DEVICE, torch.float16)
    with sdpa_kernel(backend):
        assert relative_error(on_device(small, images())["logits"], expected) < ROUGH


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_and_replayed_as_a_graph(mode: str) -> None:
    small = prune(make(VIT), PruningPlan.random(make(VIT), 0.5, ["heads", "qk", "mlp"])).to(DEVICE)
    pixels, fast = images().to(DEVICE), torch.compile(small, mode=mode)
    with torch.no_grad():
        expected = small(pixels).logits
        for _ in range(3):
            found = fast(pixels).logits.clone()
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["gated", "nvit", "spvit"])
def test_training_and_export(method: str, precision: str, tmp_path: Path) -> None:
    model = getattr(pruning_runs, method)()
    changes = {} if precision == "fp32" else {precision: True}
    run_ = pruning_runs.trainer(model, tmp_path, max_steps=6, learning_rate=1e-3, use_cpu=False, **changes)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.isfinite(torch.tensor(run_.train().training_loss))
    assert next(model.parameters()).device.type == DEVICE
    moved = [n for n, t in model.state_dict().items() if n in start and not torch.equal(t.cpu(), start[n].cpu())]
    assert moved, "no step was taken"
    small = model.export(calibration=None)
    found = on_device(small.to(DEVICE).eval(), images())["logits"]
    assert torch.isfinite(found).all()
    assert relative_error(found, run(small.cpu())["logits"]) < 1e-4


def test_learning_from_features(tmp_path: Path) -> None:
    dense = make("Dinov2Model")
    small = prune(dense, PruningPlan.random(dense, 0.4, ["mlp", "heads"]))
    args = pruning_runs.arguments(tmp_path, max_steps=4, learning_rate=1e-3, use_cpu=False, bf16=True)
    data = pruning_runs.NoLabels()
    PruningTrainer(
        model=small, teacher=dense, distillation=DistillationConfig(kind="features"), args=args, train_dataset=data
    ).train()
    assert all(torch.isfinite(tensor).all() for tensor in small.state_dict().values())


@pytest.mark.parametrize("name", [VIT, "Dinov2Model", "SwinForImageClassification"])
def test_one_shot_and_compensation(name: str) -> None:
    """The same scores, so the same plan, and the same weights to float32's rounding of least squares."""
    pixels = images(24)
    here, there = make(name), make(name).to(DEVICE)
    plan = OneShotScores.measure(here, pixels).plan(0.6)
    assert OneShotScores.measure(there, pixels).plan(0.6).layers == plan.layers
    expected = run(prune(here, plan, calibration=pixels))
    found = on_device(prune(there, plan, calibration=pixels), images())
    key = "logits" if "logits" in found else "last_hidden_state"
    assert relative_error(found[key], expected[key]) < 1e-2


def test_loaded_there(tmp_path: Path) -> None:
    small = prune(make(VIT), PruningPlan.random(make(VIT), 0.5, ["qk", "mlp"]))
    small.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, device_map=DEVICE)
    assert again.device.type == DEVICE
    assert relative_error(on_device(again, images())["logits"], run(small)["logits"]) < 1e-4


def test_adapters() -> None:
    model = pruning_runs.lora_model(dropout=False).eval()
    plan = PruningPlan.random(model, 0.4, ["heads", "mlp"])
    expected = run(mask(model, plan))["logits"]
    assert relative_error(on_device(prune(model.to(DEVICE), plan), images())["logits"], expected) < 1e-4


def test_a_tower_in_a_bigger_model() -> None:
    model, inputs = llava()
    plan = PruningPlan.random(model, 0.4, ["heads", "mlp"], part="vision")
    expected = outputs(mask(model, plan), inputs)
    small = prune(model.to(DEVICE), plan).cpu()
    for key, value in outputs(small, inputs).items():
        assert relative_error(value, expected[key]) < 1e-5


def test_time_is_the_devices() -> None:
    model = make(VIT, hidden_size=256, num_attention_heads=4, intermediate_size=1024).to(DEVICE)
    timing = measure_speed({"dense": model}, 2, rounds=2, progress=False)["dense"]
    assert timing.seconds > 0
    table = LatencyTable.measure(model, 2, rounds=2, progress=False)
    assert torch.cuda.get_device_name() in str(table.provenance["device"])

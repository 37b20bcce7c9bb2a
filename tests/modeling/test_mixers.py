"""Convolution and identity mixers: what they compute, in every family, and what becomes of such models."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_vitprune import VTPConfig, get_pruning_model
from hf_vitprune.contrib.fuse import fuse_bn
from hf_vitprune.cost import count
from hf_vitprune.errors import InvalidPlanError, NativeExportError
from hf_vitprune.modeling.conv_mixer import ConvMixer, IdentityMixer
from hf_vitprune.modeling.native import to_native
from hf_vitprune.modeling.structure import layer_paths
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.surgery.transplant import empty_like
from plans import aligned
from pruning_runs import scatter_scores
from tiny import (
    CLASSIFIERS,
    WITH_GRID,
    assert_same,
    hybrid,
    images,
    make,
    relative_error,
    run,
    total_loss,
)

VIT_CASE = "ViTForImageClassification"
INTERPOLATED = {"interpolate_pos_encoding": True}


def other_size(case: str) -> dict[str, bool]:
    return {} if case.startswith(("Swin", "Dinov2")) else INTERPOLATED


def mixers_of(model: nn.Module, kind: type = ConvMixer) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


# ---------------------------------------------------------------------- what they compute
def convolved(mixer: ConvMixer, tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """What a mixer gives for one image, token by token and kernel position by kernel position: (N, C) -> (N, C)."""
    special = len(tokens) - rows * columns
    state = mixer.state_dict()
    kernel, norm = state["conv.weight"], mixer.norm
    assert isinstance(norm, nn.BatchNorm2d)
    reach = kernel.shape[-1] // 2
    out = tokens.clone()
    for y in range(rows):
        for x in range(columns):
            hidden = torch.zeros(kernel.shape[0], dtype=tokens.dtype)
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < rows and 0 <= x + dx < columns:
                        seen = tokens[special + (y + dy) * columns + x + dx]
                        hidden += kernel[:, :, dy + reach, dx + reach] @ seen
            hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            name = mixer.output_name
            out[special + y * columns + x] = state[f"{name}.weight"] @ hidden.clamp(min=0) + state[f"{name}.bias"]
    return out


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_convolutions_follow_the_grid(case: str) -> None:
    """Of an image that is not square; special tokens pass."""
    model = hybrid(case).double()
    seen: list[tuple[Any, ...]] = []
    for mixer in [*mixers_of(model), *mixers_of(model, IdentityMixer)]:
        mixer.register_forward_hook(
            lambda m, args, kwargs, out: seen.append((m, args, kwargs, out[0])), with_kwargs=True
        )
    run(model, images(1, (32, 16)).double(), **other_size(case))
    assert len(seen) == 3 + (case.startswith("Swin"))
    for mixer, args, kwargs, out in seen:
        tokens = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if isinstance(mixer, IdentityMixer):
            assert out is tokens
            continue
        rows, columns = kwargs["patch_grid"]
        extra = Architecture.of(model).family.extra_tokens_of(model.config)
        assert rows == 2 * columns and tokens.shape[1] == extra + rows * columns
        assert relative_error(out[0], convolved(mixer, tokens[0], rows, columns)) < 1e-12
        assert torch.equal(out[0, :extra], tokens[0, :extra])


def test_layers_of_windows_hand_over_the_whole_grid() -> None:
    """A pointwise mixer does not see windows, so the stock layer around it computes the same, shift and all."""
    model = hybrid("SwinForImageClassification", ["conv1x1", "conv1x1", "identity", "conv1x1", "conv1x1"])
    layers = [layer for stage in model.swin.encoder.layers for layer in stage.blocks]
    seen: list[tuple[Any, ...]] = []
    for layer in layers:
        layer.register_forward_hook(lambda m, args, kwargs, out: seen.append((m, args, out[0])), with_kwargs=True)
    run(model, images(2, (24, 20)))
    assert len(seen) == 5 and any(layer.shift_size for layer in layers)
    for layer, (tokens, grid, *_), out in list(seen):
        window = (layer.window_size, layer.window_size)
        with_grid = lambda m, args, kwargs, window=window: (args, {**kwargs, "patch_grid": window})  # noqa: E731
        handle = layer.attention.register_forward_pre_hook(with_grid, with_kwargs=True)
        with torch.no_grad():
            stock = layer.stock_class.forward(layer, tokens, grid)[0]
        handle.remove()
        assert relative_error(stock, out) < 1e-6


@pytest.mark.parametrize("case", WITH_GRID)
def test_every_class_runs_and_loads(case: str, tmp_path: Path) -> None:
    model = hybrid(case)
    outputs = run(model, output_hidden_states=True)
    assert all(tensor.isfinite().all() for tensor in outputs.values())
    assert count(model).params == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert_same(run(copy.deepcopy(loaded)), run(model))  # kernels round otherwise on weights mapped from a file
    assert Architecture.of(loaded) == Architecture.of(model)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_fresh_weights_and_statistics(case: str) -> None:
    model = type(hybrid(case))(hybrid(case).config)
    for mixer in mixers_of(model):
        assert torch.equal(mixer.norm.running_var, torch.ones_like(mixer.norm.running_var))
        assert not mixer.norm.running_mean.any() and mixer.norm.num_batches_tracked == 0
        assert 0 < mixer.conv.weight.std() < 0.5
    assert total_loss(model.train()).isfinite()


# ---------------------------------------------------------------------- numbers and kernels
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.bfloat16) for case in CLASSIFIERS), (VIT_CASE, torch.float16)]
)
def test_half_precision(case: str, dtype: torch.dtype) -> None:
    exact = run(hybrid(case))["logits"]
    logits = run(hybrid(case).to(dtype), images().to(dtype))["logits"]
    assert logits.dtype == dtype
    assert relative_error(logits.float(), exact) < (0.15 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_autocast(case: str) -> None:
    model = hybrid(case)
    exact = run(model)["logits"]
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(run(model)["logits"].float(), exact) < 0.15
        total_loss(model.train()).backward()
    assert all(p.grad.isfinite().all() for m in mixers_of(model) for p in m.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", [VIT_CASE, "SwinForImageClassification", "Dinov2ForImageClassification"])
def test_gradient_checkpointing(case: str, reentrant: bool) -> None:
    """Two images sizes before one backward pass; the running statistics see every batch once."""
    plain, checkpointed = hybrid(case).train(), hybrid(case).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model.zero_grad()
        losses = [
            model(
                pixel_values=images(4, size).requires_grad_(), **(other_size(case) if size != 16 else {})
            ).logits.sum()
            for size in (16, (32, 16))
        ]
        sum(losses).backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6), name
    for (name, ours), theirs in zip(checkpointed.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), name
    assert mixers_of(plain)[0].norm.num_batches_tracked == 2


@pytest.mark.parametrize("case", [VIT_CASE, pytest.param("SwinForImageClassification", marks=pytest.mark.slow)])
def test_torch_export(case: str) -> None:
    model = hybrid(case)
    program = torch.export.export(model, (), {"pixel_values": images()}, strict=False)
    pixels = images(seed=3)
    assert relative_error(program.module()(pixel_values=pixels).logits, run(model, pixels)["logits"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("case", [VIT_CASE, "SwinForImageClassification"])
def test_traced_as_one_graph(case: str) -> None:
    """By what stands in front of the compiler, for another batch and image size too."""
    model = hybrid(case)
    torch._dynamo.reset()
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    for pixels, how in ((images(), {}), (images(3, (32, 16)), other_size(case))):
        assert relative_error(run(traced, pixels, **how)["logits"], run(model, pixels, **how)["logits"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", [VIT_CASE])
def test_traced_training_step(case: str) -> None:
    model, twin = hybrid(case).train(), hybrid(case).train()
    torch._dynamo.reset()
    total_loss(torch.compile(model, fullgraph=True, backend="aot_eager")).backward()
    total_loss(twin).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5), name
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.slow
def test_compiled() -> None:
    model = hybrid(VIT_CASE)
    torch._dynamo.reset()
    assert relative_error(run(torch.compile(model, fullgraph=True))["logits"], run(model)["logits"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_onnx_export(case: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = hybrid(case)
    if case.startswith("Swin"):
        model.set_attn_implementation("eager")  # the exporter fails on stock Swin's fused attention too
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (), str(file), kwargs={"pixel_values": images()}, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    pixels = images(seed=3)
    (name,) = [node.name for node in session.get_inputs()]
    logits = session.run(None, {name: pixels.numpy()})[0]
    assert relative_error(torch.from_numpy(logits), run(model, pixels)["logits"]) < 1e-5


# ---------------------------------------------------------------------- BatchNorm folded
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_fused_batch_norm(case: str, tmp_path: Path) -> None:
    model = hybrid(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse_bn(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert relative_error(run(fused)["logits"], run(model)["logits"]) < 1e-5
    assert count(fused).params == sum(p.numel() for p in fused.parameters()) < count(model).params
    assert count(fused).macs == count(model).macs
    assert_same(dict(model.state_dict()), before)
    fused.save_pretrained(tmp_path)
    loaded = type(fused).from_pretrained(tmp_path)
    assert_same(run(loaded), run(fused))
    rows = loaded.config.pruning_config["per_layer_config"].values()
    assert [row["batch_norm"] for row in rows if "batch_norm" in row] == [False] * len(mixers_of(model))


def test_nothing_to_fuse() -> None:
    with pytest.raises(InvalidPlanError, match="no convolution mixer"):
        fuse_bn(make(VIT_CASE))
    with pytest.raises(InvalidPlanError, match="no convolution mixer"):
        fuse_bn(fuse_bn(hybrid(VIT_CASE)))


# ---------------------------------------------------------------------- plans that make mixers
def with_new_weights(model: Any, plan: PruningPlan) -> PruningPlan:
    """The plan with random weights for the convolutions it makes."""
    with pytest.raises(InvalidPlanError, match=r"lacks \d+ of their weights"):
        prune(model, plan)
    new = {e.index for e in plan.layers if e.replaces_mixer(plan.source.layers[e.index])}
    skeleton = empty_like(model, plan)
    paths = [
        path for path, e in zip(layer_paths(skeleton, plan.architecture), plan.layers, strict=True) if e.index in new
    ]
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in skeleton.state_dict().items()
        if any(name.startswith(path.attention + ".") for path in paths)
    }
    return replace(plan, weights=weights)


#: every family from both sources, and narrowed where it can be; crossed in full for one
CROSSED = [
    pytest.param(
        case, source, narrow, marks=[] if case == VIT_CASE or narrow == (source == "dense") else pytest.mark.slow
    )
    for case in CLASSIFIERS
    for source in ("dense", "hybrid")
    for narrow in (False, True)
]


@pytest.mark.parametrize(("case", "source", "embedding"), CROSSED)
def test_mixers_are_made(case: str, source: str, embedding: bool) -> None:
    """Out of attention, and out of other mixers, whose layers may be gone."""
    model = make(case) if source == "dense" else hybrid(case)
    plan = PruningPlan.dense(model)
    first, second, third, *rest = plan.layers
    third = third.with_mixer("identity")
    layers = [first.with_mixer("conv1x1", 6), second.with_mixer("conv3x3", 5, batch_norm=False), third]
    plan = plan.with_layers([*layers, *(entry.with_mixer("none") for entry in rest[:1])])
    if plan.source.depths is None and embedding:
        plan = replace(plan, embedding=tuple(range(0, plan.source.hidden_size, 2)))
    plan = with_new_weights(model, plan)
    small, full = prune(model, plan), mask(model, plan)
    mixers = [shape.mixer for shape in Architecture.of(small).layers]
    assert mixers[:3] == ["conv1x1", "conv3x3", "identity"] and set(mixers[3:]) <= {"none"}
    for name, ours, theirs in aligned(run(small), run(full), plan):
        assert relative_error(ours, theirs) < 1e-5, name
    assert PruningPlan.from_dict(plan.to_dict()) == plan


# ---------------------------------------------------------------------- other parts of the library
def test_low_rank_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = hybrid(VIT_CASE)
    config = LoraConfig(target_modules=["o_proj", "fc1", "q_proj", "conv"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    plan = PruningPlan.random(adapted, 0.3, ["mlp", "heads", "embedding"])
    small, full = prune(adapted, plan), mask(adapted, plan)
    assert relative_error(run(small)["logits"], run(full)["logits"]) < 1e-5
    assert relative_error(run(full)["logits"], run(model)["logits"]) > 1e-3


def test_vtp_prunes_the_rest() -> None:
    pm = scatter_scores(get_pruning_model(hybrid(VIT_CASE), VTPConfig(pruning_ratio=0.5, round_to=1)))
    small = pm.export()
    shapes = Architecture.of(small).layers
    assert [shape.mixer for shape in shapes] == ["conv3x3", "conv1x1", "attention", "identity"]
    assert all(shape.mlp < 48 for shape in shapes)


@pytest.mark.parametrize("case", [VIT_CASE, "SwinForImageClassification"])
def test_no_stock_class_holds_them(case: str) -> None:
    with pytest.raises(NativeExportError, match="layer 0 .*conv3x3"):
        to_native(hybrid(case))


def test_magnitude_plans() -> None:
    model = hybrid(VIT_CASE)
    small = prune(model, PruningPlan.magnitude(model, 0.5, ["layers", "embedding"]))
    assert Architecture.of(small).hidden_size == 16 and len(Architecture.of(small).layers) == 2

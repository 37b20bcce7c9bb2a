"""Tiny models of every family and class, with weights large enough that a wrong slice shows in the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tiny_sizes import (
    BEIT,
    DINO,
    LABELS,
    MAE,
    NAFLEX,
    SEGMENTS,
    SIZE,
    STAGES,
    SWIN,
    TEXT,
    VIDEO,
    WITH_MLP,
    WORDS,
)


@dataclass(frozen=True)
class Case:
    """One model class of one family: how to make its config, and names that are not part of every run."""

    model_class: str
    config_class: str
    fields: dict[str, Any]
    two_towers: bool = False

    @property
    def family(self) -> str:
        return self.config_class.removesuffix("Config")

    def config(self, **changes: Any) -> PreTrainedConfig:
        config_class = getattr(transformers, self.config_class)
        if not self.two_towers:
            return config_class(**{"num_labels": LABELS, **self.fields, **changes})
        labels = changes.pop("num_labels", LABELS)
        vision = {**self.fields, **changes}
        return config_class(vision_config=vision, text_config=dict(TEXT), num_labels=labels)


def _columnar(family: str, fields: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> dict[str, Case]:
    return {f"{family}{t}": Case(f"{family}{t}", f"{family}Config", {**fields, **more}) for t, more in tasks.items()}


CLASSIFIER: dict[str, dict[str, Any]] = {"ForImageClassification": {}}
COMMON = {"Model": {}, **CLASSIFIER, "ForMaskedImageModeling": {"encoder_stride": 8}}

#: every pruned class of the library, and the variants of a config that change its parts
CASES: dict[str, Case] = {
    **_columnar("ViT", WITH_MLP, COMMON),
    **_columnar("DeiT", WITH_MLP, {**COMMON, "ForImageClassificationWithTeacher": {}}),
    **_columnar(
        "Swin",
        SWIN,
        {
            "Model": {"use_absolute_embeddings": True},
            **CLASSIFIER,
            "ForMaskedImageModeling": {"encoder_stride": 4},
            "Backbone": {"out_features": ["stage1", "stage2"]},
        },
    ),
    **_columnar("Dinov2", DINO, {"Model": {}, **CLASSIFIER, "Backbone": STAGES}),
    "Dinov2ForImageClassification-swiglu": Case(
        "Dinov2ForImageClassification", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}
    ),
    **_columnar("Dinov2WithRegisters", DINO, {"Model": {}, **CLASSIFIER, "Backbone": STAGES}),
    **_columnar("Data2VecVision", BEIT, {"Model": {}, **CLASSIFIER, "ForSemanticSegmentation": SEGMENTS}),
    "Data2VecVisionForImageClassification-shared": Case(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        {**WITH_MLP, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
    ),
    **_columnar(
        "Swinv2",
        SWIN,
        {
            "Model": {},
            **CLASSIFIER,
            "ForMaskedImageModeling": {"encoder_stride": 4},
            "Backbone": {"out_features": ["stage1", "stage2"]},
        },
    ),
    "CLIPTextModel": Case("CLIPTextModel", "CLIPTextConfig", WORDS),
    "CLIPTextModelWithProjection": Case("CLIPTextModelWithProjection", "CLIPTextConfig", WORDS),
    "SiglipTextModel": Case("SiglipTextModel", "SiglipTextConfig", WORDS),
    "Siglip2TextModel": Case("Siglip2TextModel", "Siglip2TextConfig", WORDS),
    **_columnar("DINOv3ViT", WITH_MLP, {"Model": {"num_register_tokens": 2}, "Backbone": STAGES}),
    "DINOv3ViTModel-gated": Case("DINOv3ViTModel", "DINOv3ViTConfig", {**WITH_MLP, "use_gated_mlp": True}),
    **_columnar("Beit", BEIT, {"Model": {}, **CLASSIFIER, "Backbone": STAGES, "ForSemanticSegmentation": SEGMENTS}),
    "BeitForMaskedImageModeling": Case("BeitForMaskedImageModeling", "BeitConfig", {**BEIT, "vocab_size": 20}),
    "BeitBackbone-pyramid": Case("BeitBackbone", "BeitConfig", {**SEGMENTS, "add_fpn": True}),
    "BeitForImageClassification-shared": Case(
        "BeitForImageClassification",
        "BeitConfig",
        {**WITH_MLP, "use_shared_relative_position_bias": True, "layer_scale_init_value": 0.0},
    ),
    "CLIPVisionModel": Case("CLIPVisionModel", "CLIPVisionConfig", WITH_MLP),
    "CLIPVisionModelWithProjection": Case(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**WITH_MLP, "projection_dim": 24}
    ),
    "CLIPForImageClassification": Case("CLIPForImageClassification", "CLIPConfig", WITH_MLP, two_towers=True),
    "SiglipVisionModel": Case("SiglipVisionModel", "SiglipVisionConfig", WITH_MLP),
    "SiglipVisionModel-headless": Case(
        "SiglipVisionModel", "SiglipVisionConfig", {**WITH_MLP, "vision_use_head": False}
    ),
    "SiglipForImageClassification": Case("SiglipForImageClassification", "SiglipConfig", WITH_MLP, two_towers=True),
    "Siglip2VisionModel": Case("Siglip2VisionModel", "Siglip2VisionConfig", NAFLEX),
    "Siglip2ForImageClassification": Case("Siglip2ForImageClassification", "Siglip2Config", NAFLEX, two_towers=True),
    **_columnar("ViTMSN", WITH_MLP, {"Model": {}, **CLASSIFIER}),
    **_columnar("IJepa", WITH_MLP, {"Model": {}, **CLASSIFIER}),
    **_columnar("ViTMAE", MAE, {"Model": {}, "ForPreTraining": {}}),
    **_columnar(
        "VideoMAE", VIDEO, {"Model": {"use_mean_pooling": False}, "ForVideoClassification": {}, "ForPreTraining": {}}
    ),
    "Aimv2VisionModel": Case("Aimv2VisionModel", "Aimv2VisionConfig", WITH_MLP),
    "Aimv2VisionModel-native": Case(
        "Aimv2VisionModel", "Aimv2VisionConfig", {**WITH_MLP, "is_native": True, "use_head": False}
    ),
    "InternVLVisionModel": Case("InternVLVisionModel", "InternVLVisionConfig", {**WITH_MLP, "attention_bias": True}),
    "InternVLVisionModel-normed": Case(
        "InternVLVisionModel",
        "InternVLVisionConfig",
        {**WITH_MLP, "use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
    ),
    "VitPoseBackbone": Case("VitPoseBackbone", "VitPoseBackboneConfig", {**DINO, **STAGES}),
    "RfDetrDinov2Backbone": Case(
        "RfDetrDinov2Backbone", "RfDetrDinov2Config", {**DINO, "patch_size": 4, "num_windows": 2, **STAGES}
    ),
    "RfDetrDinov2Backbone-whole": Case(
        "RfDetrDinov2Backbone", "RfDetrDinov2Config", {**DINO, "num_windows": 1, **STAGES}
    ),
    **_columnar("Pixio", {**DINO, "n_cls_tokens": 2}, {"Model": {}, "Backbone": STAGES}),
    "RadioModel": Case(
        "RadioModel",
        "RadioConfig",
        {**DINO, "mlp_ratio": 2.0, "max_img_size": 32, "num_cls_tokens": 2, "num_registers": 1},
    ),
}
#: takes patches instead of images
NO_IMAGES = "Siglip2ForImageClassification"
#: what the cases of text towers begin with
TEXTS = ("CLIPText", "SiglipText", "Siglip2Text")
#: beginnings of cases that no image runs through as it is: text, patches, frames, random masks
NO_LOOK = (*TEXTS, "Siglip2", "VideoMAE", "ViTMAE")
#: peculiar layers, whose every unit is tested by itself
PECULIAR = [n for n in CASES if n.startswith(("BeitForI", "Data2VecVisionForI", "Swinv2ForI"))]
#: one classifier a family (and SwiGLU) that takes images: for what does not depend on the head
CLASSIFIERS = [
    name
    for name in CASES
    if CASES[name].model_class.endswith("ForImageClassification") and name not in (NO_IMAGES, *PECULIAR)
]
#: classes whose tokens form a grid that convolutions can mix
NO_GRID = ("Siglip2", "ViTMAE", "VideoMAE", "Data2Vec", "Swinv2", "InternVL", "VitPose", "RfDetr")
WITH_GRID = [name for name in CASES if not name.startswith((*NO_GRID, *TEXTS))]
#: most of whose cost is in what reads the features of several layers
NECKS = [name for name in CASES if name.endswith(("ForSemanticSegmentation", "-pyramid"))]
#: no layer of which can go: its number says what it attends to
ALL_LAYERS = "RfDetrDinov2Backbone"
#: one class a family, for what depends on its layers
EVERY_FAMILY = [
    *CLASSIFIERS,
    NO_IMAGES,
    "ViTMAEForPreTraining",
    "VideoMAEForVideoClassification",
    "Aimv2VisionModel",
    "PixioModel",
    "RadioModel",
    "DINOv3ViTModel",
    "CLIPTextModel",
    "InternVLVisionModel",
    "InternVLVisionModel-normed",
    "VitPoseBackbone",
    "RfDetrDinov2Backbone",
    *PECULIAR,
]
#: what a model has not got, by what its case begins or ends with: names of plans (``plans.PLANS``)
LACKING = {
    "SwinM": {"embedding"},
    "SwinF": {"embedding"},
    "SwinB": {"embedding"},
    "Swinv2": {"embedding", "qk", "v", "padded values", "scaled"},
    "-shared": {"heads", "uneven heads"},
    "-normed": {"heads", "uneven heads", "qk"},
    "DetrDinov2Backbone": {"layers"},
    "ForSemanticSegmentation": {"layers"},  # two of five go, and four of them are read
    "-pyramid": {"layers"},
}


def eager(case: str) -> dict[str, Any]:
    """What makes a model give out its attention weights, where setting it later comes too late."""
    return {"attn_implementation": "eager"} if case.startswith("Data2Vec") else {}


def lacks(case: str, plan: str) -> bool:
    """Whether a case has no unit that a plan is about."""
    return any(plan in plans and (case.startswith(name) or case.endswith(name)) for name, plans in LACKING.items())


def reset_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fresh weights of std 0.2 everywhere, biases, norms, tokens and position tables included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            scale = parameter.ndim == 1 and name.endswith(("weight", "lambda1"))
            parameter.copy_(noise + 1 if scale else noise)
    return model


def make(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The tiny model of a case, in eval mode; ``changes`` go to its (vision) config."""
    case = CASES[name]
    config = case.config(**changes)
    model = getattr(transformers, case.model_class)(config)
    reset_weights(model, seed)
    return model.eval()


def hybrid(name: str, mixers: Sequence[str] | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A pruned model whose layers mix tokens in several ways, in eval mode.

    Args:
        mixers: one a layer, bottom to top; every kind by default.
        changes: go to the (vision) config.
    """
    from hf_vitprune.modeling import build
    from hf_vitprune.spec.architecture import Architecture
    from hf_vitprune.spec.configs import strip_family

    case = CASES[name]
    depths = case.fields.get("depths")
    if mixers is None:
        mixers = ("conv3x3", "conv1x1", "attention", "identity", "conv3x3")[: sum(depths) if depths else 4]
    rows: list[Any] = [{"mixer": mixer} for mixer in mixers]
    if depths:
        starts = [sum(depths[:s]) for s in range(len(depths))]
        rows = [rows[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
    else:
        changes = {"num_hidden_layers": len(mixers), **changes}
    config = case.config(**changes)
    architecture = Architecture.from_layers(config, rows)
    architecture = architecture.replace(task=strip_family(case.model_class, case.config_class))
    model = build(config, architecture)
    reset_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return model.eval()


def images(batch: int = 2, size: int | tuple[int, int] = SIZE, seed: int = 7) -> torch.Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def feed(model: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """What a model takes for images (B, 3, height, width): patches, frames, and what makes random parts repeatable."""
    while hasattr(model, "get_base_model"):  # a PruningModel, a PeftModel
        model = model.get_base_model()
    config = getattr(model.config, "vision_config", model.config)
    kind = type(model).__name__.removeprefix("Pruned")
    batch, _, height, width = pixels.shape
    if "Text" in kind:
        ids = torch.randint(3, 40, (batch, 7), generator=torch.Generator().manual_seed(3))
        ids[:, -2] = 49  # the end, and padding behind it
        return {"input_ids": ids, "attention_mask": (torch.arange(7) < 6).long().expand(batch, -1)}
    if kind.startswith("Siglip2"):  # the last image has a row of padding
        rows, columns = height // config.patch_size, width // config.patch_size
        patches = pixels.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[rows, columns]] * batch)
        mask = torch.ones(batch, rows * columns, dtype=torch.long)
        if batch > 1:
            shapes[-1, 0] -= 1
            mask[-1, -columns:] = 0
        return {
            "pixel_values": patches.flatten(3).flatten(1, 2),
            "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }
    if kind.startswith("ViTMAE"):
        patches = (height // config.patch_size) * (width // config.patch_size)
        return {"pixel_values": pixels, "noise": torch.arange(patches).flip(0).expand(batch, -1).float()}
    if kind.startswith("VideoMAE"):
        frames = torch.stack([pixels * (1 + i) for i in range(config.num_frames)], 1)
        if kind != "VideoMAEForPreTraining":
            return {"pixel_values": frames}
        tubes = (height // config.patch_size) * (width // config.patch_size) * config.num_frames // config.tubelet_size
        return {"pixel_values": frames, "bool_masked_pos": (torch.arange(tubes) % 2 == 0).expand(batch, -1)}
    return {"pixel_values": pixels}


def tensors(output: ModelOutput, but: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of an output, those in tuples numbered."""
    for key, value in output.items():
        if key in but:
            continue
        if isinstance(value, torch.Tensor):
            yield key, value
        elif isinstance(value, (tuple, list)):
            yield from ((f"{key}.{i}", v) for i, v in enumerate(v for v in value if isinstance(v, torch.Tensor)))


@torch.no_grad()
def run(model: Any, pixels: torch.Tensor | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model's output."""
    return dict(tensors(model(**feed(model, images() if pixels is None else pixels), **kwargs)))


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys() and actual
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def total_loss(model: Any, pixels: torch.Tensor | None = None) -> torch.Tensor:
    """A loss that every tensor of the output takes part in."""
    output = model(**feed(model, images() if pixels is None else pixels))
    # sine: removed channels, which a masked model gives as zeros, add nothing
    return torch.stack([t.sin().sum() for _, t in tensors(output) if t.requires_grad]).sum()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor made: ``size`` on any device, meta included, ``real`` in memory."""

    size = real = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
            self.real = max(self.real, 0 if out.device.type == "meta" else out.numel())
        return out

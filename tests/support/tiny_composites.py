"""Tiny bigger models with a prunable tower inside, and inputs for them; weights are large enough that errors show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t

from tiny import reset_weights, tensors

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "image_size": 16,
    "patch_size": 8,
    "intermediate_size": 48,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "vocab_size": 60,
    "pad_token_id": 0,
}
WORDS: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN = 59
Made = tuple[Any, dict[str, torch.Tensor]]


def pixels(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def finished(model: Any, **inputs: torch.Tensor) -> Made:
    reset_weights(model)
    return model.eval(), inputs


def _words(images: int, **inputs: Any) -> dict[str, Any]:
    """Two rows of words, each with so many image tokens."""
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * images, 5, 6], [1, *[IMAGE_TOKEN] * images, 7, 8]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def _dino(reshape: bool, **fields: Any) -> Any:
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    return t.Dinov2Config(
        **{**VISION, "patch_size": 4, "mlp_ratio": 2},
        out_features=stages,
        reshape_hidden_states=reshape,
        apply_layernorm=True,
        **fields,
    )


def llava(layer: Any = -2) -> Made:
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**LLAMA),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=layer,
    )
    return finished(t.LlavaForConditionalGeneration(config), **_words(4, pixel_values=pixels()))


def llava_next(layer: Any = -2) -> Made:
    config = t.LlavaNextConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**LLAMA),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=layer,
        image_grid_pinpoints=[[16, 16]],
    )
    patches = pixels(4).view(2, 2, 3, 16, 16)
    inputs = _words(4 + 2 * 3, pixel_values=patches, image_sizes=torch.tensor([[16, 16], [16, 16]]))
    return finished(t.LlavaNextForConditionalGeneration(config), **inputs)


def vip_llava(layers: Any = (-3, -2, 1)) -> Made:
    config = t.VipLlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION),
        text_config=t.LlamaConfig(**LLAMA),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=list(layers),
    )
    return finished(t.VipLlavaForConditionalGeneration(config), **_words(4, pixel_values=pixels()))


def paligemma() -> Made:
    text = t.GemmaConfig(**{**LLAMA, "head_dim": 12})
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        projection_dim=24,
    )
    inputs = _words(4, pixel_values=pixels())
    return finished(t.PaliGemmaForConditionalGeneration(config), **inputs)


def gemma3() -> Made:
    text = t.Gemma3TextConfig(**{**LLAMA, "head_dim": 12, "sliding_window": 8})
    config = t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
    )
    inputs = _words(4, pixel_values=pixels())
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return finished(t.Gemma3ForConditionalGeneration(config), **inputs)


def captioner() -> Made:
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        t.ViTConfig(**VISION), t.BertConfig(**WORDS, is_decoder=True, add_cross_attention=True)
    )
    ids = torch.tensor([[1, 5, 6], [1, 7, 8]])
    return finished(t.VisionEncoderDecoderModel(config=config), pixel_values=pixels(), decoder_input_ids=ids)


def pair_of_encoders() -> Made:
    config = t.VisionTextDualEncoderConfig.from_vision_text_configs(
        t.ViTConfig(**VISION), t.BertConfig(**WORDS), projection_dim=16
    )
    return finished(t.VisionTextDualEncoderModel(config), input_ids=captions(), pixel_values=pixels())


def captions() -> torch.Tensor:
    return torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2]])


def dual(name: str) -> Callable[[], Made]:
    def make() -> Made:
        text = {**WORDS, "hidden_size": 32, "projection_size": 32}
        config = getattr(t, f"{name}Config")(vision_config=dict(VISION), text_config=text)
        return finished(getattr(t, f"{name}Model")(config), input_ids=captions(), pixel_values=pixels())

    return make


def dpt() -> Made:
    config = t.DPTConfig(
        backbone_config=_dino(False),
        hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        patch_size=4,
        image_size=16,
    )
    return finished(t.DPTForDepthEstimation(config), pixel_values=pixels())


def depth_anything() -> Made:
    config = t.DepthAnythingConfig(
        backbone_config=_dino(False),
        patch_size=4,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    return finished(t.DepthAnythingForDepthEstimation(config), pixel_values=pixels())


def upernet() -> Made:
    config = t.UperNetConfig(
        backbone_config=_dino(True),
        hidden_size=32,
        num_labels=3,
        auxiliary_in_channels=32,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
    )
    return finished(t.UperNetForSemanticSegmentation(config), pixel_values=pixels())


def _swin() -> Any:
    return t.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 2, 2],
        num_heads=[2] * 4,
        window_size=2,
        image_size=32,
        patch_size=2,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def upernet_swin() -> Made:
    config = t.UperNetConfig(
        backbone_config=_swin(), hidden_size=32, num_labels=3, auxiliary_in_channels=64, pool_scales=[1, 2]
    )
    return finished(t.UperNetForSemanticSegmentation(config), pixel_values=pixels(size=32))


def mask2former() -> Made:
    config = t.Mask2FormerConfig(
        backbone_config=_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
        num_queries=5,
        num_labels=3,
        train_num_points=16,
    )
    return finished(t.Mask2FormerForUniversalSegmentation(config), pixel_values=pixels(size=32))


def internvl(**vision: Any) -> Made:
    config = t.InternVLConfig(
        vision_config=t.InternVLVisionConfig(**{**VISION, "patch_size": 4}, **vision),
        text_config=t.Qwen2Config(**LLAMA),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )
    return finished(t.InternVLForConditionalGeneration(config), **_words(4, pixel_values=pixels()))


def vitpose() -> Made:
    sizes = {**VISION, "image_size": [16, 16], "patch_size": [8, 8], "mlp_ratio": 2}
    backbone = t.VitPoseBackboneConfig(**sizes, out_indices=[4])
    config = t.VitPoseConfig(backbone_config=backbone, num_labels=3)
    return finished(t.VitPoseForPoseEstimation(config), pixel_values=pixels())


def rf_detr() -> Made:
    backbone = t.RfDetrDinov2Config(
        **{**VISION, "patch_size": 4}, mlp_ratio=2, num_windows=2, out_features=["stage2", "stage4"]
    )
    config = t.RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_queries=4,
        group_detr=1,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        c2f_num_blocks=1,
        num_labels=3,
    )
    return finished(t.RfDetrForObjectDetection(config), pixel_values=pixels())


COMPOSITES: dict[str, Callable[[], Made]] = {
    "LLaVA": llava,
    "LLaVA-NeXT": llava_next,
    "VipLLaVA": vip_llava,
    "PaliGemma": paligemma,
    "Gemma 3": gemma3,
    "VisionEncoderDecoder": captioner,
    "VisionTextDualEncoder": pair_of_encoders,
    "CLIP": dual("CLIP"),
    "SigLIP": dual("Siglip"),
    "DPT": dpt,
    "DepthAnything": depth_anything,
    "UperNet": upernet,
    "UperNet on Swin": upernet_swin,
    "Mask2Former": mask2former,
    "InternVL": internvl,
    "ViTPose": vitpose,
    "RF-DETR": rf_detr,
}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every floating tensor of the output."""
    torch.manual_seed(0)
    return {name: value for name, value in tensors(model(**inputs)) if value.is_floating_point()}


def auto_class(model: Any) -> Any:
    """The Auto class that maps a model's class."""
    tasks = ("ImageTextToText", "DepthEstimation", "SemanticSegmentation", "UniversalSegmentation", "Vision2Seq")
    tasks += ("ObjectDetection", "PoseEstimation", "")
    for task in tasks:
        found = getattr(t, f"AutoModelFor{task}" if task else "AutoModel", None)
        names = {} if found is None else found._model_mapping._model_mapping
        if type(model).__name__ in names.get(model.config.model_type, ()):
            return found
    raise AssertionError(type(model))

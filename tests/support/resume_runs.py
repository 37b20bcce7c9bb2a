"""Tiny classifiers and short Trainer runs, for the tests of exact resume."""

import copy

import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

GRID = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
PLAIN = {**GRID, "intermediate_size": 64}
DINO = {**GRID, "mlp_ratio": 2, "num_labels": 3}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
FAMILIES = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**PLAIN, num_labels=3)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**PLAIN, num_labels=3)),
    "beit": lambda: BeitForImageClassification(BeitConfig(**PLAIN, num_labels=3)),
    "swin": lambda: SwinForImageClassification(SwinConfig(**SWIN, num_labels=3)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**DINO)),
    "dinov2-swiglu": lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2-registers": lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**DINO)),
    "clip": lambda: CLIPForImageClassification(CLIPConfig(vision_config=dict(PLAIN), num_labels=3)),
    "siglip": lambda: SiglipForImageClassification(SiglipConfig(vision_config=dict(PLAIN), num_labels=3)),
}
RENAMED = [name for name in FAMILIES if name not in ("clip", "siglip")]


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        image = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
        return {"pixel_values": image, "labels": i % 3}


def trainer(model, folder, **changes):
    settings = {"max_steps": 2, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    args = TrainingArguments(str(folder), **{**settings, **quiet, **changes})
    return Trainer(model, args, train_dataset=Images(), eval_dataset=Images())


def trained(name, folder):
    torch.manual_seed(0)
    model = FAMILIES[name]()
    trainer(model, folder).train()
    return model, folder / "checkpoint-2"


def disturbed(model):
    """A copy in which no tensor is right."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def restored(model, reference):
    now = model.state_dict()
    return sum(torch.equal(tensor, now[name]) for name, tensor in reference.state_dict().items())


def resume(model, folder, checkpoint):
    """Resume at the last step: what is in the model afterwards is what was loaded."""
    trainer(model, folder).train(resume_from_checkpoint=str(checkpoint))

"""Gated models and short Trainer runs, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from hf_vitprune import NViTConfig, PruningModel, PruningTrainer, SPViTConfig, VTPConfig, get_pruning_model
from hf_vitprune.methods import NViT
from tiny import LABELS, SIZE, make, reset_weights

VIT = "ViTForImageClassification"
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}


#: of NViT, for the tiny models
SMALL_GROUPS = {"embedding": 4, "heads": 1, "qk": 2, "v": 2, "mlp": 4}


class Images(torch.utils.data.Dataset):
    """Images and classes; every fifth image but the first has no class (-100), so micro-batches count differently."""

    def __init__(self, length: int = 16, dtype: torch.dtype = torch.float32, **columns: Any) -> None:
        self.length, self.dtype, self.columns = length, dtype, columns

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(i)
        row = {"pixel_values": torch.randn(3, SIZE, SIZE, generator=generator).to(self.dtype)}
        labels = -100 if i % 5 == 4 else i % LABELS
        return {**row, "labels": labels, **{name: column(i) for name, column in self.columns.items()}}


class NoLabels(Images):
    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": super().__getitem__(i)["pixel_values"]}


class Patterns(torch.utils.data.Dataset):
    """Images whose class is a pattern under some noise, so that every layer can tell the classes apart."""

    def __init__(
        self, length: int = 20, noise: float = 0.1, dtype: torch.dtype = torch.float32, **columns: Any
    ) -> None:
        self.length, self.noise, self.dtype, self.columns = length, noise, dtype, columns

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        pattern = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(i % LABELS))
        noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1000 + i))
        pixels = (pattern + noise * self.noise).to(self.dtype)
        return {"pixel_values": pixels, "labels": i % LABELS, **self.columns}


def gated(case: str = VIT, model_changes: dict[str, Any] | None = None, **settings: Any) -> PruningModel:
    """A PruningModel with VTP over a tiny model; 40 % of the channels go unless ``settings`` say otherwise."""
    if "target" not in settings:
        settings = {"pruning_ratio": 0.4, **settings}
    return get_pruning_model(make(case, **(model_changes or {})), VTPConfig(**{"round_to": 4, **settings}))


def nvit(case: str = VIT, model_changes: dict[str, Any] | None = None, **settings: Any) -> PruningModel:
    """A PruningModel with NViT over a tiny model, in small groups, to half of the MACs unless ``settings`` differ."""
    settings = {"target": 0.5, "group_sizes": SMALL_GROUPS, **settings}
    return get_pruning_model(make(case, **(model_changes or {})), NViTConfig(**settings))


def spvit(case: str = VIT, model_changes: dict[str, Any] | None = None, **settings: Any) -> PruningModel:
    """A PruningModel with SPViT over a tiny model; weights of branches that differ from one another."""
    model = get_pruning_model(make(case, **(model_changes or {})), SPViTConfig(**{"target": 0.7, **settings}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in [*model.method.named_parameters(), *model.method.named_buffers()]:
            if "branches" in name and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                # shares of the heads are anything between equal and one head alone
                tensor.copy_(1 + 0.02 * noise if name.endswith("table") else 0.5 + noise)
    return model


def score_tensors(model: PruningModel) -> list[torch.Tensor]:
    """What the method decides by: learned scores, or (NViT) those collected since the last prune step."""
    method = model.method
    if isinstance(method, NViT):
        method.scores.updates = 1
        return [method.scores.window]
    return method.gate_parameters()


def scatter_scores(model: PruningModel, seed: int = 1) -> PruningModel:
    """Scores of both signs, none of them near zero, so that units matter unequally."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in score_tensors(model):
            noise = torch.rand(score.shape, generator=generator) + 0.5
            score.copy_(noise * (1 - 2 * torch.randint(0, 2, score.shape, generator=generator)))
    return model


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    """Plain SGD for a few steps, without clipping: gradients can then be read off the weights."""
    settings = {"max_steps": 2, "learning_rate": 0.1, "per_device_train_batch_size": 4, "optim": "sgd"}
    exact = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 1}
    return TrainingArguments(str(folder), **{**settings, **exact, **QUIET, **changes})


def trainer(model: Any, folder: Path | str, kind: type[Trainer] = PruningTrainer, **changes: Any) -> Any:
    """A Trainer on :class:`Images`; what TrainingArguments has not got goes to the Trainer."""
    known = TrainingArguments.__dataclass_fields__
    extra = {name: value for name, value in changes.items() if name not in known}
    args = arguments(folder, **{name: value for name, value in changes.items() if name in known})
    return kind(model=model, args=args, **{"train_dataset": Images(), "eval_dataset": Images(8), **extra})


def lora_model(dropout: bool = True, **config: Any) -> Any:
    """A PeftModel with LoRA on every kind of Linear that pruning cuts, its adapters not at zero."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "fc2"], **config}
    inner = make(VIT, **(DROPOUT if dropout else {}))
    model = get_peft_model(inner, LoraConfig(modules_to_save=["classifier"], **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """As of runs in double precision that add up alike."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


__all__ = [
    "DROPOUT", "SMALL_GROUPS", "VIT", "Images", "Patterns", "arguments", "assert_close", "gated", "lora_model", "nvit",
    "reset_weights", "scatter_scores", "score_tensors", "spvit", "state_of", "trainer",
]  # fmt: skip

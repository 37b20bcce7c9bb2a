"""AdaLoRA: LoRA with a rank of its own for every layer, some of which training gives up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .kind import register_kind
from .lora import LoraKind


class RanksResized:
    """Tuner that gives up ranks once: PEFT does it while it loads tensors, transformers' ``load_adapter`` never."""

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]
        pattern = self.peft_config[adapter_name].rank_pattern  # type: ignore[attr-defined]
        if pattern:
            self.__dict__.setdefault("_resized", set()).discard(adapter_name)  # of a deleted adapter of this name
            self.resize_modules_by_rank_pattern(pattern, adapter_name)

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        done = self.__dict__.setdefault("_resized", set())
        if adapter_name not in done:
            super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)  # type: ignore[misc]
            done.add(adapter_name)


class AdaLoraKind(LoraKind):
    name = "ADALORA"
    sides = {"lora_A": "in", "lora_B": "out", "lora_E": "none", "ranknum": "none"}
    convolutions = False
    tuner_mixin = RanksResized

    def renamed_pattern(self, field: str, pattern: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        if field != "rank_pattern":
            return super().renamed_pattern(field, pattern, names)
        renamed = {}
        for key, kept in pattern.items():  # the finished allocation: which ranks stay of ``<layer>.lora_E``
            layer, tail, rest = key.partition(".lora_E")
            if layer in names:
                renamed[names[layer] + tail + rest] = kept
        return renamed

    def finished(self, tensor: torch.Tensor, name: str, layer: str, configs: Mapping[str, Any]) -> torch.Tensor:
        part, adapter = name.split(".")[:2]
        pattern = configs[adapter].rank_pattern or {}
        kept = next((k for key, k in pattern.items() if key.startswith(f"{layer}.lora_E")), None)
        axis = 1 if part == "lora_B" else 0
        if kept is None or part == "ranknum" or tensor.shape[axis] != len(kept):
            return tensor
        return tensor.index_select(axis, torch.tensor(kept, device=tensor.device).nonzero().squeeze(1))


register_kind(AdaLoraKind())

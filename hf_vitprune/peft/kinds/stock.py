"""PEFT's own kinds: LoRA (rsLoRA, DoRA, biases), AdaLoRA, IA3, HiRA, LoHa, VeRA, OFT and HRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...plan.layer_plan import PAD
from .kind import AdapterKind, LayerCut, Side, Tensors

#: initialisations that leave the base weights alone
HARMLESS_INITS = (True, False, "gaussian", "eva")
#: factors under this divide too badly
SMALLEST_FACTOR = 1e-2
DORA = ("DoraLinearVariant", "DoraConv2dVariant")


class FullNames:
    """Tuner that keeps DoRA's vectors under full names: transformers' ``load_adapter`` misses the short ones."""

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super()._get_adapter_state_dict(*args, **kwargs)  # type: ignore[misc]
        return {
            f"{k}.weight" if ".lora_magnitude_vector." in k and k.count(".weight") == 0 else k: v
            for k, v in state.items()
        }


class LoraKind(AdapterKind):
    """Variants other than DoRA stay where their layer loses nothing."""

    name = "LORA"
    sides: Mapping[str, Side] = {"lora_A": "in", "lora_B": "out", "lora_magnitude_vector": "out"}
    scaled = "lora_A"
    convolutions = True
    settings_dropped = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
    # Arrow routes between adapters, and aLoRA looks for tokens: neither says what one layer computes
    settings_refused = (
        *AdapterKind.settings_refused,
        "layer_replication",
        "arrow_config",
        "alora_invocation_tokens",
    )
    tuner_mixin: type = FullNames

    def changes_base(self, config: Any) -> bool:
        return config.init_lora_weights not in HARMLESS_INITS or bool(getattr(config, "kasa_config", None))

    def rewrite(self, fields: dict[str, Any], layers: Mapping[str, Any]) -> None:
        if isinstance(fields["init_lora_weights"], str):
            fields["init_lora_weights"] = True  # the weights are there; making them anew would change the base again

    def place(self, part: str, layer: Any) -> tuple[Side, int]:
        side, axis = super().place(part, layer)
        vector = part == "lora_magnitude_vector" and isinstance(layer.get_base_layer(), nn.Conv2d)
        return side, 1 if vector else axis

    def slice(self, layer: Any, cut: LayerCut) -> Tensors | None:
        variants = getattr(layer, "lora_variant", {})
        if not cut.is_whole and any(type(variant).__name__ not in DORA for variant in variants.values()):
            return None
        sliced = super().slice(layer, cut)
        if sliced is None or cut.is_whole:
            return sliced
        return sliced if all(_rescale_magnitude(layer, adapter, cut, sliced) for adapter in variants) else None

    def as_lora(self, layer: Any, cut: LayerCut) -> None:
        """It is that."""

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        if any(getattr(layer, "lora_bias", {}).values()) and layer.get_base_layer().bias is None:
            return False
        if not getattr(layer, "lora_variant", {}):
            return True
        if len(layer._get_available_adapters()) > 1:
            return False
        if weight is None:
            return True
        # DoRA divides by the norms of the rows, of which rounding leaves nothing where they are next to zero
        norms = weight.norm(dim=1)
        return bool((norms > norms.max() * torch.finfo(weight.dtype).eps ** 0.5).all())

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        if adapter in getattr(layer, "lora_variant", {}):
            layer.lora_magnitude_vector[adapter].weight.data.copy_(base.weight.norm(dim=1))
        super().take_out(layer, base, adapter)
        if base.bias is not None and getattr(layer, "lora_bias", {}).get(adapter):
            base.bias.data -= (layer.scaling[adapter] * layer.lora_B[adapter].bias).to(base.bias)


def _rescale_magnitude(layer: Any, adapter: str, cut: LayerCut, sliced: Tensors) -> bool:
    """Keep DoRA's ``magnitude / norm`` of every row when the norm loses or rescales columns.

    False where a row of the new weight is zero: its quotient would be 0 / 0.
    """
    weight = layer.get_base_layer().weight.detach()
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    delta = layer.scaling[adapter] * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    full = weight.to(delta.dtype) + delta
    small = cut.take(cut.take(full, "in", 1, scaled=True), "out", 0)
    norm = small.flatten(1).norm(dim=1)
    if bool((norm == 0).any()) or (cut.rows is not None and bool((cut.rows == PAD).any())):
        return False
    if not cut.keeps_inputs:
        name = f"lora_magnitude_vector.{adapter}.weight"
        magnitude, trained = sliced[name]
        ratio = norm / cut.take(full.flatten(1).norm(dim=1), "out", 0)
        sliced[name] = magnitude * ratio.to(magnitude.dtype).view_as(magnitude), trained
    return True


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
    """Every layer has a rank of its own, some of which training gives up."""

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


class Ia3Kind(AdapterKind):
    """One factor for every output of a layer, or for every input of a feed-forward layer."""

    name = "IA3"
    sides = {"ia3_l": "out"}
    convolutions = True

    def rewrite(self, fields: dict[str, Any], layers: Mapping[str, Any]) -> None:
        fields["feedforward_modules"] = [name for name, layer in layers.items() if layer.is_feedforward]

    def place(self, part: str, layer: Any) -> tuple[Side, int]:
        convolution = isinstance(layer.get_base_layer(), nn.Conv2d)
        return ("in", 1) if layer.is_feedforward else ("out", int(convolution))

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        return all(bool((factors.abs() > SMALLEST_FACTOR).all()) for factors in layer.ia3_l.values())

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        factors = layer.ia3_l[adapter].to(base.weight)
        factors = torch.where(factors == 0, torch.ones_like(factors), factors)  # of padding, whose weights are zero
        base.weight.data /= factors
        if base.bias is not None and not layer.is_feedforward:
            base.bias.data /= factors.flatten()


class HiraKind(AdapterKind):
    """A low-rank matrix multiplies the weight element by element."""

    name = "HIRA"
    sides = {"hira_A": "in", "hira_B": "out"}

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        names = layer._get_available_adapters()
        return len(names) == 1 and all(bool((self.factors(layer, a).abs() > SMALLEST_FACTOR).all()) for a in names)

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        base.weight.data /= self.factors(layer, adapter).to(base.weight)

    def factors(self, layer: Any, adapter: str) -> torch.Tensor:
        return 1 + layer.get_delta_weight(adapter).detach()


class LohaKind(AdapterKind):
    """The change of the weight is the elementwise product of two low-rank matrices."""

    name = "LOHA"
    sides = {"hada_w1_a": "out", "hada_w1_b": "in", "hada_w2_a": "out", "hada_w2_b": "in"}
    scaled = "hada_w1_b"
    additive = True


class VeraKind(AdapterKind):
    """All layers share two random matrices, and read the first rows and columns of them."""

    name = "VERA"
    additive = True

    def fits(self, tuner: Any, layers: list[Any]) -> bool:
        """PEFT sizes the shared matrices by the largest layer it finds."""
        a, b = next(iter(tuner.vera_A.values())), next(iter(tuner.vera_B.values()))
        inputs = max((layer.in_features for layer in layers), default=0)
        outputs = max((layer.out_features for layer in layers), default=0)
        return (b.shape[0], a.shape[1]) == (outputs, inputs)

    def as_lora(self, layer: Any, cut: LayerCut) -> Tensors:
        """Of the same rank: ``B[out] * lambda_b`` times ``lambda_d * A[:, in]``."""
        lora: Tensors = {}
        for name, lambda_d in layer.vera_lambda_d.items():
            lambda_b = layer.vera_lambda_b[name]
            a = lambda_d.detach()[:, None] * layer.vera_A[name][:, : layer.in_features].to(lambda_d)
            b = lambda_b.detach()[:, None] * layer.vera_B[name][: layer.out_features].to(lambda_b)
            lora[f"lora_A.{name}.weight"] = cut.take(a, "in", 1, scaled=True), lambda_d.requires_grad
            lora[f"lora_B.{name}.weight"] = cut.take(b, "out", 0), lambda_b.requires_grad
        return lora


class OftKind(AdapterKind):
    name = "OFT"
    changes_inputs = True


class HraKind(OftKind):
    name = "HRA"

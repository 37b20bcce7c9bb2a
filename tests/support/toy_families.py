"""Models made to break what a family can say: each differs from a plain transformer in one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_vitprune.families import Family

#: what is unusual -> said in a model's config as ``kind``
KINDS = ("plain", "renamed q", "k without bias", "RMSNorm", "post-norm", "RoPE", "whole-width q norm", "extra keyword")


class ToyRMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    weights = (query @ key.transpose(2, 3) * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


class ToyAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        setattr(self, config.q_name, nn.Linear(width, width))
        self.k_proj = nn.Linear(width, width, bias=config.kind != "k without bias")
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        if config.kind == "whole-width q norm":
            self.q_norm = ToyRMSNorm(width)

    def attend(self, hidden_states, q_change: Callable[[Any], Any] = lambda q: q, angles=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = q_change(getattr(self, self.config.q_name)(hidden_states)).view(shape).transpose(1, 2)
        k, v = (linear(hidden_states).view(shape).transpose(1, 2) for linear in (self.k_proj, self.v_proj))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attention(self, q, k, v, None, scaling=self.scaling, **kwargs)
        return self.o_proj(context.reshape(*hidden_states.shape[:-1], -1)), weights

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.attend(hidden_states, self.q_norm if hasattr(self, "q_norm") else lambda q: q, **kwargs)


class ToyRotaryAttention(ToyAttention):
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        return self.attend(hidden_states, angles=position_embeddings, **kwargs)


class ToyGatedAttention(ToyAttention):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        gain = kwargs.pop("gain")  # hidden in the keywords: nothing in the signature tells
        return self.attend(hidden_states, lambda q: q * gain, **kwargs)


ATTENTIONS = {"RoPE": ToyRotaryAttention, "extra keyword": ToyGatedAttention}


class ToyMlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class ToyLayer(GradientCheckpointingLayer):
    def __init__(self, config: Any) -> None:
        super().__init__()
        norm = ToyRMSNorm if config.kind == "RMSNorm" else nn.LayerNorm
        self.attention = ATTENTIONS.get(config.kind, ToyAttention)(config)
        self.layernorm_before, self.layernorm_after = norm(config.hidden_size), norm(config.hidden_size)
        self.mlp = ToyMlp(config)
        self.post = config.kind == "post-norm"

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.post:
            x = x + self.layernorm_before(self.attention(x, **kwargs)[0])
            return x + self.layernorm_after(self.mlp(x))
        x = x + self.attention(self.layernorm_before(x), **kwargs)[0]
        return x + self.mlp(self.layernorm_after(x))


def toy_family(kind: str, **said: Any) -> Family:
    """Classes for a kind, registered with transformers, and the family that describes them as well as it can."""
    name = "toy_" + kind.lower().replace(" ", "_").replace("-", "_") + "_".join(["", *said])
    q_name = "to_q" if kind == "renamed q" else "q_proj"

    class ToyConfig(PreTrainedConfig):
        model_type = name

        def __init__(self, **kwargs: Any) -> None:
            sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
            for field, value in {**sizes, "image_size": 16, "patch_size": 8, "num_channels": 3}.items():
                setattr(self, field, kwargs.pop(field, value))
            self.kind, self.q_name = kind, q_name
            super().__init__(**kwargs)

    class ToyModel(PreTrainedModel):
        config_class = ToyConfig
        base_model_prefix = "toy"
        main_input_name = "pixel_values"
        _supports_sdpa = True

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.patch = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
            self.layers = nn.ModuleList([ToyLayer(config) for _ in range(config.num_hidden_layers)])
            self.layernorm = (ToyRMSNorm if config.kind == "RMSNorm" else nn.LayerNorm)(config.hidden_size)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)

        def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
            x = self.patch(pixel_values).flatten(2).transpose(1, 2)
            if self.config.kind == "RoPE":
                steps = torch.arange(x.shape[1], device=x.device)[:, None] + 1.0
                kwargs["position_embeddings"] = steps / (1 + torch.arange(4, device=x.device))  # heads of 8
            if self.config.kind == "extra keyword":
                kwargs["gain"] = 1.5
            for layer in self.layers:
                x = layer(x, **kwargs)
            return BaseModelOutput(last_hidden_state=self.layernorm(x))

    ToyConfig.__module__ = ToyModel.__module__ = __name__
    AutoConfig.register(name, ToyConfig, exist_ok=True)
    AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
    return Family(
        model_type=name, root="toy", patch="patch", extra_tokens=0, interpolates=False, **{"q": q_name, **said}
    )

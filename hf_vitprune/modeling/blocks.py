"""Parts of a pruned layer: attention of free sizes, an MLP that reads some channels, and a removed branch."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from ..errors import UnsupportedModelError
from ..spec.layer_shape import LayerShape
from ..utils.mixing import InPlaceMixin
from ..utils.modules import get
from .conv_mixer import GRID

#: keywords that transformers hands through every model, and that mean the same to every attention kernel
#: (``use_cache`` is for the language model of a bigger one)
_KNOWN = frozenset(TransformersKwargs.__annotations__) | {"use_cache"}
#: attention of graphs for other runtimes, which take q/k and v of different widths as they are
UNPADDED = "sdpa_unpadded"
#: the plain steps below, for graphs of ONNX
IN_STEPS = "in_steps"
#: names under which attentions keep their rate of dropout
_DROPOUTS = ("attention_dropout", "dropout_prob", "dropout")


def _check_known(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Our attention stands in the place of a stock one, and does nothing with what only that one knows."""
    unknown = [name for name, value in kwargs.items() if name not in _KNOWN and value is not None]
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} got {unknown[0]!r}, which the pruned attention does not understand: call the "
            "model without it, or keep q/k and v channels alike (then the stock attention stays)"
        )


def read_inputs(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The channels a pruned part reads: all, or those of its ``input_index``."""
    index = getattr(module, "input_index", None)
    if index is None:
        return hidden_states
    # on CPUs index_select along the last axis is an order of magnitude slower than gather
    return hidden_states.gather(-1, index.expand(*hidden_states.shape[:-1], -1))


def set_attention_sizes(attention: Any, shape: LayerShape, scaling: float) -> None:
    """Sizes that stock forwards, kernels and other people's code read on an attention."""
    sizes = {"num_attention_heads": shape.heads, "num_heads": shape.heads, "head_dim": shape.v_dim}
    whole = shape.heads * shape.v_dim
    sizes |= {"attention_head_size": shape.v_dim, "all_head_size": whole, "embed_dim": whole}
    for name, size in {**sizes, "scaling": scaling, "scale": scaling}.items():
        if hasattr(attention, name):
            setattr(attention, name, size)


def eager_attention_forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention in plain steps, for families whose files have no such function (data2vec).

    Tensors are (batch, heads, tokens, channels); the context is (batch, tokens, heads, channels).
    """
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if mask is None else scores + mask
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class PrunedAttentionMixin(InPlaceMixin):
    """Forward for attention whose heads, q/k channels and v channels are free.

    Mixed into a family's own attention class, so that transformers still records its weights. Stock forwards infer
    the number of heads from one ``head_dim`` and silently regroup channels when it no longer holds; here every view
    is explicit. Fused kernels want q, k and v of one width: the narrower side is padded with zeros, which changes
    neither the scores nor (cropped) the context.
    """

    def register_channels(self, full: int) -> None:
        """Room for which of the ``full`` channels of each head are kept, where something turns them; any at first."""
        module: Any = self
        module.rotated = full
        first = torch.arange(module.qk_dim // 2, device=get(module, module.projections[0]).weight.device)
        module.register_buffer("qk_index", torch.cat([first, first + full // 2]).repeat(module.pruned_heads))

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module: Any = self
        kwargs.update(zip(module.by_position, args, strict=False))
        attention_mask = kwargs.pop("attention_mask", None)
        kwargs.pop(GRID, None)  # for convolution mixers; some kernels refuse what they do not know
        shape = hidden_states.shape[:-1]
        heads = module.pruned_heads
        inputs = read_inputs(module, hidden_states)
        q, k, v = (get(module, name)(inputs) for name in module.projections)
        if module.qk_norms:
            q, k = (get(module, name)(x) for name, x in zip(module.qk_norms, (q, k), strict=True))
        query, key = (x.view(*shape, heads, module.qk_dim).transpose(1, 2) for x in (q, k))
        value = v.view(*shape, heads, module.v_dim).transpose(1, 2)
        if module.rotate is not None:
            query, key = module.rotate(module, query, key, kwargs)
        if module.bias_function is not None:
            attention_mask = module.bias_function(module, attention_mask, shape, kwargs)
        if not hasattr(module, "is_causal"):  # kernels take what does not say so for a language model's
            kwargs.setdefault("is_causal", False)
        _check_known(module, kwargs)
        implementation = module.config._attn_implementation
        if implementation not in ("eager", UNPADDED, IN_STEPS):
            width = max(module.qk_dim, module.v_dim)
            if width > module.qk_dim:
                query, key = F.pad(query, (0, width - module.qk_dim)), F.pad(key, (0, width - module.qk_dim))
            elif width > module.v_dim:
                value = F.pad(value, (0, width - module.v_dim))
        # the eager function of the family's own file, so that its quirks stay; some have none
        eager = getattr(sys.modules[module.stock_class.__module__], "eager_attention_forward", eager_attention_forward)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        dropout = next((getattr(module, name) for name in _DROPOUTS if hasattr(module, name)), 0.0)
        kwargs |= {"dropout": dropout if module.training else 0.0, "scaling": module.pruned_scaling}
        context, weights = attend(module, query, key, value, attention_mask, **kwargs)
        context = context[..., : module.v_dim].reshape(*shape, heads * module.v_dim)
        return (context if module.output_name is None else get(module, module.output_name)(context)), weights


class PrunedInputsMixin(InPlaceMixin):
    """An MLP, or an attention that stays stock, that reads only the channels of its ``input_index``."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(read_inputs(self, hidden_states), *args, **kwargs)  # type: ignore[misc, arg-type]


class RemovedAttention(nn.Module):
    """Stands where a layer's attention was: contributes nothing, and records no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class RemovedMlp(nn.Module):
    """Stands where a layer's MLP was: contributes nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)

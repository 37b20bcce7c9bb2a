"""ReViT: where a globally pruned transformer keeps its parameters, as a rule for models of any width."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...errors import InvalidConfigError
from ...spec.architecture import Architecture
from ...spec.configs import stock_config
from ...utils.settings import check_count

#: channels a head of value, and of the dense model behind the attention scale of 1/8
HEAD_DIM = 64


def revit(base_config: PreTrainedConfig, hidden_size: int = 384, rule: str = "released") -> Architecture:
    """A wide middle and narrow ends: the redistributed shape of NViT (arXiv 2110.04869), not pruned.

    With a = round(0.005 E) and b = round(0.00625 E) (at least 1) for width E, a quarter of the layers at either end
    have 2a heads with 8b q/k channels and an MLP of 3E; the half between has 4a heads with 16b and an MLP of 6E. Heads
    have 64 value channels. The paper has 12 layers (3, 6, 3); other depths are split in the same proportions. The
    released code, whose sizes are the published ones, gives the first and the last layer 10 heads with 16b; the
    paper's table 6 does not.

    Args:
        base_config: stock config: depth, labels, image and patch size; its heads have 64 channels.
        hidden_size: residual width E.
        rule: ``"released"``, or ``"table"`` for the paper's table 6.

    Raises:
        InvalidConfigError: the family has stages, or a fixed width, or the config's heads have not 64 channels; an
            unknown rule.
        InvalidArchitectureError: the width is no positive whole number, or far over the config's.
    """
    if rule not in ("released", "table"):
        raise InvalidConfigError(f"rule is released or table, not {rule!r}")
    dense = Architecture.dense(stock_config(base_config))
    if dense.depths is not None or "embedding" not in dense.units:
        raise InvalidConfigError(f"ReViT shapes are for models of one width, which {dense.model_type} models are not")
    if dense.head_dim(0) != HEAD_DIM:
        raise InvalidConfigError(
            f"ReViT's attention is scaled for heads of {HEAD_DIM} channels, the config's have {dense.head_dim(0)}; "
            f"change num_attention_heads (or head_dim) of the config to have {HEAD_DIM}"
        )
    check_count("hidden_size", hidden_size)
    heads, qk = max(1, round(0.005 * hidden_size)), 8 * max(1, round(0.00625 * hidden_size))

    def layer(heads: int, qk: int, mlp: int) -> dict[str, Any]:
        return {"heads": heads, "qk_dim": qk, "v_dim": HEAD_DIM, "mlp": mlp * hidden_size}

    depth = len(dense.layers)
    quarter = round(depth / 4)
    ends = [layer(2 * heads, qk, 3)] * quarter
    if rule == "released":
        ends[:1] = [layer(10, 2 * qk, 3)] * min(1, quarter)
    middle = [layer(4 * heads, 2 * qk, 6)] * (depth - 2 * quarter)
    return Architecture.from_layers(dense.config, [*ends, *middle, *reversed(ends)], hidden_size)

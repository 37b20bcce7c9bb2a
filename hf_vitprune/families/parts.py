"""Words for the parts of a layer: kinds of units, sizes, and paths of modules."""

from __future__ import annotations

from typing import Any, NamedTuple

#: Every kind of unit that a plan can remove, from the finest to the coarsest.
UNITS = ("qk", "v", "mlp", "heads", "embedding", "layers")

Grid = tuple[int, int]
#: layers a stage, of hierarchical models
Depths = tuple[int, ...] | None


class LayerSizes(NamedTuple):
    """Sizes of one dense layer: residual width, attention heads, channels a head, hidden neurons of the MLP."""

    embedding: int
    heads: int
    head_dim: int
    mlp: int


class LayerPaths(NamedTuple):
    """Dotted paths, from the task model, of a layer's parts.

    ``scale1`` and ``scale2`` (factors of LayerScale) and ``bias_table`` are names of parameters; None: there is none.
    """

    layer: str
    norm1: str
    attention: str
    q: str
    k: str
    v: str
    o: str
    norm2: str
    mlp: str
    fc1: tuple[str, ...]
    fc2: str
    scale1: str | None
    scale2: str | None
    bias_table: str | None
    #: names of further parameters with one value, row or column a head, and the axis of the heads
    of_heads: tuple[tuple[str, int], ...] = ()

    @property
    def per_head(self) -> tuple[tuple[str, int], ...]:
        """All of them: name and axis."""
        return self.of_heads if self.bias_table is None else ((self.bias_table, 1), *self.of_heads)


#: names of the parts of a layer, where modules are nested as in BERT
NESTED: dict[str, Any] = {
    "attention": "attention.attention",
    "q": "query",
    "k": "key",
    "v": "value",
    "outer_o": "attention.output.dense",
    "mlp": "intermediate",
    "fc1": ("dense",),
    "outer_fc2": "output.dense",
}

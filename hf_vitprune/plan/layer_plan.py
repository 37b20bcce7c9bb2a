"""LayerPlan: which units of one layer stay, by index."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InvalidPlanError
from ..spec.layer_shape import KERNELS, LayerShape

#: in a v or qk list: a channel of zeros, so that heads with fewer channels fit a dense kernel
PAD = -1

Indices = tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer. Indices count in the model that the plan is for.

    ``qk`` and ``v`` hold one list a kept head, all of one length (:data:`PAD` marks a channel of zeros); they are
    empty where ``mixer`` is not attention. Another mixer than the source's is made by :meth:`with_mixer`; the weights
    of a new convolution are in the plan's. An empty ``mlp`` removes the MLP. ``attention_in`` and ``mlp_in`` are
    positions among the channels those parts read (None: all). ``scales`` holds factors for the kept units of
    ``attention_in``, ``v`` (heads concatenated), ``mlp_in`` or ``mlp``, which surgery multiplies into the weights that
    read them.
    """

    index: int
    mixer: str
    heads: Indices
    qk: tuple[Indices, ...]
    v: tuple[Indices, ...]
    mlp: Indices
    attention_in: Indices | None = None
    mlp_in: Indices | None = None
    scales: dict[str, tuple[float, ...]] = field(default_factory=dict)
    conv_channels: int | None = None
    batch_norm: bool | None = None

    @classmethod
    def dense(cls, index: int, shape: LayerShape) -> LayerPlan:
        has_attention = shape.mixer == "attention"
        heads = tuple(range(shape.heads)) if has_attention else ()
        return cls(
            index=index,
            mixer=shape.mixer,
            heads=heads,
            qk=tuple(tuple(range(shape.qk_dim)) for _ in heads),
            v=tuple(tuple(range(shape.v_dim)) for _ in heads),
            mlp=tuple(range(shape.mlp)),
            conv_channels=shape.conv_channels,
            batch_norm=shape.batch_norm,
        )

    def with_mixer(self, mixer: str, conv_channels: int | None = None, batch_norm: bool | None = None) -> LayerPlan:
        """Mix tokens otherwise: by ``identity`` or ``none``, or by a convolution with new weights.

        ``conv_channels`` and ``batch_norm`` (there by default) are of a convolution.
        """
        if mixer in KERNELS and batch_norm is None:
            batch_norm = True
        scales = {name: factors for name, factors in self.scales.items() if name.startswith("mlp")}
        changes: dict[str, Any] = {"heads": (), "qk": (), "v": (), "attention_in": None, "scales": scales}
        return replace(self, mixer=mixer, conv_channels=conv_channels, batch_norm=batch_norm, **changes)

    def replaces_mixer(self, source: LayerShape) -> bool:
        """Whether the mixer is not the source's own, nor a part of it."""
        mine = (self.mixer, self.conv_channels, self.batch_norm)
        return self.mixer != "none" and mine != (source.mixer, source.conv_channels, source.batch_norm)

    def keep_heads(self, heads: Iterable[int]) -> LayerPlan:
        """Keep only these heads (positions in the source layer)."""
        chosen = tuple(sorted(heads))
        if not chosen:
            raise InvalidPlanError(
                f"layer {self.index} keeps a head at least: with_mixer('none') takes the attention away, "
                "with_mixer('identity') leaves its norm and values"
            )
        foreign = sorted(set(chosen) - set(self.heads))
        if foreign:
            raise InvalidPlanError(f"layer {self.index} has the heads {list(self.heads)}, not {foreign}")
        rows = [self.heads.index(h) for h in chosen]
        return replace(self, heads=chosen, qk=tuple(self.qk[r] for r in rows), v=tuple(self.v[r] for r in rows))

    def keep_channels(self, which: str, channels: Iterable[int]) -> LayerPlan:
        """Keep the same q/k (``which="qk"``) or v channels in every head."""
        if which not in ("qk", "v"):
            raise InvalidPlanError(
                f"channels of heads are 'qk' or 'v', not {which!r}; neurons: replace(layer, mlp=...)"
            )
        chosen = tuple(sorted(channels))
        rows = tuple(chosen for _ in self.heads)
        return replace(self, qk=rows) if which == "qk" else replace(self, v=rows)

    def shape(self, source: LayerShape) -> LayerShape:
        attention = self.mixer == "attention"
        return LayerShape(
            mixer=self.mixer,
            heads=len(self.heads),
            qk_dim=len(self.qk[0]) if attention and self.qk else 0,
            v_dim=len(self.v[0]) if attention and self.v else 0,
            mlp=len(self.mlp),
            attention_in=self._inputs("attention_in", source) if attention else None,
            mlp_in=self._inputs("mlp_in", source) if self.mlp else None,
            shifted=source.shifted,
            conv_channels=self.conv_channels,
            batch_norm=self.batch_norm,
        )

    def _inputs(self, name: str, source: LayerShape, width: int | None = None) -> int | None:
        """How many channels a branch reads; ``width``: where it reads all."""
        kept: Indices | None = getattr(self, name)
        return len(kept) if kept is not None else getattr(source, name) or width


def optional_whole_numbers(values: Any) -> Indices | None:
    return None if values is None else whole_numbers(values)


def whole_numbers(values: Any) -> Indices:
    if not isinstance(values, (list, tuple)) or any(type(v) is not int for v in values):
        raise InvalidPlanError(f"expected a list of whole numbers, got {values!r}")
    return tuple(values)


def layer_from_dict(row: dict[str, Any]) -> LayerPlan:
    heads = whole_numbers(row["heads"])
    fields = {**row, "heads": heads, "mlp": whole_numbers(row["mlp"])}
    for name in ("qk", "v"):
        rows = row[name] if row[name] and isinstance(row[name][0], (list, tuple)) else [row[name]] * len(heads)
        fields[name] = tuple(map(whole_numbers, rows))
    for name in ("attention_in", "mlp_in"):
        fields[name] = optional_whole_numbers(row.get(name))
    fields["scales"] = {name: tuple(factors) for name, factors in row.get("scales", {}).items()}
    return LayerPlan(**fields)


def check_indices(what: str, kept: Indices, size: int, may_be_empty: bool = False) -> None:
    if not kept and not may_be_empty:
        raise InvalidPlanError(f"{what}: the plan empties this set; keep at least one of {size}")
    if any(type(i) is not int for i in kept):
        raise InvalidPlanError(f"{what}: indices are whole numbers")
    if kept and (min(kept) < 0 or max(kept) >= size):
        raise InvalidPlanError(f"{what}: indices {min(kept)}..{max(kept)} are not in 0..{size - 1}")
    if len(set(kept)) != len(kept):
        raise InvalidPlanError(f"{what}: an index is repeated")


def check_layer(entry: LayerPlan, source: LayerShape, width: int, whole_stream: bool) -> None:
    """Refuse a layer that cannot be made of ``source``, in a stream of ``width`` (``whole_stream``: uncut)."""
    where = f"layer {entry.index}"
    if entry.replaces_mixer(source) and (entry.mixer == "attention" or source.mixer == "none"):
        raise InvalidPlanError(f"{where}: mixer {entry.mixer!r} cannot be made from {source.mixer!r}")
    if entry.mixer not in ("attention", "none") and (
        entry.heads or entry.qk or entry.v or entry.attention_in is not None
    ):
        raise InvalidPlanError(
            f"{where}: a layer whose mixer is {entry.mixer!r} keeps no heads, channels of heads or inputs"
        )
    if entry.mixer == "attention":
        check_indices(f"{where}: heads", entry.heads, source.heads)
        for name, rows, size in (("qk", entry.qk, source.qk_dim), ("v", entry.v, source.v_dim)):
            if len(rows) != len(entry.heads) or len({len(row) for row in rows}) != 1:
                raise InvalidPlanError(f"{where}: {name} needs one list of one length for each kept head")
            for row in rows:
                check_indices(f"{where}: {name}", tuple(c for c in row if c != PAD), size, may_be_empty=len(row) > 0)
    if entry.mlp:
        check_indices(f"{where}: mlp", entry.mlp, source.mlp)
    for name in ("attention_in", "mlp_in"):
        kept = getattr(entry, name)
        if kept is not None:
            check_indices(f"{where}: {name}", kept, getattr(source, name) or width)
    if not whole_stream and (
        entry.attention_in is not None or entry.mlp_in is not None or source.attention_in or source.mlp_in
    ):
        raise InvalidPlanError(
            f"{where}: residual channels and the inputs of attention or MLP cannot be pruned together; "
            "prune one, then the other"
        )
    lengths = {name: entry._inputs(name, source, width) for name in ("attention_in", "mlp_in")}
    lengths |= {"v": sum(map(len, entry.v)), "mlp": len(entry.mlp)}
    for name, scale in entry.scales.items():
        if any(not isinstance(factor, (int, float)) or not math.isfinite(factor) for factor in scale):
            raise InvalidPlanError(f"{where}: scales of {name!r} are finite numbers")
        if lengths.get(name) != len(scale):
            raise InvalidPlanError(f"{where}: {len(scale)} scales for {lengths.get(name)} units of {name!r}")


def check_pairs(entry: LayerPlan, source: LayerShape) -> None:
    """Refuse q/k channels that rotary positions turn together with one that goes, or stand apart from it."""
    for row in entry.qk:
        half, apart = len(row) // 2, source.qk_dim // 2
        for first, second in zip(row[:half], row[half:], strict=False):
            if (second - apart if second != PAD else PAD) != first:
                raise InvalidPlanError(
                    f"layer {entry.index}: rotary positions turn q/k channels c and c + {apart} of a head together: "
                    f"keep both or neither, the first ones of all pairs in front of the second ones; got {list(row)}"
                )
        if len(row) % 2:
            raise InvalidPlanError(f"layer {entry.index}: q/k channels are kept in pairs here; got {list(row)}")

"""The same sizes in every layer, of those that a stock class can hold: what has them needs no code to load."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from ..errors import InvalidPlanError, NativeExportError
from ..modeling.native import native_config, to_native
from ..modeling.registry import class_for_task, config_for
from ..spec.architecture import Architecture


class Sizes(NamedTuple):
    """Sizes of every layer, and of the residual stream; stock attention has one number of channels for q/k and v."""

    heads: int
    channels: int
    mlp: int
    embedding: int

    def of(self, unit: str) -> int:
        """What stays of a unit."""
        return int(getattr(self, "channels" if unit in ("qk", "v") else unit))


class StockSizes:
    """Sizes that all layers of a model may have together: tried on the stock config; refused if there are none.

    Args:
        source: architecture of the model.
        units: what may be cut: q/k and v channels only where both are in it.
        round_to: kept channels and neurons are multiples of this, or all there are.
    """

    def __init__(self, source: Architecture, units: Collection[str], round_to: int) -> None:
        self.source, first = source, source.layers[0]
        family, config = source.family, source.config
        try:
            if source.depths is not None:  # they differ by stage, as the stock config has them
                family.uniform_config(config, 1, 1, 1, source.hidden_size)
            native_config(source)
        except (NativeExportError, ValueError) as error:
            raise InvalidPlanError(
                f"the same sizes in every layer: no stock class holds them ({error}); leave uniform out"
            ) from error
        #: sizes that the model has
        self.whole = Sizes(first.heads, first.qk_dim, first.mlp, source.hidden_size)
        both = {"qk", "v"} <= {*units}
        heads = range(1, first.heads + 1) if "heads" in units else [first.heads]
        channels = _multiples(first.qk_dim, round_to, both)
        neurons = _multiples(first.mlp, round_to, "mlp" in units)
        neck = family.has_neck(config, source.task)
        widths = _multiples(source.hidden_size, round_to, "embedding" in units and not neck)
        #: residual width -> (heads, channels a head) that go with it, and neurons
        self.attention: dict[int, list[tuple[int, int]]] = {}
        self.mlp: dict[int, list[int]] = {}
        for width in widths:
            stated = copy.copy(family.sizes_config(config))
            stated.__dict__["hidden_size"] = width
            known = family.mlp_size(stated)  # what a config of this width has, if nothing else is said
            pairs = [(h, d) for h in heads for d in channels if not self._refused(Sizes(h, d, known, width))]
            if pairs:
                fitting = [m for m in neurons if not self._refused(Sizes(*pairs[-1], m, width))]
                if fitting:
                    self.attention[width], self.mlp[width] = pairs, fitting
        if self.smallest() == self.whole:
            whole = self.whole
            fewer = whole._replace(mlp=max(1, whole.mlp // 2)), whole._replace(heads=max(1, whole.heads // 2))
            reason = next(filter(None, map(self._refused, fewer)), "all of what may go is needed")
            raise InvalidPlanError(
                f"the same sizes in every layer: no stock class holds fewer of {', '.join(sorted(units))} "
                f"({reason}); leave uniform out, and save portable=True to load without hf_vitprune"
            )

    def _refused(self, sizes: Sizes) -> str | None:
        """Why no stock config holds these sizes; None where one does."""
        try:
            self.source.family.uniform_config(self.source.config, *sizes)
        except ValueError as error:
            return str(error)
        return None

    def smallest(self) -> Sizes:
        """The least that every layer may have, of the narrowest residual stream."""
        found = [
            Sizes(*min(pairs, key=lambda pair: pair[0] * pair[1]), min(self.mlp[width]), width)
            for width, pairs in self.attention.items()
        ]
        return min(found, key=lambda s: (s.embedding, s.heads * s.channels, s.mlp), default=self.whole)

    def best(self, worth: Callable[[Sizes], float], fits: Callable[[Sizes], bool]) -> Sizes | None:
        """With each number of heads and channels the most neurons that fit; of these, those that are worth most.

        ``fits`` holds for smaller sizes where it holds for larger ones. None where nothing fits.
        """
        found = []
        for width, pairs in self.attention.items():
            neurons = self.mlp[width]
            for pair in pairs:
                count = bisect.bisect_left(
                    range(len(neurons)), True, key=lambda k: not fits(Sizes(*pair, neurons[k], width))
                )
                if count:
                    found.append(Sizes(*pair, neurons[count - 1], width))
        return max(found, key=worth, default=None)

    def nearest(self, kept: Mapping[str, float]) -> Sizes:
        """The sizes next to these shares of what there is (all, where none is named) that go together."""
        wanted = {name: kept.get(name, 1.0) * size for name, size in self.whole._asdict().items()}

        def off(name: str, size: int) -> float:
            whole: int = getattr(self.whole, name)
            return abs(size - wanted[name]) / whole

        found = []
        for width, pairs in self.attention.items():
            pair = min(pairs, key=lambda p: off("heads", p[0]) + off("channels", p[1]))
            found.append(Sizes(*pair, min(self.mlp[width], key=lambda m: off("mlp", m)), width))
        return min(found, key=lambda sizes: sum(off(name, size) for name, size in sizes._asdict().items()))


def _multiples(size: int, step: int, free: bool) -> list[int]:
    """Sizes that may be kept, ascending, all of it the last."""
    return [*(range(step, size, step) if free else ()), size]


def check_stock(architecture: Architecture) -> None:
    """Make a model of this shape a stock one, without weights; InvalidPlanError says why that cannot be."""
    with torch.device("meta"):
        pruned = class_for_task(architecture.family, architecture.task)(config_for(architecture))
        try:
            to_native(pruned)
        except NativeExportError as error:
            raise InvalidPlanError(
                f"the same sizes in every layer are not enough for a stock {architecture.model_type}: {error}; leave "
                "the unit 'embedding' out, or uniform"
            ) from error
